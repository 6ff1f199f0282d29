"""``pytest benchmarks/ --benchmark-only``: loss x workload x mode, all contenders side by side."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from kdkernels.registry import LossSpec

from . import contenders, measure
from .machine import machine
from .problem import Problem
from .shapes import Workload


@functools.lru_cache(maxsize=1)
def _problem(spec: LossSpec, workload: Workload, dtype: torch.dtype, device: str) -> Problem:
    """The current problem; one is kept, because the large ones fill gigabytes."""
    return Problem(spec, workload, dtype, device)


@functools.lru_cache(maxsize=1)
def _machine(device: str) -> dict[str, Any]:
    return machine(device)


def time_case(benchmark: Any, problem: Problem, name: str, mode: str, budget: float) -> None:
    """Time a contender, or fail with ``Refused`` before a single round is timed."""
    function = contenders.build(name, problem)
    if name != "floor":
        problem.check(name, function, mode)
    device = problem.device
    body = measure.step(function, problem, mode, floor=name == "floor")
    peak = measure.peak_bytes(body, problem)
    rounds, iterations = measure.plan(body, device, budget)
    dtype = str(problem.dtype).removeprefix("torch.")
    benchmark.group = f"{problem.workload.name} {problem.spec.name} {dtype} {mode}"
    benchmark.name = name
    benchmark.extra_info.update(
        _machine(device),
        loss=problem.spec.name,
        workload=problem.workload.name,
        shape=list(problem.workload.shape),
        dtype=dtype,
        mode=mode,
        contender=name,
        floor_bytes=problem.floor_bytes,
        peak_bytes=peak,
    )
    timed = measure.repeated(body, device, iterations)
    benchmark.pedantic(timed, rounds=rounds, iterations=iterations)
    problem.forget_gradients()


def test_speed(
    benchmark: Any,
    request: pytest.FixtureRequest,
    spec: LossSpec,
    workload: Workload,
    dtype: torch.dtype,
    mode: str,
    contender: str,
) -> None:
    device = request.config.getoption("--device")
    reasons = contenders.why_not(contender, spec, device)
    if reasons:
        pytest.skip("; ".join(reasons))
    problem = _problem(spec, workload, dtype, device)
    time_case(benchmark, problem, contender, mode, request.config.getoption("--budget"))

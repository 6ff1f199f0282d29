"""Who is timed, and why somebody is not: eager, compiled eager, the library, and the floor."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kdkernels import _dispatch
from kdkernels._toolchain import compiler as cpp_compiler
from kdkernels.registry import LossSpec

from .eager import eager
from .problem import Problem, with_labels
from .shapes import Workload

KERNELS = ("native", "triton")
"""Backends of the library that are worth timing, the preferred one first."""

COMPOSED = "composed"
"""A loss without kernels of its own, as the library runs it: with ``backend=None``."""

NOT_COMPILED = {
    "tuple_matching": "the number of tuples depends on the data, so torch.compile breaks the eager"
    " form into pieces, and what they mine at the edge of the band is not what eager mines"
}
"""Losses whose compiled eager form does not work, with the reason."""


def own(spec: LossSpec) -> tuple[str, ...]:
    """What of the library is worth timing for a loss."""
    return tuple(name for name in KERNELS if name in spec.backends) or (COMPOSED,)


def contenders(spec: LossSpec, workload: Workload) -> tuple[str, ...]:
    """Who takes part for a loss at a workload. The eager forms know no mask: with one the kernels
    are compared with themselves without it."""
    rivals = ("eager", "compile") if workload.ignored is None else ()
    return (*rivals, *own(spec), *(("floor",) if workload.floor else ()))


def why_not(name: str, spec: LossSpec, device: str) -> list[str]:
    """The reasons why a contender is not timed on this device (empty: it is)."""
    if name in ("eager", "floor"):
        return []
    if name == "compile":
        return _compile_reasons(spec, device)
    if name == COMPOSED:
        return [] if own(spec) == (COMPOSED,) else [f"{spec.name} has kernels of its own"]
    if name == "triton" and device == "cpu":
        return ["on the CPU Triton is interpreted, which is for tests and not for timing"]
    if name == "triton" and os.environ.get("TRITON_INTERPRET") == "1":
        return ["TRITON_INTERPRET=1 is set, and an interpreter is not timed"]
    return _dispatch.why_not(spec, name, torch.empty(0, device=device))


def _compile_reasons(spec: LossSpec, device: str) -> list[str]:
    if spec.name in NOT_COMPILED:
        return [NOT_COMPILED[spec.name]]
    if device == "cpu" and cpp_compiler() is None:
        return ["torch.compile needs a C++ compiler for CPU tensors"]
    return []


def build(name: str, problem: Problem) -> Callable[..., Any]:
    """The function ``(student, teacher[, target]) -> loss`` of a contender.

    The floor is ``torch.add(student, teacher)``: it reads both inputs and writes one tensor of the
    same size, which is the traffic of forward + backward and nothing else. A loss of two student
    tensors has two of them.
    """
    if name == "floor":
        return functools.partial(_add, len(problem.students))
    if name == COMPOSED:
        return problem.spec.function
    if name == "eager":
        return eager(problem.spec)
    if name == "compile":
        if problem.compiled is None:
            # One compilation a problem: no shapes left over, no limit on recompilations reached.
            torch.compiler.reset()
            problem.compiled = torch.compile(eager(problem.spec), dynamic=False)
        return problem.compiled
    function = functools.partial(problem.spec.function, backend=name)
    return function if problem.workload.ignored is None else with_labels(problem.spec, function)


def _add(students: int, *inputs: Tensor) -> Tensor | list[Tensor]:
    if inputs[0].shape != inputs[students].shape:  # the teacher is one number a row
        return inputs[0] + 1
    if students == 1:
        return torch.add(inputs[0], inputs[1])
    return [torch.add(student, inputs[students]) for student in inputs[:students]]


def ours(spec: LossSpec, device: str) -> str:
    """The backend of the library that is timed on this device."""
    able = (name for name in own(spec) if not why_not(name, spec, device))
    return next(able, "reference")

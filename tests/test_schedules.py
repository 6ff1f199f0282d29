"""Options that change from step to step under ``torch.compile``: at most two compilations."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from every import every, example, gradient
from torch._dynamo.testing import CompileCounterWithBackend

from kdkernels.registry import LossSpec

VALUES = 5


def _schedules(spec: LossSpec) -> dict[str, list[float]]:
    """Values of every float option, all in its domain."""
    parameters = inspect.signature(spec.function).parameters.values()
    floats = [p for p in parameters if isinstance(p.default, float)]
    return {p.name: [p.default * (1 + step / 8) for step in range(VALUES)] for p in floats}


def _cases() -> Any:
    grid = []
    for param in every().args[1]:
        spec, backend = param.values
        if backend is None:
            continue
        for name in _schedules(spec):
            grid.append(
                pytest.param(spec, backend, name, id=f"{param.id}-{name}", marks=param.marks)
            )
    return pytest.mark.parametrize(("spec", "backend", "name"), grid)


@_cases()
def test_a_schedule_compiles_twice(spec: LossSpec, backend: str, name: str) -> None:
    """As an argument of the function and as an attribute of the module."""
    case = example(spec)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(case.of, fullgraph=True, backend=counter)
    for value in _schedules(spec)[name]:
        options: dict[str, Any] = {name: value, "backend": backend}
        given = gradient(lambda x: compiled(x, **options), case.student)  # noqa: B023
        expected = gradient(case.function(**options), case.student)
        torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-7)
    assert counter.frame_count <= 2, f"{counter.frame_count} compilations for {VALUES} values"
    torch._dynamo.reset()


@_cases()
def test_a_scheduled_module_compiles_twice(spec: LossSpec, backend: str, name: str) -> None:
    if backend != spec.backends[0]:
        pytest.skip("modules call the function, which the other test compiles on each backend")
    case = example(spec)
    torch._dynamo.reset()
    module = spec.module(backend=backend)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    for value in _schedules(spec)[name]:
        setattr(module, name, value)
        given = compiled(*case.tensors)
        torch.testing.assert_close(given, module(*case.tensors), rtol=1e-5, atol=1e-7)
    assert counter.frame_count <= 2, f"{counter.frame_count} compilations for {VALUES} values"
    torch._dynamo.reset()

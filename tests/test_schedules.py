"""Options that change from step to step under ``torch.compile``: at most two compilations."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
from cases import LOSS_IDS, LOSSES, ONE_A_FAMILY
from every import every, example, gradient
from torch._dynamo.testing import CompileCounterWithBackend

from kdkernels.registry import SPECS, LossSpec

VALUES = 5
LOSSES_BESIDE = [spec for spec in LOSSES if spec not in ONE_A_FAMILY]


def _schedules(spec: LossSpec) -> dict[str, list[float]]:
    """Values of every float option, all in its domain."""
    parameters = inspect.signature(spec.function).parameters.values()
    floats = [p for p in parameters if isinstance(p.default, float)]
    up, down = ([1 + sign * step / 8 for step in range(VALUES)] for sign in (1, -0.5))

    def values(name: str, default: float) -> list[float]:
        high = spec.domains.get(name, (0, math.inf))[1]
        return [default * x for x in (up if default * up[-1] <= high else down)]

    return {p.name: values(p.name, p.default) for p in floats}


def _cases() -> Any:
    """Named backends; of losses of logits one of each family but with the compiled kernels."""

    def here(spec: LossSpec, backend: str | None) -> bool:
        alone = backend == "native" or spec not in LOSSES or spec in ONE_A_FAMILY
        return backend is not None and alone

    grid = [param for param in every().args[1] if here(*param.values)]
    return pytest.mark.parametrize(("spec", "backend"), grid)


# All options change at once: one that is compiled as a constant compiles for every step.


@_cases()
def test_a_schedule_compiles_twice(spec: LossSpec, backend: str) -> None:
    """As arguments of the function."""
    case, schedules = example(spec), _schedules(spec)
    torch._dynamo.reset()
    # What is compiled again is Dynamo's to say; how a family differentiates is one loss's.
    counter = CompileCounterWithBackend("eager" if spec in LOSSES_BESIDE else "aot_eager")
    compiled = torch.compile(case.of, fullgraph=True, backend=counter)
    for step in range(VALUES):
        options: dict[str, Any] = {name: values[step] for name, values in schedules.items()}
        options["backend"] = backend
        given = gradient(lambda x: compiled(x, **options), case.student)  # noqa: B023
        expected = gradient(case.function(**options), case.student)
        torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-7)
    assert counter.frame_count <= 2, f"{counter.frame_count} compilations for {VALUES} values"
    torch._dynamo.reset()


OTHERS = [spec for spec in SPECS.values() if spec not in LOSSES]
"""Whose modules have forward methods of their own."""


@pytest.mark.parametrize("spec", [*ONE_A_FAMILY, *OTHERS], ids=LOSS_IDS)
def test_a_scheduled_module_compiles_twice(spec: LossSpec) -> None:
    """As attributes of the module, which calls the function: on the default backend."""
    case, schedules = example(spec), _schedules(spec)
    torch._dynamo.reset()
    module = spec.module()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    for step in range(VALUES):
        for name, values in schedules.items():
            setattr(module, name, values[step])
        given = compiled(*case.tensors)
        torch.testing.assert_close(given, module(*case.tensors), rtol=1e-5, atol=1e-7)
    assert counter.frame_count <= 2, f"{counter.frame_count} compilations for {VALUES} values"
    torch._dynamo.reset()

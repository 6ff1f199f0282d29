"""Every loss of the registry, of any family, as a function of its first student tensor.

For the tests of what does not depend on a loss's arguments: transforms, recorders, saved tensors.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from cases import LOGIT_FAMILIES, LOSSES, ONE_A_FAMILY
from torch import Tensor

from kdkernels import _dispatch
from kdkernels.registry import SPECS, LossSpec

BACKENDS = ("native", "triton", "reference")
GROUPED = [
    spec
    for spec in SPECS.values()
    if "process_group" in inspect.signature(spec.function).parameters
]
"""Losses of a batch that may lie on several ranks."""


@dataclass
class Example:
    """A loss with inputs; ``tensors`` are its arguments in order, the student first."""

    spec: LossSpec
    tensors: list[Tensor]
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def student(self) -> Tensor:
        return self.tensors[0]

    def of(self, student: Tensor, **options: Any) -> Tensor:
        """The loss of another student."""
        return self.spec.function(student, *self.tensors[1:], **{**self.options, **options})

    def function(self, **options: Any) -> Callable[[Tensor], Tensor]:
        return lambda student: self.of(student, **options)


def example(spec: LossSpec, dtype: torch.dtype = torch.float32, rows: int = 6) -> Example:
    """Inputs that are small and ordinary."""
    generator = torch.Generator().manual_seed(3)
    if spec.inputs is not None:
        return Example(spec, list(spec.inputs(generator, dtype)))
    assert spec.family in LOGIT_FAMILIES
    student, teacher = (torch.randn(rows, 7, generator=generator).to(dtype) for _ in range(2))
    tensors = [student, teacher]
    if spec.needs_target:
        tensors.append(torch.randint(1, 7, (rows,), generator=generator))
    return Example(spec, tensors)


def backends(spec: LossSpec) -> list[str]:
    """Those that the loss has, whether they run here or not."""
    return [name for name in BACKENDS if name in spec.backends]


def every(*, kernels: bool = False) -> pytest.MarkDecorator:
    """Parametrise ``spec, backend``; None is the default choice. ``kernels``: no reference.

    Losses of logits share the operator of their family: interpreted, which is slow, one of them
    stands for all.
    """
    grid = []
    for spec in SPECS.values():
        for backend in (None, *backends(spec)):
            if kernels and (backend == "reference" or len(spec.backends) == 1):
                continue
            if backend == "triton" and spec in LOSSES and spec not in ONE_A_FAMILY:
                continue
            reasons = _dispatch.why_not(spec, backend, torch.empty(0)) if backend else []
            marks = [pytest.mark.skip(reason="; ".join(reasons))] if reasons else []
            name = f"{spec.name}-{backend or 'default'}"
            grid.append(pytest.param(spec, backend, id=name, marks=marks))
    return pytest.mark.parametrize(("spec", "backend"), grid)


def every_spec() -> pytest.MarkDecorator:
    """Parametrise ``spec``."""
    return pytest.mark.parametrize("spec", SPECS.values(), ids=[name for name in SPECS])


def gradient(function: Callable[[Tensor], Tensor], student: Tensor) -> Tensor:
    """The gradient of the loss, or of its sum, in eager reverse mode."""
    leaf = student.detach().clone().requires_grad_()
    (given,) = torch.autograd.grad(function(leaf).sum(), leaf)
    return given

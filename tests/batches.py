"""A small batch for any loss of the registry, and which of its tensors take a gradient."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import pytest
import torch
from cases import LOSSES, ONE_A_FAMILY
from inputs import make
from torch import Tensor

from kdkernels import _dispatch
from kdkernels.registry import SPECS, LossSpec

EVERY = list(SPECS.values())
EMBEDDING = [spec for spec in EVERY if spec.family == "embedding"]
HELD = ("teacher", "centers", "target", "sampled")
"""How the names of constant arguments begin."""


class Call(NamedTuple):
    """One loss on one backend; None is what runs without a request."""

    spec: LossSpec
    backend: str | None

    @property
    def samples(self) -> tuple[Mapping[str, Any], ...]:
        """Of the loss's options; the first where kernels are interpreted."""
        slow = self.backend == "triton" and not torch.cuda.is_available()
        return self.spec.samples[:1] if slow else self.spec.samples

    def __call__(self, *tensors: Tensor, **options: Any) -> Tensor:
        return self.spec.function(*tensors, backend=self.backend, **options)


def calls(
    specs: Iterable[LossSpec] = EVERY, *, interpreted: bool = True, reference: bool = True
) -> pytest.MarkDecorator:
    """Parametrise ``call`` over losses, each on every backend of its own and on none by name.

    As in ``every.py``, one loss of logits of each family is interpreted.
    """
    grid = []
    for spec in specs:
        for backend in (None, *spec.backends):
            another_stands_for_it = spec in LOSSES and spec not in ONE_A_FAMILY
            if backend == "triton" and (another_stands_for_it or not interpreted):
                continue
            if backend == "reference" and not reference:
                continue
            reasons = _dispatch.why_not(spec, backend, torch.empty(0)) if backend else []
            marks = [pytest.mark.skip(reason="; ".join(reasons))] if reasons else []
            grid.append(pytest.param(Call(spec, backend), id=f"{spec.name}-{backend}", marks=marks))
    return pytest.mark.parametrize("call", grid)


def batch(spec: LossSpec, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, ...]:
    """The loss's tensors, in the order of its arguments."""
    if spec.inputs is not None:
        return spec.inputs(torch.Generator().manual_seed(seed), dtype)[: len(names(spec))]
    student, teacher, target = make("gaussian", 4, 5, dtype=dtype, seed=seed)
    return (student / 3, teacher / 3, *((target,) if spec.needs_target else ()))


def names(spec: LossSpec) -> list[str]:
    """The arguments that ``batch`` fills."""
    parameters = inspect.signature(spec.function).parameters.values()
    needed = [p.name for p in parameters if p.default is p.empty]
    return [*needed, "target"] if spec.needs_target and "target" not in needed else needed


@functools.cache
def leaves(spec: LossSpec) -> int:
    """How many leading arguments take a gradient."""
    return sum(not name.startswith(HELD) for name in names(spec))


def graded(
    function: Callable[..., Tensor], spec: LossSpec, tensors: Iterable[Tensor], **options: Any
) -> tuple[Tensor, ...]:
    """The loss and its gradients."""
    tensors = tuple(tensors)
    count = leaves(spec)
    students = [x.detach().clone().requires_grad_() for x in tensors[:count]]
    loss = function(*students, *tensors[count:], **options)
    return (loss.detach(), *torch.autograd.grad(loss.sum(), students))

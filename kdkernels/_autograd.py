"""Autograd around the kernels, once for all losses.

For a scalar loss the forward pass also computes the gradient, while the rows are in cache, and
keeps it privately; the first backward pass scales it by the upstream scalar and gives it away, so a
step moves each byte once and allocates one gradient. A second backward pass (``retain_graph=True``)
recomputes it. ``float16`` and ``reduction='none'`` compute the gradient in the backward pass
instead (see ``_ops.stores_gradient``).

Eager calls take a lean ``autograd.Function``; where something traces (``_ops.traced``:
``torch.compile``, fake tensors) the operators of ``_ops`` are called, which it sees through.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._ops import no_double_backward, operator_name, stores_gradient, traced


class Kernels(NamedTuple):
    """One family's kernels on one backend, called with the arguments of its operator schema."""

    forward: Callable[..., tuple[Tensor, Tensor | None]]
    backward: Callable[..., Tensor]
    scale_: Callable[[Tensor, Tensor], Tensor]


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, kernels: Kernels, args: Any) -> Tensor:
        ctx.stored = stored = stores_gradient(student, args[-1])
        loss, gradient = kernels.forward(student, teacher, *args, stored)
        ctx.gradient = gradient if stored else None
        ctx.kernels = kernels
        ctx.args = args
        ctx.save_for_backward(student, teacher)
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        kernels = ctx.kernels
        if ctx.stored:
            gradient, ctx.gradient = ctx.gradient, None
            if gradient is None:
                gradient = kernels.forward(*ctx.saved_tensors, *ctx.args, True)[1]
            gradient = kernels.scale_(gradient, upstream)
        else:
            gradient = kernels.backward(upstream, *ctx.saved_tensors, *ctx.args)
        if torch.is_grad_enabled():  # create_graph=True: to differentiate again must not be silent
            gradient = _apply_once(gradient, upstream, ctx.saved_tensors[0])
        return gradient, None, None, None


# Typed: torch leaves `apply` untyped.
_apply_transformed: Callable[..., Tensor] = _Fused.apply
# `Function.apply` without its preparation for functorch transforms, a tenth of a small loss's time.
_apply_fused: Callable[..., Tensor] = super(torch.autograd.Function, _Fused).apply


class _Once(torch.autograd.Function):
    """Passes a gradient through and raises if it is differentiated."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, upstream: Tensor, student: Tensor) -> Tensor:
        return gradient

    backward = staticmethod(no_double_backward)


_apply_once: Callable[..., Tensor] = _Once.apply

_loaded: dict[tuple[str, str], Kernels] = {}


def apply(backend: str, family: str, student: Tensor, teacher: Tensor, *args: Any) -> Tensor:
    """Run a family's kernels with autograd; ``args`` are those of its schema after the logits."""
    needs_grad = student.requires_grad and torch.is_grad_enabled()
    if traced(student, teacher):
        operator = getattr(torch.ops.kdkernels, operator_name(backend, family)).default
        store = needs_grad and stores_gradient(student, args[-1])
        return operator(student, teacher, *args, store)[0]
    kernels = _loaded.get((backend, family))
    if kernels is None:
        kernels = _loaded[backend, family] = _load(backend, family)
    if needs_grad:
        if torch._C._are_functorch_transforms_active():
            return _apply_transformed(student, teacher, kernels, args)
        return _apply_fused(student, teacher, kernels, args)
    return kernels.forward(student, teacher, *args, False)[0]


def _load(backend: str, family: str) -> Kernels:
    if backend == "triton":
        from . import triton

        forward, backward = getattr(triton, family), getattr(triton, f"{family}_backward")
        return Kernels(forward, backward, triton.scale_)
    from . import native

    backward = getattr(torch.ops.kdkernels, f"{family}_backward").default
    return Kernels(getattr(native, family), backward, native.scale_)

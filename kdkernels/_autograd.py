"""Autograd around the kernels, once for all families.

For a scalar loss the forward pass also computes the gradient, while the rows are in cache, and
keeps it privately; the first backward pass scales it by the upstream scalar and gives it away, so a
step moves each byte once and allocates one gradient. A second backward pass (``retain_graph=True``)
recomputes it. ``float16`` and ``reduction='none'`` compute the gradient in the backward pass
instead (see ``stores_gradient``).

Eager calls take a lean ``autograd.Function``; where something traces (``_tracing.traced``:
``torch.compile``, fake tensors, recorders) the operators of ``_ops`` are called, which it sees
through. Transforms and forward-mode derivatives never come here: ``_dispatch.choose`` gives them
the reference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._backends import Kernels, kernels as kernels_of
from ._calls import traceable
from ._ops import once, operator
from ._tracing import keepable, traced


def stores_gradient(student: Tensor, reduction: int) -> bool:
    """Whether the forward pass computes the gradient and the backward pass only scales it.

    float16 recomputes instead, because a gradient stored before the loss scale is applied would
    underflow; so does ``reduction='none'``, because the upstream gradient differs by row.
    """
    return reduction != 0 and student.dtype != torch.float16


def save(ctx: Any, tensors: tuple[Tensor | None, ...]) -> None:
    """``save_for_backward``, which sees in-place changes, for all tensors but those of inference
    mode (a cached teacher), which it refuses and which have no version to look at."""
    for tensor in () if torch.compiler.is_compiling() else tensors:  # a compiler cannot ask
        if tensor is not None and tensor.is_inference():
            break
    else:
        ctx.outside = None
        ctx.save_for_backward(*tensors)
        return
    ctx.outside = [x if x is not None and x.is_inference() else None for x in tensors]
    kept = (None if out is not None else x for x, out in zip(tensors, ctx.outside, strict=True))
    ctx.save_for_backward(*kept)


def saved(ctx: Any) -> tuple[Any, ...]:
    if ctx.outside is None:
        return ctx.saved_tensors
    pairs = zip(ctx.saved_tensors, ctx.outside, strict=True)
    return tuple(x if out is None else out for x, out in pairs)


def under_vmap(upstream: Tensor) -> bool:
    """Whether this is a vmap over a backward pass (``is_grads_batched``)."""
    return (
        torch._C._functorch.is_legacy_batchedtensor(upstream)
        or torch._C._are_functorch_transforms_active()
    )


def _forward(
    ctx: Any, student: Tensor, kernels: Kernels, call: Any, constants: tuple[Any, ...]
) -> tuple[Any, ...]:
    """What the kernels give; the gradient is kept, where it is stored."""
    ctx.stored = stored = stores_gradient(student, call.reduction)
    given = kernels.forward(student, *constants, call, stored)
    ctx.gradient = given[1] if stored else None
    ctx.kernels = kernels
    ctx.call = call
    save(ctx, (student, *constants))
    return given


class _Fused(torch.autograd.Function):
    """One student: rows, correlations, composed losses."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, kernels: Kernels, call: Any, *constants: Any) -> Tensor:
        return _forward(ctx, student, kernels, call, constants)[0]

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        kernels, call = ctx.kernels, ctx.call
        batched = under_vmap(upstream)
        tensors: Any = None  # read once at most: checkpoints give them no second time
        if ctx.stored:
            gradient, ctx.gradient = ctx.gradient, None
            if gradient is None:
                tensors = saved(ctx)
                gradient = kernels.forward(*tensors, call, True)[1]
            if batched:
                gradient = (gradient * upstream).to(gradient.dtype)
            else:
                gradient = kernels.scale_(gradient, upstream)
        elif batched:
            tensors = saved(ctx)
            gradient = _batched_backward(upstream, kernels, call, tensors)
        else:
            tensors = saved(ctx)
            gradient = kernels.backward(upstream, *tensors, call)
        if torch.is_grad_enabled():  # create_graph=True: to differentiate again must not be silent
            gradient = once(gradient, upstream, (tensors or saved(ctx))[0])
        return (gradient, None, None, *(None,) * (len(ctx.needs_input_grad) - 3))


def _batched_backward(upstream: Tensor, kernels: Kernels, call: Any, saved: Any) -> Tensor:
    """The gradient for each of a batch of upstream gradients, which no kernel takes: computed once
    in the working dtype for an upstream of 1, then multiplied."""
    student = saved[0]
    ones = torch.ones(upstream.shape, dtype=upstream.dtype, device=upstream.device)
    wide = student if student.dtype == torch.float64 else student.float()
    gradient = kernels.backward(ones, wide, *saved[1:], call)
    if call.reduction == 0:
        upstream = upstream.unsqueeze(call.class_dim)
    return (gradient * upstream).to(student.dtype)


# Typed: torch leaves `apply` untyped. Without `Function.apply`'s own preparation for functorch
# transforms, a tenth of a small loss's time, because those never come here.
_apply_fused: Callable[..., Tensor] = super(torch.autograd.Function, _Fused).apply


class _FusedWithParts(_Fused):
    """Likewise, with the parts of the loss."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, student: Tensor, kernels: Kernels, call: Any, *constants: Any
    ) -> tuple[Tensor, Tensor]:
        loss, _, parts = _forward(ctx, student, kernels, call, constants)
        ctx.mark_non_differentiable(parts)
        return loss, parts

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Any) -> tuple[Any, ...]:  # type: ignore[override]
        return _Fused.backward(ctx, upstream)


_apply_with_parts: Callable[..., Any] = super(torch.autograd.Function, _FusedWithParts).apply


class _FusedSeveral(torch.autograd.Function):
    """Several students, each with a gradient of its own that may not be wanted (IE-KD)."""

    @staticmethod
    def forward(ctx: Any, count: int, kernels: Kernels, call: Any, *tensors: Any) -> Tensor:
        needs = tuple(ctx.needs_input_grad[3 : 3 + count])
        students = tensors[:count]
        ctx.stored = stored = all(stores_gradient(x, call.reduction) for x in students)
        wanted = needs if stored else (False,) * count
        loss, *gradients = kernels.forward(*tensors, call, *wanted)
        ctx.gradients = gradients if stored else None
        ctx.needs = needs
        ctx.kernels = kernels
        ctx.call = call
        save(ctx, tensors)
        return loss  # type: ignore[return-value]

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        kernels, call, needs = ctx.kernels, ctx.call, ctx.needs
        batched = under_vmap(upstream)
        tensors: Any = None
        if ctx.stored or batched:
            gradients, ctx.gradients = ctx.gradients, None
            if gradients is None:
                tensors = saved(ctx)
                gradients = kernels.forward(*tensors, call, *needs)[1:]
            if batched:
                gradients = [(g * upstream).to(g.dtype) for g in gradients]
            else:
                scaled = (kernels.scale_(g, upstream) if g.numel() else g for g in gradients)
                gradients = list(scaled)
        else:
            tensors = saved(ctx)
            gradients = kernels.backward(upstream, *tensors, call, *needs)
        if torch.is_grad_enabled():
            pairs = zip(gradients, tensors or saved(ctx), strict=False)
            gradients = [once(g, upstream, x) for g, x in pairs]
        others = len(ctx.needs_input_grad) - 3 - len(needs)
        wanted = (g if need else None for g, need in zip(gradients, needs, strict=True))
        return (None, None, None, *wanted, *(None,) * others)


_apply_several: Callable[..., Tensor] = super(torch.autograd.Function, _FusedSeveral).apply


class _BothGradients(torch.autograd.Function):
    """The first loss, with the gradients of both."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, other: Tensor) -> Tensor:
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor]:
        return upstream, upstream


both_gradients: Callable[[Tensor, Tensor], Tensor] = _BothGradients.apply
"""A loss by its student and, with the roles exchanged, by its teacher. A sum that takes the second
value off again would be NaN where it is infinite."""


class _DifferentiableOnce(torch.autograd.Function):
    """A tensor whose gradient raises if it is differentiated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        return once(upstream, upstream, *ctx.saved_tensors)


differentiable_once: Callable[[Tensor], Tensor] = _DifferentiableOnce.apply


def wants_gradient(teacher: Tensor) -> bool:
    """Whether the teacher's gradient is asked for; without ``teacher_grad`` checks have refused."""
    return teacher.requires_grad and torch.is_grad_enabled()


def by_both(loss: Callable[[Tensor, Tensor], Tensor], student: Tensor, teacher: Tensor) -> Tensor:
    """A symmetric loss, with the teacher's gradient where that is asked for."""
    if not wants_gradient(teacher):
        return loss(student, teacher)
    return both_gradients(loss(student, teacher.detach()), loss(teacher, student.detach()))


def apply(backend: str, family: str, student: Tensor, call: Any, *constants: Any) -> Tensor:
    """Run a family's kernels with autograd on one student; ``constants`` are its other tensors."""
    needs_grad = student.requires_grad and torch.is_grad_enabled()
    if traced(student, constants[0]):
        store = needs_grad and stores_gradient(student, call.reduction)
        return call_operator(backend, family, (student,), constants, call, (store,))[0]
    kernels = kernels_of(backend, family)
    if needs_grad:
        return _apply_fused(student, kernels, call, *constants)
    return kernels.forward(student, *constants, call, False)[0]  # type: ignore[return-value]


def apply_with_parts(
    backend: str, family: str, student: Tensor, call: Any, *constants: Any
) -> tuple[Tensor, Tensor]:
    """As ``apply``, of a family that gives the loss's parts too."""
    needs_grad = student.requires_grad and torch.is_grad_enabled()
    if traced(student, constants[0]):
        store = needs_grad and stores_gradient(student, call.reduction)
        given = call_operator(backend, family, (student,), constants, call, (store,))
        return given[0], given[2]
    kernels = kernels_of(backend, family)
    if needs_grad:
        return _apply_with_parts(student, kernels, call, *constants)
    loss, _, parts = kernels.forward(student, *constants, call, False)
    return loss, parts  # type: ignore[return-value]


def apply_several(
    backend: str, family: str, students: tuple[Tensor, ...], call: Any, *constants: Any
) -> Tensor:
    """As ``apply``, with several students."""
    enabled = torch.is_grad_enabled()
    needs = tuple(x.requires_grad and enabled for x in students)
    if traced(*students, *constants):
        stored = all(stores_gradient(x, call.reduction) for x in students)
        wanted = needs if stored else (False,) * len(students)
        return call_operator(backend, family, students, constants, call, wanted)[0]
    kernels = kernels_of(backend, family)
    if any(needs):
        return _apply_several(len(students), kernels, call, *students, *constants)
    return kernels.forward(*students, *constants, call, *needs)[0]  # type: ignore[return-value]


def apply_composed(student: Tensor, kernels: Kernels, call: Any, *constants: Any) -> Tensor:
    """As ``apply``, eagerly, with kernels that are torch operations."""
    if student.requires_grad and torch.is_grad_enabled():
        return _apply_fused(student, kernels, call, *constants)
    return kernels.forward(student, *constants, call, False)[0]  # type: ignore[return-value]


def call_operator(
    backend: str,
    family: str,
    students: tuple[Tensor, ...],
    constants: tuple[Tensor | None, ...],
    call: Any,
    needs: tuple[bool, ...],
) -> tuple[Tensor, ...]:
    """The family's operator; ``needs`` says for which students the gradient is stored."""
    call = traceable(call)
    if not any(needs) and torch.is_grad_enabled() and any([x.requires_grad for x in students]):
        constants = tuple([None if x is None else keepable(x) for x in constants])  # read again
    return operator(backend, family)(*students, *constants, *call, *needs)

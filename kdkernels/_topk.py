"""Rows of logits against K ids each, on the backend of one's choice (``reference/topk.py``).

``differentiable`` is for autograd. ``rows_of`` and ``gradient_of`` are its two halves, for those
who call them from a backward pass of their own; the gradient may be written over the logits.

The logits are (rows, V) and contiguous; those without autograd on compiled kernels may have a gap
between the rows. The ids are int64 and contiguous, ``NO_ID`` marks an absent
entry. The compiled kernels raise for an id that is out of range or twice in a row; Triton's give a
row of NaN, because the host would have to wait.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _checks
from ._autograd import apply, apply_with_parts, stores_gradient
from ._calls import NO_ID, TOPK, TOPK_LOSS, TopKCall, TopKLossCall, traceable
from ._ops import once, operator
from ._ops_topk import ENTROPY as ENTROPY, HARD as HARD, NUMBERS as NUMBERS, dtype_of
from ._tracing import keepable, traced
from .reference import topk as reference


def marked(ids: Tensor, absent: Tensor) -> Tensor:
    """The ids as the kernels take them; one that merely equals ``NO_ID`` is out of range."""
    return torch.where(absent, NO_ID, ids.long().clamp(min=NO_ID + 1)).contiguous()


def check_ids(ids: Tensor, counts: Tensor | None, classes: int) -> None:
    """Check the ids of a CPU tensor (reads the data); ``counts`` are the rows that count."""
    present = ids != NO_ID
    if counts is not None:
        present = present & counts.unsqueeze(-1)
    bad = ((ids < 0) | (ids >= classes)) & present
    if bad.any():
        raise _checks.fail("teacher_ids", f"in [0, {classes})", int(ids[bad][0]))
    ordered = torch.where(present, ids, -1).sort(-1).values
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    if twice.any():
        got = f"{int(ordered[:, 1:][twice][0])} twice"
        raise _checks.fail("teacher_ids", "different within a row", got)


def differentiable(
    backend: str,
    student: Tensor,
    ids: Tensor,
    target: Tensor | None,
    row_temperature: Tensor | None,
    call: TopKCall,
) -> tuple[Tensor, Tensor]:
    """The small logits (rows, K + 1) and the numbers (6, rows) with autograd."""
    if backend == "reference":
        return _reference(student, ids, target, row_temperature, call)
    needs_grad = student.requires_grad and torch.is_grad_enabled()
    if needs_grad and target is not None:
        target = keepable(target)
    if not traced(student, ids):
        return _apply(backend, call, student, ids, target, row_temperature)
    return operator(backend, TOPK.name)(student, ids, target, row_temperature, *traceable(call))


class _Eager(torch.autograd.Function):
    """The operators without what compilers need of them, a fifth of a millisecond."""

    @staticmethod
    def forward(ctx: Any, backend: str, call: TopKCall, *tensors: Any) -> tuple[Tensor, Tensor]:
        with torch._C._AutoDispatchBelowADInplaceOrView():
            made: tuple[Tensor, Tensor] = operator(backend, TOPK.name)(*tensors, *call)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *made)
        ctx.backend, ctx.call = backend, call
        return made

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, of_rows: Tensor | None) -> tuple[Any, ...]:
        *tensors, small, numbers = ctx.saved_tensors
        hard = of_rows[HARD].contiguous() if ctx.call.hard and of_rows is not None else None
        g = torch.zeros_like(small) if g is None else g.contiguous()
        run = operator(ctx.backend, TOPK.name, "_gradient")
        with torch._C._AutoDispatchBelowADInplaceOrView():
            made = run(small, numbers, g, hard, *tensors, *ctx.call)
        if torch.is_grad_enabled():
            made = once(made, g, tensors[0])
        return None, None, made, None, None, None


_apply: Callable[..., tuple[Tensor, Tensor]] = super(torch.autograd.Function, _Eager).apply


def at_once(student: Tensor, ids: Tensor, reduction: int) -> bool:
    """Whether ``loss_at_once`` may be called: nobody looks on, and the gradient may be computed in
    the forward pass."""
    if reduction == 0 or traced(student, ids) or student.is_neg() or student.data_ptr() == 0:
        return False
    needs_grad = student.requires_grad and torch.is_grad_enabled()
    return not needs_grad or stores_gradient(student, reduction)


def loss_at_once(
    student: Tensor,
    ids: Tensor,
    buckets: Tensor,
    of_rows: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    call: TopKLossCall,
) -> tuple[Tensor, Tensor | None]:
    """The reduced loss by compiled kernels that compute the gradient in the forward pass, and its
    parts by row.

    ``buckets`` are the teacher's small logits in the working dtype; ``of_rows`` are the target, the
    weights of the divergences and of the cross-entropies, and the temperatures.
    """
    target, *others = of_rows
    numbers = [None if x is None else x.reshape(-1).to(buckets.dtype).contiguous() for x in others]
    constants = (ids, buckets, target, *numbers)
    if call.dense.parts:
        return apply_with_parts("native", TOPK_LOSS, student, call, *constants)
    return apply("native", TOPK_LOSS, student, call, *constants), None


def rows_of(
    backend: str,
    student: Tensor,
    ids: Tensor,
    target: Tensor | None,
    row_temperature: Tensor | None,
    call: TopKCall,
) -> tuple[Tensor, Tensor]:
    """Likewise without autograd: what ``gradient_of`` needs of the forward pass."""
    with torch.no_grad():
        return differentiable(backend, student, ids, target, row_temperature, call)


def gradient_of(
    backend: str,
    student: Tensor,
    ids: Tensor,
    target: Tensor | None,
    row_temperature: Tensor | None,
    small: Tensor,
    of_rows: Tensor,
    small_upstream: Tensor,
    hard_upstream: Tensor | None,
    call: TopKCall,
    into: Tensor | None = None,
) -> Tensor:
    """The gradient by the logits, in the student's dtype.

    ``small`` and ``of_rows`` are what ``rows_of`` gave, the upstream gradients those by ``small``
    and by the cross-entropies ``of_rows[HARD]``. ``into`` is where the gradient is written; it may
    be the logits themselves.
    """
    gradient = torch.empty_like(student) if into is None else into
    if backend == "reference":
        leaf = student.detach().requires_grad_()
        with torch.enable_grad():
            again, numbers = _reference(leaf, ids, target, row_temperature, call)
        made, upstream = [again], [small_upstream]
        if hard_upstream is not None and call.hard:
            made.append(numbers[HARD])
            upstream.append(hard_upstream)
        return gradient.copy_(torch.autograd.grad(made, leaf, upstream)[0])
    with torch.no_grad():
        operator(backend, TOPK.name, "_gradient_into")(
            gradient, small, of_rows, small_upstream, hard_upstream, student, ids, target,
            row_temperature, *call,
        )  # fmt: skip
    return gradient


def _reference(
    student: Tensor,
    ids: Tensor,
    target: Tensor | None,
    row_temperature: Tensor | None,
    call: TopKCall,
) -> tuple[Tensor, Tensor]:
    """The specification, with the mask; rows that are ignored are not looked at."""
    student = student.to(dtype_of(student, call))
    present = ids != NO_ID
    heat = call.numbers[0] if row_temperature is None else row_temperature.unsqueeze(-1)
    valid = None
    if target is not None:
        valid = target.long() != call.ignore_index
        target = torch.where(valid, target.long(), 0)
        student = torch.where(valid.unsqueeze(-1), student, 0.0)
        present = present & valid.unsqueeze(-1)
        if isinstance(heat, Tensor):
            heat = torch.where(valid.unsqueeze(-1), heat, 1.0)
    wanted = {"rest": call.rest, "hard": call.hard, "spread": call.entropy}
    small, numbers = reference.rows(student, present, ids, target, heat, **wanted)
    if valid is not None:
        small = torch.where(valid.unsqueeze(-1), small, 0.0)
        numbers = torch.where(valid, numbers, 0.0)
    return small, numbers

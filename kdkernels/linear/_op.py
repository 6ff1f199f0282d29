"""The operator of the fused heads, and autograd around it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._autograd import save, saved, under_vmap
from .._calls import traceable
from .._dtypes import working_dtype
from .._ops import TAGS, library, no_double_backward, once
from ._chunks import empty_gradients
from ._rows import SCHEMA, LinearCall, linear_rows
from ._sharded import Split, sharded_rows

_FIELDS = len(LinearCall._fields)
_TEACHER = 6
"""Where the list of the teacher's tensors stands among the operator's arguments."""


def _fake(
    hidden: Tensor, weight: Tensor, bias: Any, labels: Any, token_weight: Any, hard: Any,
    teacher: list[Tensor], *call_and_needs: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    call = LinearCall(*call_and_needs[:_FIELDS])
    work = working_dtype(hidden, teacher[0])
    count = hidden.shape[0]
    return (
        hidden.new_empty(count, dtype=work),
        hidden.new_empty((3, count) if call.parts else 0, dtype=work),
        *empty_gradients(hidden, weight, call_and_needs[_FIELDS:], working_dtype(hidden)),
    )


library.define(SCHEMA, tags=TAGS)
for _key in ("CPU", "CUDA", "XPU"):
    library.impl("linear_rows", linear_rows, _key)
torch.library.register_fake("kdkernels::linear_rows", _fake, lib=library)
torch.library.register_autograd("kdkernels::linear_rows", no_double_backward, lib=library)


def _evaluate(
    call: LinearCall,
    shards: Split | None,
    tensors: tuple[Any, ...],
    teacher: tuple[Tensor, ...],
    needs: tuple[bool, ...],
) -> tuple[Any, ...]:
    """The operator, which knows no process group, or what it is over shards of the classes."""
    if shards is not None:
        with torch.no_grad():
            return sharded_rows(shards, call, tensors, list(teacher), needs)
    given: tuple[Any, ...] = torch.ops.kdkernels.linear_rows.default(
        *tensors, list(teacher), *call, *needs
    )
    return given


class _Linear(torch.autograd.Function):
    """The rows' values, or their sum with gradients that are stored.

    ``by_row``, and float16, of which a small weight leaves little before a loss scale comes,
    recompute the logits in the backward pass, where the upstream gradients are known.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor | None,
        token_weight: Tensor | None,
        hard_token_weight: Tensor | None,
        by_row: bool,
        call: LinearCall,
        shards: Split | None,
        *teacher: Tensor,
    ) -> tuple[Tensor, Tensor]:
        ctx.needs = tuple(ctx.needs_input_grad[:3])
        ctx.by_row, ctx.call, ctx.shards = by_row, call, shards
        tensors = (hidden, weight, bias, labels, token_weight, hard_token_weight)
        ctx.stored = not by_row and hidden.dtype != torch.float16
        needs = ctx.needs if ctx.stored else (False,) * 3
        values, parts, *gradients = _evaluate(call, shards, tensors, teacher, needs)
        ctx.gradients = gradients if ctx.stored else None
        ctx.dtypes = [None if x is None else x.dtype for x in tensors[:3]]
        save(ctx, (*tensors, *teacher))
        ctx.mark_non_differentiable(parts)
        return (values if by_row else values.sum()), parts

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Any) -> tuple[Any, ...]:
        if not torch.compiler.is_compiling() and under_vmap(upstream):
            raise NotImplementedError(
                "is_grads_batched must be False for a fused head, got True: use backend='reference'"
            )
        gradients, ctx.gradients = ctx.gradients, None
        tensors: Any = None  # read once at most: checkpoints give them no second time
        if gradients is None:
            tensors = saved(ctx)
            *given, token_weight, hard_token_weight = tensors[:_TEACHER]
            weights, call = [token_weight, hard_token_weight], ctx.call
            if not ctx.stored:
                rows = upstream if ctx.by_row else upstream.expand(given[0].shape[0])
                weights = [rows if x is None else x * rows for x in weights]
                call = call._replace(parts=False)
            teacher = tensors[_TEACHER:]
            gradients = _evaluate(call, ctx.shards, (*given, *weights), teacher, ctx.needs)[2:]
        made: list[Any] = [None] * 3
        for i, (g, dtype) in enumerate(zip(gradients, ctx.dtypes, strict=True)):
            if not ctx.needs[i]:
                continue
            if ctx.stored:
                g = _scaled(g, upstream)
            g = g.to(dtype)
            if torch.is_grad_enabled():  # to differentiate again must not be silent
                tensors = tensors or saved(ctx)
                g = once(g, upstream, tensors[i])
            made[i] = g
        return (*made, *(None,) * (len(ctx.needs_input_grad) - 3))


def _scaled(gradient: Tensor, upstream: Tensor) -> Tensor:
    """A private gradient times a number; the host reads it on the CPU only."""
    if torch.compiler.is_compiling():
        return gradient * upstream.to(gradient.dtype)
    if upstream.is_cpu and upstream.item() == 1.0:
        return gradient
    return gradient.mul_(upstream)


def apply(
    call: LinearCall, by_row: bool, shards: Split | None, *tensors: Any
) -> tuple[Tensor, Tensor]:
    """The rows' losses or their sum, and the parts of the rows."""
    call = traceable(call)
    hidden, weight, bias, *of_rows, teacher = tensors
    students = [hidden, weight, bias]
    if not torch.is_grad_enabled():  # autograd would say what requires grad, not what is wanted
        students = [None if x is None else x.detach() for x in students]
    return _apply(*students, *of_rows, by_row, call, shards, *teacher)


_apply: Callable[..., tuple[Tensor, Tensor]] = _Linear.apply

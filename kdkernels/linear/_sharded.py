"""Output layers whose classes lie on the ranks of a process group: the rows of chunks, and what
ranks exchange for them.

Each rank has some rows of the weight, and all hidden states. Its chunk of logits is its classes',
of which ``_sharded.evaluate`` makes the loss of all classes; the products with the rank's weight
give its part of the hidden states' gradient, and one sum over the ranks the whole.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _group, _reduce, _topk
from .._calls import TopKCall
from .._checked import Checked
from .._dtypes import working_dtype
from .._head import Head
from .._rowrun import check_range
from .._shard_rows import BY_CHAIN, Rows as ShardRows
from .._sharded import evaluate
from .._shards import Shards, agree
from ..registry import LossSpec
from ._chunks import Gradients, Rows, default_tokens, rows_at
from ._rows import LinearCall


class Split(NamedTuple):
    """What a loss over shards is, besides its call."""

    shards: Shards
    spec: LossSpec
    options: tuple[Any, ...]
    backend: str | None


def check(group: Any, *tensors: Any) -> bool:
    """Check ``tp_group``; whether there are shards."""
    if group is None:
        return False
    _group.check_call(group, *tensors, name="tp_group")
    return bool(group.size() > 1)


def needs_of(*tensors: Tensor | None) -> int:
    """Which gradients are wanted, as ranks must agree: any, and that of the hidden states."""
    enabled = torch.is_grad_enabled()
    needs = [enabled and x is not None and x.requires_grad for x in tensors]
    return int(any(needs)) + 2 * int(needs[0])


def split(
    group: Any,
    spec: LossSpec,
    options: tuple[Any, ...],
    backend: str | None,
    call: LinearCall,
    said: tuple[Any, ...],
    students: tuple[Tensor, Tensor, Tensor | None],
    labels: Tensor | None,
    teacher: list[Tensor],
) -> tuple[Split, LinearCall]:
    """What all ranks agree on; raises on all where they do not, or labels or ids are no classes."""
    hidden, weight, _ = students
    sparse = call.kind.startswith("topk")
    count = hidden.shape[:-1].numel()
    counted = None if labels is None else labels.reshape(-1) != call.ignore_index
    if counted is not None:
        count = int(counted.sum())
    widths = [hidden.shape[-1], teacher[1].shape[-1] if sparse else 0]
    kinds = [hidden.dtype, teacher[0].dtype, *widths]
    said = (*said, spec.name, options, kinds, call._replace(backend="", rule="", symbolic=None))
    dtype, needs = working_dtype(hidden, teacher[0]), needs_of(*students)
    shards = agree(
        group, said, count, weight.shape[0], dtype, needs, hidden.device, "student_weight"
    )
    if labels is not None and call.numbers[2] != 0.0:
        check_range(labels, shards.classes, call.ignore_index)
    if sparse and hidden.is_cpu:
        _topk.check_ids(teacher[1], counted, shards.classes)
    if not call.tokens:
        wide = torch.float64  # as which losses that are no KL see their chunk
        dtypes = [hidden.dtype, *([] if sparse else [teacher[0].dtype])]
        if not sparse and spec.name not in BY_CHAIN:
            dtypes = [wide, wide]
        tokens = default_tokens(hidden.device, max(shards.sizes), *dtypes)
        call = call._replace(tokens=tokens)
    return Split(shards, spec, options, backend), call


def sharded_rows(
    how: Split,
    call: LinearCall,
    tensors: tuple[Any, ...],
    teacher: list[Tensor],
    needs: tuple[bool, ...],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As ``_rows.linear_rows``, of the classes of all ranks."""
    hidden, weight, bias, labels, token_weight, hard_token_weight = tensors
    head = Head(weight, bias, *call.head[:2])
    made: Tensor | None = None
    if call.kind == "linear":
        made, of_teacher = teacher[0], Head(teacher[1], (*teacher[2:], None)[0], *call.head[2:])
    count, vocab = hidden.shape[0], weight.shape[0]
    work = working_dtype(hidden, teacher[0])
    rows = Rows(count, labels, call.ignore_index, call.tokens)
    values = hidden.new_zeros(count, dtype=work)
    parts = hidden.new_zeros((3, count) if call.parts else 0, dtype=work)
    gradients = Gradients(hidden, head, needs)  # type: ignore[arg-type]
    student_logits = hidden.new_empty(rows.tokens, vocab)
    _, scale, hard = call.numbers[:3]

    def of_rows(x: Tensor | None, at: Any) -> Tensor | None:
        return None if x is None else x[at].contiguous()

    for at in rows:
        h = rows_at(hidden, at)
        z = head.logits(h, student_logits[: h.shape[0]])
        target = of_rows(labels, at) if hard != 0.0 else None
        if made is not None:
            known = [of_teacher.logits(rows_at(made, at))]
        else:
            known = [rows_at(x, at) for x in teacher]
        leaf = z.detach().requires_grad_(any(needs))
        with torch.set_grad_enabled(any(needs)):
            soft, hard_values, spread = _chunk(how, call, leaf, known, target)
            soft = _reduce.weigh(soft, scale, of_rows(token_weight, at), None)
            hard_values = _reduce.weigh(hard_values, hard, of_rows(hard_token_weight, at), None)
            total = soft + hard_values
            summed = total.sum()
        values[at] = total.detach()
        if call.parts:
            parts[:, at] = torch.stack([soft.detach(), hard_values.detach(), spread])
        if any(needs):
            (gradient,) = torch.autograd.grad(summed, leaf)
            del soft, hard_values, total, summed
            if head.softcap:
                head.through_softcap_(gradient, z)
            gradients.add(gradient, h, at)
    whole, *own = gradients.result()
    if needs[0]:
        whole = _group.total(whole.contiguous(), how.shards.group)
    return values, parts, whole, own[0], own[1]


def _chunk(
    how: Split, call: LinearCall, student: Tensor, teacher: list[Tensor], target: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Divergences, cross-entropies and entropies of a chunk's rows, which all count."""
    temperature, _, hard = call.numbers[:3]
    rows = Checked(
        how.spec, how.backend, how.options, student, student.detach(), target, hard=hard,
        temperature=temperature, parts=call.parts, ignore_index=call.ignore_index,
    )  # fmt: skip
    if not call.kind.startswith("topk"):
        return evaluate(how.shards, rows._replace(teacher=teacher[0]))[:3]
    buckets, ids, *own_weight = teacher
    of_shards = ShardRows(how.shards, rows)
    wide = buckets.dtype == torch.float64
    of_ids = TopKCall(
        [temperature], None, wide, call.kind == "topk", False, False, call.ignore_index
    )
    small = of_shards.small(ids, None, of_ids, None)
    values = of_shards.run(how.spec, how.options, small, buckets, 0)
    for factor in own_weight:
        values = _reduce.weigh(values, 1.0, factor, None)
    return values, *of_shards.beside(rows, values)

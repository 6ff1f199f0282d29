"""The rows of a fused head: chunks of logits, the row kernels, gradients back through it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _checks
from .._backends import kernels as kernels_of
from .._calls import RowCall, numbers_of
from .._dtypes import working_dtype
from .._head import Head
from ._chunks import Gradients, Rows, as_rows, default_tokens, rows_at
from ._sparse import rows as sparse_rows


class LinearCall(NamedTuple):
    """What a call consists of besides its tensors."""

    backend: str
    kind: str
    """Of the teacher: ``logits``; ``linear``, hidden states and a head; ``topk``, the logits of
    buckets, marked ids and maybe a weight of each row, without the rest as ``topk_alone``. The
    first of its tensors has the dtype of its logits."""
    rule: str
    numbers: Sequence[float]
    """As in ``_calls.RowCall``."""
    symbolic: Tensor | None
    head: Sequence[float]
    """softcap (0: none) and scale of the student's logits, then of the teacher's."""
    ignore_index: int
    tokens: int
    """Of a chunk; 0 leaves it to us."""
    parts: bool


TENSORS = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor? labels, Tensor? token_weight,"
    " Tensor? hard_token_weight, Tensor[] teacher"
)
FIELDS = (
    "str backend, str kind, str rule, float[] numbers, Tensor? symbolic, float[] head,"
    " int ignore_index, int tokens, bool parts"
)
SCHEMA = (
    f"linear_rows({TENSORS}, {FIELDS}, bool need_hidden, bool need_weight, bool need_bias)"
    " -> (Tensor values, Tensor parts, Tensor hidden, Tensor weight, Tensor bias)"
)


def linear_rows(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor | None,
    token_weight: Tensor | None,
    hard_token_weight: Tensor | None,
    teacher: list[Tensor],
    *call_and_needs: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Each row's loss, its parts, and the gradients of the rows' sum.

    ``hidden`` is (N, H), what a row has one number of is (N,). Ignored rows are never read and cost
    no product. Of the logits two chunks exist at a time, and with a softcap three.
    """
    call = LinearCall(*call_and_needs[:-3])
    needs = call_and_needs[-3:]
    head = Head(weight, bias, *call.head[:2])
    numbers = numbers_of(call)
    made: Tensor | None = None
    if call.kind == "linear":
        made, of_teacher = teacher[0], Head(teacher[1], (*teacher[2:], None)[0], *call.head[2:])
    sparse = call.kind.startswith("topk")
    dtype = teacher[0].dtype
    work = working_dtype(hidden, teacher[0])
    count, vocab = hidden.shape[0], weight.shape[0]
    tokens = call.tokens or default_tokens(
        hidden.device, vocab, hidden.dtype, *([] if sparse else [dtype])
    )
    rows = Rows(count, labels, call.ignore_index, tokens)
    values = hidden.new_zeros(count, dtype=work)
    parts = hidden.new_zeros((3, count) if call.parts else 0, dtype=work)
    gradients = Gradients(hidden, head, needs)
    step = RowCall(
        call.rule, numbers, None, False, call.parts, _checks.NO_INDEX, class_dim=1, reduction=0
    )
    row = kernels_of(call.backend, "row")
    student_logits = hidden.new_empty(rows.tokens, vocab)
    filled = made is not None or (rows.index is not None and as_rows(teacher[0]) is not None)
    copied = rows.tokens if filled and not sparse else 0
    teacher_logits = hidden.new_empty(copied, vocab, dtype=dtype)
    # The gradient takes the place of the logits, unless the softcap's derivative needs them.
    apart = torch.empty_like(student_logits) if head.softcap and any(needs) else student_logits

    def of_rows(x: Tensor | None, at: Any) -> Tensor | None:
        return None if x is None else x[at].contiguous()

    for at in rows:
        h = rows_at(hidden, at)
        n = h.shape[0]
        z = head.logits(h, student_logits[:n])
        value: Any
        gradient = apart[:n] if any(needs) else None
        target = of_rows(labels, at) if numbers[2] != 0.0 else None
        weights = (of_rows(token_weight, at), of_rows(hard_token_weight, at))
        if sparse:
            known = [rows_at(x, at) for x in teacher]
            with_rest = call.kind == "topk"
            value, separate = sparse_rows(
                call.backend, row, z, known, with_rest, target, weights, step, gradient
            )
        else:
            if made is None:
                t = rows_at(teacher[0], at, teacher_logits)
            else:
                t = of_teacher.logits(rows_at(made, at), teacher_logits[:n])
            value, _, separate = row.forward(
                z, t, target, *weights, None, step, gradient is not None, gradient
            )
            del t  # before the next chunk takes its place
        values[at] = value
        if separate is not None:
            parts[:, at] = separate
        if gradient is not None:
            if head.softcap:
                head.through_softcap_(gradient, z)
            gradients.add(gradient, h, at)
    return values, parts, *gradients.result()

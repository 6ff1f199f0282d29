"""A sparse teacher's rows of a chunk: the small logits of both sides, the dense kernel on them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _topk
from .._backends import Kernels
from .._calls import RowCall, TopKCall
from ..reference._rows import weighted


def rows(
    backend: str,
    kernels: Kernels,
    logits: Tensor,
    teacher: list[Tensor],
    with_rest: bool,
    target: Tensor | None,
    weights: tuple[Tensor | None, Tensor | None],
    call: RowCall,
    into: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Values of the rows and their parts; the gradient is written ``into``, maybe the logits.

    ``teacher`` are the logits of a chunk's buckets, its marked ids (``losses.topk_kd.buckets``) and
    maybe a weight of each row. ``call`` is that of the dense loss of the logits.
    """
    temperature, scale, hard, *options = call.numbers
    buckets, ids, *own_weight = teacher
    weight, hard_weight = weights
    for own in own_weight:
        weight = own if weight is None else own * weight
    how = TopKCall(
        [temperature], None, buckets.dtype == torch.float64, with_rest, hard != 0.0, call.parts,
        call.ignore_index,
    )  # fmt: skip
    small, numbers = _topk.rows_of(backend, logits, ids, target, None, how)
    step = call._replace(numbers=[1.0, scale, 0.0, *options], parts=False)
    wanted = into is not None
    given: Any = kernels.forward(small, buckets, None, weight, None, None, step, wanted)
    values, through = given[:2]
    hard_values = torch.zeros_like(values)
    hard_upstream = None
    if hard != 0.0:
        hard_upstream = torch.full_like(values, hard)
        if hard_weight is not None:
            hard_upstream = hard_upstream * hard_weight
        hard_values = weighted(numbers[_topk.HARD], hard_upstream)
    parts = torch.stack([values, hard_values, numbers[_topk.ENTROPY]]) if call.parts else None
    if into is not None:
        _topk.gradient_of(
            backend, logits, ids, target, None, small, numbers, through, hard_upstream, how,
            into=into,
        )  # fmt: skip
    return values + hard_values, parts

"""What the functions of an output layer check alike."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _checks
from .._dtensor import any_sharded
from .._rowrun import check_range
from .._rowwise import indices
from .._tracing import keepable, traced
from ..registry import LossSpec


def as_linear_casts(*tensors: Any) -> tuple[Any, ...]:
    """Hidden states, weight and bias as ``torch.nn.functional.linear`` sees them: autocast."""
    first = tensors[0]
    if not isinstance(first, Tensor) or not torch.is_autocast_enabled(first.device.type):
        return tensors
    dtype = torch.get_autocast_dtype(first.device.type)
    return tuple(
        x.to(dtype)
        if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64
        else x
        for x in tensors
    )


def check_ids(ids: Tensor, classes: int) -> None:
    """Check the values of a CPU's ids; on a GPU the host would have to wait."""
    if ids.is_cpu and not traced(ids):
        bad = (ids.long() < 0) | (ids.long() >= classes)
        if bad.any():
            raise _checks.fail("ids", f"in [0, {classes})", int(ids[bad][0]))


def plain_rows(names: tuple[str, ...], tensors: tuple[Any, ...]) -> None:
    """Check that all are plain tensors with memory, the first of two dimensions at least."""
    for name, x in zip(names, tensors, strict=True):
        if x is None and name != names[0]:
            continue
        _checks.tensor(name, x)
        if any_sharded(x):
            raise _checks.fail_type(name, "a plain Tensor (call .full_tensor() on it)", "a DTensor")
        _checks.allocated(name, x)
    if tensors[0].dim() < 2:
        got = f"shape {tuple(tensors[0].shape)}"
        raise _checks.fail(names[0], "(..., H) of at least two dimensions", got)


def chunk(tokens: Any) -> int:
    """``chunk_tokens``: a number of tokens, 0 where none is given."""
    return 0 if tokens is None else _checks.at_least_one("chunk_tokens", tokens)


def label_indices(
    spec: LossSpec,
    labels: Any,
    hidden: Tensor,
    classes: int | None,
    ignore_index: int | None,
    read: bool,
) -> tuple[Tensor | None, int]:
    """The labels as int64, and which are ignored; None where none is and nothing reads them.

    Their range is not checked where the number of classes is not known, as of shards.
    """
    if labels is None:
        if read:
            raise _checks.fail_type("labels", "a Tensor of class indices", "None")
        return None, _checks.NO_INDEX if ignore_index is None else ignore_index
    labels, index = indices(spec, hidden, labels, hidden.dim() - 1, ignore_index, not read)
    if read and classes is not None:
        check_range(labels, classes, index)
    return (None if labels is None else labels.long()), index


def row_weights(
    loss_weight: Any, token_weight: Tensor | None, hidden: Tensor, work: torch.dtype, hard: float
) -> tuple[float, Tensor | None, Tensor | None]:
    """The number that multiplies the divergence, and the weights of its rows and of the
    cross-entropy's; a weight that is a tensor joins the former."""
    if token_weight is not None:
        _checks.token_weight(token_weight, hidden, hidden.dim() - 1)
        token_weight = keepable(token_weight).to(work)
    hard_token_weight = token_weight if hard != 0.0 else None
    if not isinstance(loss_weight, Tensor):
        return _checks.number("loss_weight", loss_weight), token_weight, hard_token_weight
    _checks.weight(loss_weight)
    _checks.constant("loss_weight", loss_weight)
    factor = _checks.on_device("loss_weight", loss_weight, hidden.device).to(hidden.device, work)
    if token_weight is None:
        return 1.0, factor.expand(hidden.shape[:-1]), hard_token_weight
    return 1.0, token_weight * factor, hard_token_weight

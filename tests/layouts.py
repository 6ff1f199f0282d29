"""Layouts in memory that have broken kernels: the same values, lying differently.

A layout takes contiguous logits of shape (``LAYOUT_ROWS``, classes) and lays them out.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

LAYOUT_ROWS = 12
"""Rows that every layout can split into its leading dimensions."""

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {}


def _layout(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    LAYOUTS[function.__name__] = function
    return function


def _inside(x: Tensor, before: int, after: int, fill: float) -> Tensor:
    """The values as columns of a wider allocation whose other elements are ``fill``."""
    rows, classes = x.shape
    base = torch.full((rows, before + classes + after), fill, dtype=x.dtype, device=x.device)
    view = base[:, before : before + classes]
    return view.copy_(x)


@_layout
def contiguous(x: Tensor) -> Tensor:
    return x.contiguous()


@_layout
def transposed(x: Tensor) -> Tensor:
    return x.t().contiguous().t()


@_layout
def sliced_columns(x: Tensor) -> Tensor:
    """``x[:, 1:]``: rows start off any vector's alignment."""
    return _inside(x, 1, 0, 50.0)


@_layout
def wide_rows(x: Tensor) -> Tensor:
    return _inside(x, 0, 9, 50.0)


@_layout
def guard_band(x: Tensor) -> Tensor:
    """NaN on both sides of each row: one element read outside poisons the result."""
    return _inside(x, 3, 5, float("nan"))


@_layout
def every_other_column(x: Tensor) -> Tensor:
    rows, classes = x.shape
    base = torch.full((rows, 2 * classes), float("nan"), dtype=x.dtype, device=x.device)
    return base[:, ::2].copy_(x)


@_layout
def storage_offset(x: Tensor) -> Tensor:
    base = torch.full((x.numel() + 3,), float("nan"), dtype=x.dtype, device=x.device)
    return base[3:].view(x.shape).copy_(x)


@_layout
def expanded_rows(x: Tensor) -> Tensor:
    """Stride 0: every row is the first."""
    return x[:1].clone().expand(x.shape)


@_layout
def expanded_columns(x: Tensor) -> Tensor:
    """Stride 0 along the classes: uniform rows."""
    return x[:, :1].clone().expand(x.shape)


@_layout
def negated(x: Tensor) -> Tensor:
    """The lazy negation of a negated copy: the bytes in memory have the wrong sign."""
    return torch._neg_view(-x.contiguous())


@_layout
def tokens(x: Tensor) -> Tensor:
    return x.reshape(3, 4, -1).contiguous()


@_layout
def tokens_shifted(x: Tensor) -> Tensor:
    """``logits[:, :-1]``: batch and position do not merge into one stride."""
    base = torch.full((3, 5, x.shape[1]), float("nan"), dtype=x.dtype, device=x.device)
    return base[:, :-1].copy_(x.reshape(3, 4, -1))


@_layout
def tokens_sequence_first(x: Tensor) -> Tensor:
    return x.reshape(3, 4, -1).transpose(0, 1).contiguous().transpose(0, 1)


@_layout
def image(x: Tensor) -> Tensor:
    """(N, C, H, W), channels first."""
    return x.reshape(3, 2, 2, -1).permute(0, 3, 1, 2).contiguous()


@_layout
def image_channels_last(x: Tensor) -> Tensor:
    return image(x).contiguous(memory_format=torch.channels_last)


@_layout
def image_cropped(x: Tensor) -> Tensor:
    n, c, h, w = image(x).shape
    base = torch.full((n, c + 1, h + 2, w + 1), float("nan"), dtype=x.dtype, device=x.device)
    return base[:, 1:, 1:-1, 1:].copy_(image(x))


LAYOUT_PAIRS = (
    *((name, name) for name in LAYOUTS),
    ("transposed", "guard_band"),
    ("every_other_column", "contiguous"),
    ("expanded_rows", "contiguous"),
    ("contiguous", "expanded_rows"),
    ("sliced_columns", "storage_offset"),
    ("tokens_shifted", "tokens_sequence_first"),
    ("tokens", "tokens_shifted"),
    ("image", "image_channels_last"),
    ("image_channels_last", "image_cropped"),
)
"""Layouts of student and teacher."""


def class_dim(logits: Tensor) -> int:
    return 1 if logits.dim() in (2, 4) else 2


def target_for(logits: Tensor, target: Tensor) -> Tensor:
    """Shape one index a row as the logits' rows are shaped."""
    shape = list(logits.shape)
    del shape[class_dim(logits)]
    return target.reshape(shape)


def as_rows(logits: Tensor) -> Tensor:
    """(rows, classes), copied where necessary."""
    return logits.movedim(class_dim(logits), -1).flatten(0, -2)


def like_rows(rows: Tensor, logits: Tensor) -> Tensor:
    """(rows, classes) in the shape of ``logits``."""
    dim = class_dim(logits)
    shape = logits.movedim(dim, -1).shape
    return rows.reshape(shape).movedim(-1, dim).contiguous()

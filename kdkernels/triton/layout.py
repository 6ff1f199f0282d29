"""Rows of a strided tensor: every dimension but the classes', as at most two strided levels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Rows(NamedTuple):
    """Row r of each tensor starts at ``r // inner * outer_stride + r % inner * inner_stride``.

    ``strides`` holds (outer, inner, class) of each tensor. ``two_level`` is False where one stride
    is enough; then ``inner`` is not read.
    """

    rows: int
    inner: int
    two_level: bool
    strides: tuple[tuple[int, int, int], ...]


def collapse(shape: Sequence[int], strides: Sequence[Sequence[int]], class_dim: int) -> Rows | None:
    """Merge the row dimensions of tensors of one shape; None if more than two levels remain."""
    rows = 1
    levels: list[tuple[int, tuple[int, ...]]] = []
    for dim, size in enumerate(shape):
        if dim == class_dim:
            continue
        rows *= size
        if size == 1:
            continue
        step = tuple(s[dim] for s in strides)
        if levels and levels[-1][1] == tuple(s * size for s in step):
            levels[-1] = (levels[-1][0] * size, step)
        else:
            levels.append((size, step))
    if len(levels) > 2:
        return None
    none = (0,) * len(strides)
    inner, inner_step = levels[-1] if levels else (1, none)
    outer_step = levels[0][1] if len(levels) == 2 else none
    classes = (s[class_dim] for s in strides)
    return Rows(
        rows, inner, len(levels) == 2, tuple(zip(outer_step, inner_step, classes, strict=True))
    )


def rows_of(class_dim: int, *tensors: Tensor) -> Rows | None:
    """``collapse`` for tensors."""
    return collapse(tensors[0].shape, [t.stride() for t in tensors], class_dim)

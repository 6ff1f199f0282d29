"""Moments of columns, of which each rank of a group has some rows, merged by Chan's formula."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _group
from ._group import ProcessGroup


class Moments(NamedTuple):
    """Of all ranks, float64: the number of rows, and sums of centred squares and products."""

    rows: Tensor
    student: Tensor
    teacher: Tensor
    cross: Tensor


def merged(
    student: Tensor,
    teacher: Tensor,
    over: tuple[int, ...],
    extra: Tensor,
    group: ProcessGroup,
    counted: Tensor | None = None,
) -> tuple[Tensor, Moments]:
    """The sum of ``extra``, 0-d, and the moments over the dimensions ``over``, of all ranks.

    One collective of 5 C + 2 numbers a rank. Only what is this rank's keeps its graph. ``counted``
    says which rows of matrices take part, (rows, 1); the others must be finite, and their gradients
    are left to the caller.
    """
    width = next(size for dim, size in enumerate(student.shape) if dim not in over)
    count = torch.full_like(extra, student.numel() // width, dtype=torch.float64)
    if counted is not None:
        count = counted.sum(dtype=torch.float64)
    first = torch.stack([count, extra.double()])
    own = torch.cat([first, _apply(student, teacher, over, count, counted).flatten()])
    ranks = _group.stacked(own, group)
    counts, extras = ranks[:, 0], ranks[:, 1]
    means, squares = ranks[:, 2:].view(-1, 5, width).split([2, 3], 1)
    total = counts.sum()
    # From the mean of a rank that has rows: columns that are constant stay so, exactly.
    origin = means.detach().index_select(0, (counts > 0).long().argmax(0, keepdim=True))
    apart = torch.where((counts > 0)[:, None, None], means - origin, 0.0)
    weights = counts[:, None, None]
    gaps = apart - (weights * apart).sum(0) / total.clamp(min=1)
    between = torch.stack([gaps[:, 0] ** 2, gaps[:, 1] ** 2, gaps[:, 0] * gaps[:, 1]], 1)
    whole = squares.sum(0) + (weights * between).sum(0)
    return extras.sum(), Moments(total, *whole)


class _Own(torch.autograd.Function):
    """The means of both, and their centred sums of squares and products: (5, C) float64.

    Written out, because autograd would keep and make several times as many tensors of their size.
    """

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, over: Any, count: Tensor, counted: Tensor | None
    ) -> Tensor:
        count = count.clamp(min=1)
        (mean_s, s), (mean_t, t) = (_centred(x, over, count, counted) for x in (student, teacher))
        ctx.save_for_backward(s, t, count)
        ctx.over = over
        product = torch.empty_like(s)
        pairs = (s, s), (t, t), (s, t)
        sums = [torch.mul(x, y, out=product).sum(over).double() for x, y in pairs]
        return torch.stack([mean_s, mean_t, *sums])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        s, t, count = ctx.saved_tensors
        shape = [1 if dim in ctx.over else -1 for dim in range(s.dim())]
        mean, _, square, _, cross = (x.to(s.dtype).view(shape) for x in upstream)
        gradient = torch.addcmul(mean / count, s, 2 * square)
        return gradient.addcmul_(t, cross), None, None, None, None


_apply: Callable[..., Tensor] = _Own.apply


def _centred(
    x: Tensor, over: tuple[int, ...], count: Tensor, counted: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The means of the columns, float64, and the values less their means; 0 for what is ignored."""
    if x.numel() == 0:
        return x.double().sum(over), x.clone()
    origin = x
    for dim in over:
        origin = origin.narrow(dim, 0, 1)
    if counted is not None:
        origin = x.index_select(0, counted.long().argmax(0))
    # From the first value: a constant column's mean is that constant, its moment exactly 0.
    x = x - origin
    if counted is not None:
        x *= counted
    mean = x.sum(over, keepdim=True) / count
    x -= mean
    if counted is not None:
        x *= counted
    return (mean.double() + origin).flatten(), x


def root(squares: Tensor, least: float = 0.0) -> Tensor:
    """The root, and 0 up to ``least``, where its derivative is 0."""
    none = squares <= least
    return torch.where(none, 0.0, torch.where(none, 1.0, squares).sqrt())


def correlation(moments: Moments, eps: float, dtype: torch.dtype) -> Tensor:
    """Pearson correlation of each column; 0 where ``reference.dist`` has a norm of 0 in ``dtype``.

    The merged moments are float64 and underflow later than the values whose gradients they scale.
    """
    least = 1024 * torch.finfo(dtype).tiny
    norms = root(moments.student, least) * root(moments.teacher, least) + eps
    none = norms < least
    return torch.where(none, 0.0, moments.cross / torch.where(none, 1.0, norms))

"""Shards of the classes on the ranks of a process group: what ranks agree on before they exchange
numbers of rows, and which rank has which class."""

from __future__ import annotations

import zlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _checks, _group, _topk
from ._calls import NO_ID

_FIELDS = ("rows", "classes", "working dtype (bytes)", "gradient", "loss and options")


class Shards(NamedTuple):
    """How many classes each rank has."""

    group: Any
    rank: int
    sizes: list[int]

    @property
    def classes(self) -> int:
        return sum(self.sizes)

    @property
    def begin(self) -> int:
        """The first class of this rank."""
        return sum(self.sizes[: self.rank])

    def owner(self, index: Tensor) -> Tensor:
        """The rank that has a class, (rows,)."""
        ends = torch.tensor(self.sizes, device=index.device).cumsum(0)
        return torch.searchsorted(ends, index.contiguous(), right=True).clamp(max=len(ends) - 1)

    def own(self, ids: Tensor) -> Tensor:
        """Global ids as this rank's, ``NO_ID`` where they are absent or another rank's."""
        local = ids - self.begin
        foreign = (local < 0) | (local >= self.sizes[self.rank])
        return _topk.marked(local, foreign | (ids == NO_ID))

    def unknown(self, ids: Tensor) -> Tensor:
        """Which ids no rank has; an absent one is none."""
        return ((ids < 0) | (ids >= self.classes)) & (ids != NO_ID)

    def tell(self, own: Tensor) -> Tensor:
        """(ranks, ...) of every rank, of which this rank's keeps its graph."""
        flat = _group.stacked(own.flatten(), self.group)
        return flat.view(len(self.sizes), *own.shape)

    def among(self, own: Tensor) -> Tensor:
        """(rows,) of this rank in its column of (rows, ranks), of which a sum makes all ranks'."""
        mine = torch.arange(len(self.sizes), device=own.device) == self.rank
        return torch.where(mine, own.unsqueeze(-1), 0.0)


def agree(
    group: Any,
    said: Any,
    rows: int,
    own: int,
    dtype: torch.dtype,
    needs: int,
    device: torch.device,
    name: str = "student_logits",
) -> Shards:
    """The shards of all ranks; raises on all where they do not have the same call.

    ``said`` is what a call consists of besides its tensors, of which a checksum is compared;
    ``needs`` says which gradients are wanted.
    """
    code = zlib.crc32(repr(said).encode())
    mine = [rows, own, dtype.itemsize, needs, code]
    given = _group.stacked(torch.tensor(mine, device=device), group).tolist()
    for i, field in enumerate(_FIELDS):
        there = [x[i] for x in given]
        if field != "classes" and len(set(there)) > 1:
            raise _checks.fail("tp_group", f"given the same {field} on all ranks", there)
    shards = Shards(group, group.rank(), [x[1] for x in given])
    if shards.classes < 2:
        raise _checks.fail(name, _checks.TWO_CLASSES, f"{shards.sizes} on the ranks")
    return shards

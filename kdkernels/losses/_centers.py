"""The classifier that an embedding induces: one centre a class (REFILLED, stage 2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _checks, _embedding

_MATRIX = {2: "(B, D)"}


class ClassCenters:
    """Class centres of a whole data set, accumulated batch by batch, in any order.

    ``update`` adds un-normalised embeddings to sums in float64; ``centers`` returns them
    L2-normalised (num_classes, dim), float32; a class never seen has the zero vector. The division
    by the count that makes a sum a mean is irrelevant after normalisation.
    """

    def __init__(
        self, num_classes: int, dim: int, *, device: torch.device | str | None = None
    ) -> None:
        for name, value in (("num_classes", num_classes), ("dim", dim)):
            if _checks.integer(name, value) < 1:
                raise _checks.fail(name, ">= 1", value)
        self.sums = torch.zeros(num_classes, dim, dtype=torch.float64, device=device)

    @torch.no_grad()
    def update(self, embeddings: Tensor, target: Tensor) -> None:
        """Add (B, dim) embeddings of the classes ``target``, (B,)."""
        _embedding.tensor("embeddings", embeddings, _MATRIX)
        classes, dim = self.sums.shape
        if embeddings.shape[1] != dim:
            raise _checks.fail("embeddings", f"(B, {dim})", f"shape {tuple(embeddings.shape)}")
        _embedding.beside("embeddings", embeddings, self.sums)
        target = _embedding.labels(target, len(embeddings), self.sums.device)
        _embedding.in_range(target, classes)
        self.sums.index_add_(0, target, embeddings.to(self.sums.dtype))

    def centers(self) -> Tensor:
        """The normalised centres so far."""
        return F.normalize(self.sums, dim=1).float()


def class_centers(embeddings: Tensor, target: Tensor, num_classes: int) -> Tensor:
    """L2-normalised class centres of one batch, (num_classes, D); see :class:`ClassCenters`.

    Args:
        embeddings: (B, D), not normalised.
        target: (B,) class indices in [0, num_classes).
        num_classes: rows of the result; a class without a sample has the zero vector.
    """
    _embedding.tensor("embeddings", embeddings, _MATRIX)
    accumulated = ClassCenters(num_classes, embeddings.shape[1], device=embeddings.device)
    accumulated.update(embeddings, target)
    return accumulated.centers()

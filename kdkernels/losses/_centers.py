"""The classifier that an embedding induces: one centre a class (REFILLED, stage 2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _checks, _embedding
from .._dtensor import gathered, none_sharded


class ClassCenters:
    """Class centres of a whole data set, accumulated batch by batch, in any order.

    ``update`` adds un-normalised embeddings to sums in float64; ``centers`` returns them
    L2-normalised (num_classes, dim), float32 (float64 if any embeddings were); a class never seen
    has the zero vector. The division by the count that makes a sum a mean is irrelevant after
    normalisation.
    """

    def __init__(
        self, num_classes: int, dim: int, *, device: torch.device | str | None = None
    ) -> None:
        for name, value in (("num_classes", num_classes), ("dim", dim)):
            _checks.at_least_one(name, value)
        with torch.inference_mode(False):  # made there, no later update could add to them
            self.sums = torch.zeros(num_classes, dim, dtype=torch.float64, device=device)
        self.dtype = torch.float32

    def update(self, embeddings: Tensor, target: Tensor) -> None:
        """Add (B, dim) embeddings, or (B, dim, 1, 1), of the classes ``target``, (B,)."""
        none_sharded("self.sums", {"embeddings": embeddings, "target": target})
        embeddings = _embedding.embeddings("embeddings", embeddings)
        dim = self.sums.shape[1]
        if embeddings.shape[1] != dim:
            raise _checks.fail("embeddings", f"(B, {dim})", f"shape {tuple(embeddings.shape)}")
        _embedding.beside("embeddings", embeddings, self.sums)
        _add(self.sums, embeddings, target)
        if embeddings.dtype == torch.float64:
            self.dtype = torch.float64

    def centers(self) -> Tensor:
        """The normalised centres so far."""
        return F.normalize(self.sums, dim=1).to(self.dtype)


@gathered
def class_centers(embeddings: Tensor, target: Tensor, num_classes: int) -> Tensor:
    """L2-normalised class centres of one batch, (num_classes, D); see :class:`ClassCenters`.

    Args:
        embeddings: (B, D), not normalised, or (B, C, H, W) such as (B, C, 1, 1), which is
            flattened.
        target: (B,) class indices in [0, num_classes).
        num_classes: rows of the result; a class without a sample has the zero vector.

    Returns:
        float32 (float64 for float64 embeddings); a constant, without a gradient.
    """
    embeddings = _embedding.embeddings("embeddings", embeddings)
    _checks.at_least_one("num_classes", num_classes)
    # No object: the compiler would have to build it within its graph.
    sums = embeddings.new_zeros(num_classes, embeddings.shape[1], dtype=torch.float64)
    _add(sums, embeddings, target)
    return F.normalize(sums, dim=1).to(_embedding.promote(embeddings[:0])[0].dtype)


def _add(sums: Tensor, embeddings: Tensor, target: Tensor) -> None:
    target = _embedding.labels(target, len(embeddings), sums.device)
    _embedding.in_range(target, len(sums))
    with torch.no_grad():
        sums.index_add_(0, target, embeddings.to(sums.dtype))

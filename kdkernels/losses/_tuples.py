"""The miner of REFILLED's first stage."""

from __future__ import annotations

from torch import Tensor

from .. import _checks, _embedding
from .._dtensor import gathered
from ..reference import refilled as reference


@gathered
def semihard_tuples(embeddings: Tensor, target: Tensor, margin: float = 0.2) -> Tensor:
    r"""Mine the semi-hard triplets of a batch: same class for a and p, another for n, and

    .. math:: 0 < D_{an} - D_{ap} \le margin

    with D the Euclidean distance of the L2-normalised embeddings. Vectorised, on the device,
    without synchronisation. A tuple is a pair (a, p) with all its negatives.

    Args:
        embeddings: (B, D) or (B, C, 1, 1); float64, float32, float16 or bfloat16.
        target: (B,) integer class indices.
        margin: >= 0.

    Returns:
        Boolean (B, B, B), True at [a, p, n]: ``.any(-1)`` are the tuples, ``.nonzero()`` lists the
        triplets. The distances are computed in float64 and compared in float32 (float64 for float64
        embeddings), as in :func:`tuple_matching_loss`, whose kernel never builds this tensor.
    """
    embeddings = _embedding.embeddings("embeddings", embeddings)
    margin = _checks.non_negative("margin", margin)
    target = _embedding.labels(target, len(embeddings), embeddings.device)
    dtype = _embedding.promote(embeddings.detach()[:0])[0].dtype
    with _embedding.full_precision(embeddings.device):
        distances = reference.distances(embeddings.detach())
    return reference.semihard(distances.to(dtype), target, margin)

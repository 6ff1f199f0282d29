"""IE-KD, Inheritance and Exploration KD (Huang et al., CVPR 2021): the specification.

    n(x) = x / max(||x||_2, 1e-12)                 each sample flattened to one vector of D elements
    l1:      inherit_b = mean_D |n(F_inh) - n(F_T)|      explore_b = -mean_D |n(F_exp) - n(F_T)|
    cosine:  inherit_b = 1 - <n(F_inh), n(F_T)>          explore_b = |<n(F_exp), n(F_T)>|
    loss = inheritance_weight sum_b inherit_b + exploration_weight sum_b explore_b    (mean: / B)

Edges: |.| has subgradient 0 at 0. A norm below 1e-12 counts as the constant 1e-12: the zero vector
stays zero, and its gradient is 1e12 times that of the normalised vector, as torch's ``normalize``
gives. No samples: 0.
"""

from __future__ import annotations

from torch import Tensor

from ._norms import unit


def iekd(
    inheritance: Tensor,
    exploration: Tensor,
    teacher: Tensor,
    *,
    inheritance_weight: float = 50.0,
    exploration_weight: float = 50.0,
    similarity: str = "l1",
    reduction: str = "mean",
) -> Tensor:
    """The loss of a whole batch: three (B, ...) factors -> scalar."""
    samples = max(inheritance.shape[0], 1)
    inh, exp, t = (unit(x.flatten(1)) for x in (inheritance, exploration, teacher))
    if similarity == "l1":
        inherit = (inh - t).abs().mean(1)
        explore = -(exp - t).abs().mean(1)
    else:
        inherit = 1 - (inh * t).sum(1)
        explore = (exp * t).sum(1).abs()
    total = inheritance_weight * inherit.sum() + exploration_weight * explore.sum()
    return total if reduction == "sum" else total / samples

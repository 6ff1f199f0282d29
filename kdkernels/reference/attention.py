"""Attention transfer (Zagoruyko & Komodakis, ICLR 2017; 1612.03928): the specification.

Q = n(mean_c |F_c|^p) of each sample, flattened over positions, n(x) = x / max(||x||_2, 1e-12)
loss = mean over samples and positions of (Q_S - Q_T)^2      ('sum': the sum)

The features are divided by a size s of their sample before the power is taken, which neither
overflows nor underflows then, at any p:

    e = mean_c |F_c / s|^p,  s = max(max |F|, 1e-12^(1/p)),  Q = e / max(||e||_2, 1e-12 / s^p)
"""

from __future__ import annotations

from torch import Tensor

from .._tracing import operand
from ._norms import EPS, over_norm


def attention_map(features: Tensor, p: float) -> Tensor:
    """(B, C, H, W) -> (B, H W) of norm 1."""
    power = operand(p)
    smallest = EPS ** (1 / power)
    # Q is the same for every s: a constant for all derivatives.
    size = features.detach().abs().amax((1, 2, 3), keepdim=True).clamp(min=smallest)
    scaled = features / size
    powers = scaled.square() if p == 2 else scaled.abs().pow(power)
    energy = powers.mean(1).flatten(1)
    return over_norm(energy, (smallest / size).flatten(1).pow(power))


def attention_transfer(
    student: Tensor, teacher: Tensor, *, p: float = 2.0, reduction: str = "mean"
) -> Tensor:
    """(B, C, H, W) x (B, C', H, W) -> scalar."""
    squares = (attention_map(student, p) - attention_map(teacher, p)).square()
    return squares.sum() if reduction == "sum" else squares.sum() / max(squares.numel(), 1)

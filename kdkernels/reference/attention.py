"""Attention transfer (Zagoruyko & Komodakis, ICLR 2017; 1612.03928): the specification.

Q = n(mean_c |F_c|^p) of each sample, flattened over positions, n(x) = x / max(||x||_2, 1e-12)
loss = mean over samples and positions of (Q_S - Q_T)^2      ('sum': the sum)
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def attention_map(features: Tensor, p: float) -> Tensor:
    """(B, C, H, W) -> (B, H W) of norm 1."""
    powers = features.square() if p == 2 else features.abs().pow(p)
    energy = powers.mean(1)
    return F.normalize(energy.flatten(1), dim=1, eps=1e-12)


def attention_transfer(
    student: Tensor, teacher: Tensor, *, p: float = 2.0, reduction: str = "mean"
) -> Tensor:
    """(B, C, H, W) x (B, C', H, W) -> scalar."""
    squares = (attention_map(student, p) - attention_map(teacher, p)).square()
    return squares.sum() if reduction == "sum" else squares.sum() / max(squares.numel(), 1)

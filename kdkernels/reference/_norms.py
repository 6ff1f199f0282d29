"""What the references of features share: vectors over their norm, with a floor under the norm."""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-12


def over_norm(x: Tensor, floor: Tensor) -> Tensor:
    """x / max(||x||_2, floor) for the rows of (B, D), with floors (B, 1) that are constants.

    Where the floor holds, no derivative passes through the root, which has none at 0.
    """
    squares = x.square().sum(1, keepdim=True)
    held = squares <= floor.square()
    return x / torch.where(held, floor, torch.where(held, 1.0, squares).sqrt())


def unit(x: Tensor) -> Tensor:
    """x / max(||x||_2, 1e-12) for the rows of (B, D), whose squares may not fit the dtype."""
    size = x.detach().abs().amax(1, keepdim=True).clamp(min=EPS)
    return over_norm(x / size, EPS / size)

"""Which parameters decay, and how the learning rate goes."""

from __future__ import annotations

import math
from typing import Any

from torch import nn


def groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay for matrices and filters, none for biases and batch-norm."""
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.ndim > 1]
    vectors = [p for p in trained if p.ndim <= 1]
    return [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]


def cosine(step: int, steps: int, warmup: int) -> float:
    """Factor of the learning rate: a cosine to zero after a linear warm-up."""
    ramp = min(1.0, (step + 1) / (warmup + 1))
    return ramp * (1 + math.cos(math.pi * step / max(1, steps))) / 2

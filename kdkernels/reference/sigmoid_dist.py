"""DIST over sigmoids, for heads whose labels do not exclude each other: the specification.

    p = sigmoid(teacher / tau),  q = sigmoid(student / tau)      elementwise, (B, C)

and the rest as in ``dist.py``. A row of one class is constant: its correlation is 0.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .dist import dist


def sigmoid(logits: Tensor, dim: int) -> Tensor:
    """Of each logit; no dimension has a part in it."""
    return torch.sigmoid(logits)


sigmoid_dist = functools.partial(dist, activation=sigmoid)

"""KD of sigmoids, for heads whose labels do not exclude each other: the specification.

    p = sigmoid(teacher / T),  q = sigmoid(student / T)          elementwise
    loss_row = sum_i p_i log(p_i / q_i) + (1 - p_i) log((1 - p_i) / (1 - q_i))
                                                                   (times T^2, outside)
    d loss_row / d student_i = (q_i - p_i) / T

Edges: -inf and inf are the probabilities 0 and 1. Where the teacher has one of them that outcome
alone counts; where the student has one that the teacher has not, the loss is +inf, with a finite
gradient. NaN gives NaN, in the gradient of its own class alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._rows import kl_terms


def sigmoid(x: Tensor) -> Tensor:
    """Of PyTorch's own the bits depend on where in a tensor an element lies."""
    below = x < 0
    e = torch.exp(torch.where(below, x, -x))
    return torch.where(below, e, 1.0) / (1.0 + e)


def sigmoid_kd(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float | Tensor = 4.0,
    standardize: bool = False,
) -> Tensor:
    """Sum of two-point divergences of each row: (rows, classes) x (rows, classes) -> (rows,).

    Logits cannot be standardised: that there are no other classes is what sets the loss apart.
    """
    assert not standardize
    s, t = student / temperature, teacher / temperature
    gap = (teacher - student) / temperature
    near = gap.abs() < 1
    gap = torch.where(near, gap, 0.0)
    terms = torch.zeros_like(s)
    for sign in (1, -1):  # the two outcomes
        q, p = sigmoid(sign * s), sigmoid(sign * t)
        # log p - log q, which rounding of two logarithms would drown.
        close = -torch.log1p(sigmoid(-sign * s) * torch.expm1(-sign * gap))
        d = torch.where(near, close, F.logsigmoid(sign * t) - F.logsigmoid(sign * s))
        terms = terms + kl_terms(p, q, d)
    return terms.sum(-1)

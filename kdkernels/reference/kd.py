"""KD (Hinton et al., 2015): the specification.

    p = softmax(teacher / T),  q = softmax(student / T)          per row
    loss_row = sum_i p_i (log p_i - log q_i)                      (times T^2, outside)
    d loss_row / d student_i = (q_i - p_i) / T

Edges: a class with p_i = 0 contributes 0 whatever q_i is; q_i = 0 < p_i gives +inf with a finite
gradient; a row that is all -inf, or holds NaN or +inf, gives NaN and touches no other row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._rows import log_softmax, rescale


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) per row from log-probabilities, with 0 log 0 = 0."""
    p = log_p.exp()
    return torch.where(p != 0, p * (log_p - log_q), torch.zeros_like(p)).sum(-1)


def kd(
    student: Tensor, teacher: Tensor, *, temperature: float = 4.0, standardize: bool = False
) -> Tensor:
    """KL divergence of each row: (rows, classes) x (rows, classes) -> (rows,)."""
    student, teacher = rescale(student, teacher, temperature, standardize)
    return divergence(log_softmax(teacher), log_softmax(student))

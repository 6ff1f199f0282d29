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

from ._rows import divergence, log_ratio, logsumexp, rescale


def kd(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float | Tensor = 4.0,
    standardize: bool = False,
) -> Tensor:
    """KL divergence of each row: (rows, classes) x (rows, classes) -> (rows,)."""
    student, teacher = rescale(student, teacher, temperature, standardize)
    log_p, log_q = teacher.log_softmax(-1), student.log_softmax(-1)
    d, _ = log_ratio(teacher - student, log_p, log_q, logsumexp(teacher), logsumexp(student))
    return divergence(log_p, log_q, d)


def kd_by_temperature(
    student: Tensor, teacher: Tensor, temperature: Tensor, *, standardize: bool = False
) -> Tensor:
    """The derivative of T^2 KL by each row's T: (rows, classes) x 2, (rows, 1) -> (rows,).

    With k = 1 / T, dKL/dk = k Cov_p(t, t - s) + E_q s - E_p s, and T^2 KL changes with T by
    2 T KL - dKL/dk. The expectations are of t - s under p and of s under q - p, in which a common
    offset of a row cancels.
    """
    values = kd(student, teacher, temperature=temperature, standardize=standardize)
    s, t = rescale(student, teacher, 1.0, standardize)
    p, q = (t / temperature).softmax(-1), (s / temperature).softmax(-1)

    def mean(weights: Tensor, x: Tensor) -> Tensor:
        return torch.where(weights == 0, 0.0, weights * x).sum(-1, keepdim=True)

    centred = torch.where(p == 0, 0.0, t - mean(p, t))
    covariance = mean(p, centred * torch.where(p == 0, 0.0, t - s))
    of_q, of_p = mean(q, s), mean(p, s)
    by_k = covariance / temperature + of_q - of_p
    return 2 * temperature.squeeze(-1) * values - by_k.squeeze(-1)

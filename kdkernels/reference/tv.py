"""Total variation distance: the specification.

    p = softmax(teacher / T),  q = softmax(student / T)          per row
    loss_row = 1/2 sum_i |p_i - q_i|
    d loss_row / d student_i = q_i (g_i - sum_j q_j g_j) / T,    g_i = 1/2 sign(q_i - p_i)

The gradient jumps where p_i = q_i. It is that of sign 0 where they differ by no more than 16 units
of rounding, because the sign would be that of an error. Edges: finite everywhere, 1 at
most. A row that is all -inf, or holds NaN or +inf, gives NaN and touches no other row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._rows import rescale
from ._tokens import log_softmax, with_nan_of


def tv(
    student: Tensor, teacher: Tensor, *, temperature: float = 1.0, standardize: bool = False
) -> Tensor:
    """Distance of each row: (rows, classes) x (rows, classes) -> (rows,)."""
    student, teacher = rescale(student, teacher, temperature, standardize)
    return distance(log_softmax(teacher), log_softmax(student))


def distance(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Likewise, of log-probabilities."""
    p, q = log_p.exp(), log_q.exp()
    d = torch.where(q == 0, 0.0, log_p - log_q)
    near = (d.abs() < 1) & (q != 0)
    # q (exp(d) - 1), where the difference of the probabilities would cancel.
    gap = torch.where(near, q * torch.expm1(torch.where(near, d, 0.0)), p - q)
    equal = d.detach().abs() <= 16 * torch.finfo(d.dtype).eps
    gap = torch.where(equal & near, gap.detach(), gap)
    return with_nan_of(log_p, 0.5 * gap.abs().sum(-1))

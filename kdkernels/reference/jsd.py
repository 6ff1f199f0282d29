"""Generalised Jensen-Shannon divergence (GKD, Agarwal et al., 2024): the specification.

    p = softmax(teacher / T),  q = softmax(student / T),  m = beta p + (1 - beta) q     per row
    loss_row = beta KL(p || m) + (1 - beta) KL(q || m)            0 < beta < 1
    d loss_row / d student_i = q_i (g_i - sum_j q_j g_j) / T,  g_i = (1 - beta) log(q_i / m_i)

As in TRL, beta = 0 is KL(p || q) and beta = 1 is KL(q || p). These are not the limits of the
formula, which tends to 0 at both ends; loss_row / beta tends to KL(p || q) as beta tends to 0.

With r = p / q and e = |log r|, the logarithm of a class's larger probability against the mixture is
-log1p(c (exp(-e) - 1)), c being the weight of the other one, and differs by e from that of the
smaller: no probability is divided, so that nothing underflows.

Edges: finite everywhere for 0 < beta < 1, log 2 at most; a class that one side excludes contributes
the other's probability times the logarithm of its share of m. A row that is all -inf, or holds
NaN or +inf, gives NaN and touches no other row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._rows import rescale
from ._tokens import kl_terms, log_softmax


def jsd(
    student: Tensor,
    teacher: Tensor,
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    standardize: bool = False,
) -> Tensor:
    """Divergence of each row: (rows, classes) x (rows, classes) -> (rows,)."""
    student, teacher = rescale(student, teacher, temperature, standardize)
    log_p, log_q = log_softmax(teacher), log_softmax(student)
    if beta == 0.0:
        return kl_terms(log_p, log_q).sum(-1)
    if beta == 1.0:
        return kl_terms(log_q, log_p).sum(-1)
    p, q = log_p.exp(), log_q.exp()
    m = beta * p + (1 - beta) * q
    p_over_m, q_over_m = against_mixture(log_p, log_q, beta)
    return (beta * excess(p, m, p_over_m) + (1 - beta) * excess(q, m, q_over_m)).sum(-1)


def against_mixture(log_p: Tensor, log_q: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """log(p / m) and log(q / m), m = beta p + (1 - beta) q; 0 where both are 0."""
    both = (log_p == -torch.inf) & (log_q == -torch.inf)
    d = torch.where(both, 0.0, log_p - log_q)
    teacher_larger = d > 0
    # Where both differ by more, exp(-d) is 0; an infinite d would make 0 inf of the gradient.
    above = torch.where(teacher_larger, d, 0.0).clamp(max=1e4)
    below = torch.where(teacher_larger, 0.0, d).clamp(min=-1e4)
    # log1p(c (x - 1)) is log(1 - c + c x): one keeps its digits near x = 1, the other at c = 1.
    p_over_m = torch.where(
        above < 1,
        -torch.log1p((1 - beta) * torch.expm1(-above.clamp(max=1.0))),
        -torch.log(beta + (1 - beta) * torch.exp(-above)),
    )
    q_over_m = torch.where(
        below > -1,
        -torch.log1p(beta * torch.expm1(below.clamp(min=-1.0))),
        -torch.log((1 - beta) + beta * torch.exp(below)),
    )
    return (
        torch.where(teacher_larger, p_over_m, q_over_m + below),
        torch.where(teacher_larger, p_over_m - above, q_over_m),
    )


def excess(p: Tensor, m: Tensor, x: Tensor) -> Tensor:
    """p (exp(-x) - 1 + x), the class's part of KL(p || m) with x = log(p / m); >= 0.

    Its terms other than p x are m - p, and those of p and of q cancel class by class in the sum.
    """
    near = (x.abs() < 1) & (p != 0)
    close, far = torch.where(near, x, 0.0), torch.where(near, 0.0, x)
    return torch.where(near, p * (torch.expm1(-close) + close), (m - p) + p * far)

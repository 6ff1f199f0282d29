"""Divergences from the mixture of teacher and student: the specification of three losses.

    p = softmax(teacher / T),  q = softmax(student / T),  m = c p + e q,  c + e = 1      per row
    loss_row = a KL(p || m) + b KL(q || m)
    d loss_row / d student_i = q_i (g_i - sum_j q_j g_j) / T,
    g_i = b log(q_i / m_i) - (a e - b c) p_i / m_i

    Jensen-Shannon (GKD)    c = a = beta, e = b = 1 - beta
    skew KL (DistiLLM)      c = alpha, a = 1, b = 0
    skew reverse KL         e = alpha, a = 0, b = 1

With r = p / q and x = |log r|, the logarithm of a class's larger probability against the mixture is
-log1p(w (exp(-x) - 1)), w being the weight of the other one, and differs by x from that of the
smaller: no probability is divided, so that nothing underflows.

Edges: finite everywhere while c and e are positive; a class that one side excludes contributes the
other's probability times the logarithm of its share of m. Without a mixture, c = 0 or e = 0, it is
KL or reverse KL with their edges. A row that is all -inf, or holds NaN or +inf, gives NaN and
touches no other row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._rows import rescale
from ._tokens import excess, kl_terms, log_softmax, with_nan_of


def jsd(
    student: Tensor,
    teacher: Tensor,
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    standardize: bool = False,
) -> Tensor:
    """Divergence of each row: (rows, classes) x (rows, classes) -> (rows,).

    As in TRL, beta = 0 is KL(p || q) and beta = 1 is KL(q || p). These are not the limits of the
    formula, which tends to 0 at both ends; loss_row / beta tends to KL(p || q) as beta tends to 0.
    """
    log_q, log_p = _log_softmaxes(student, teacher, temperature, standardize)
    if beta == 0.0 or beta == 1.0:
        return _plain(log_q, log_p, forward=beta == 0.0)
    return _from_mixture(log_q, log_p, (beta, 1 - beta), beta, 1 - beta)


def skew_kl(
    student: Tensor,
    teacher: Tensor,
    *,
    alpha: float = 0.1,
    temperature: float = 1.0,
    standardize: bool = False,
) -> Tensor:
    """Likewise; alpha = 0 is KL(p || q)."""
    log_q, log_p = _log_softmaxes(student, teacher, temperature, standardize)
    if alpha == 0.0:
        return _plain(log_q, log_p, forward=True)
    return _from_mixture(log_q, log_p, (alpha, 1 - alpha), 1.0, 0.0)


def skew_reverse_kl(
    student: Tensor,
    teacher: Tensor,
    *,
    alpha: float = 0.1,
    temperature: float = 1.0,
    standardize: bool = False,
) -> Tensor:
    """Likewise; alpha = 0 is KL(q || p)."""
    log_q, log_p = _log_softmaxes(student, teacher, temperature, standardize)
    if alpha == 0.0:
        return _plain(log_q, log_p, forward=False)
    return _from_mixture(log_q, log_p, (1 - alpha, alpha), 0.0, 1.0)


def _log_softmaxes(
    student: Tensor, teacher: Tensor, temperature: float, standardize: bool
) -> tuple[Tensor, Tensor]:
    student, teacher = rescale(student, teacher, temperature, standardize)
    return log_softmax(student), log_softmax(teacher)


def _plain(log_q: Tensor, log_p: Tensor, *, forward: bool) -> Tensor:
    return (kl_terms(log_p, log_q) if forward else kl_terms(log_q, log_p)).sum(-1)


def _from_mixture(
    log_q: Tensor, log_p: Tensor, shares: tuple[float, float], a: float, b: float
) -> Tensor:
    p, q = log_p.exp(), log_q.exp()
    m = shares[0] * p + shares[1] * q
    p_over_m, q_over_m = _against_mixture(log_p, log_q, shares)
    total = torch.zeros_like(p)
    if a:
        total = total + a * excess(p, m, p_over_m)
    if b:
        total = total + b * excess(q, m, q_over_m)
    return with_nan_of(log_p, total.sum(-1))


def _against_mixture(
    log_p: Tensor, log_q: Tensor, shares: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """log(p / m) and log(q / m), m = c p + e q; 0 where both are 0."""
    c, e = shares
    both = (log_p == -torch.inf) & (log_q == -torch.inf)
    d = torch.where(both, 0.0, log_p - log_q)
    teacher_larger = d > 0
    # Where both differ by more, exp(-d) is 0; an infinite d would make 0 inf of the gradient.
    above = torch.where(teacher_larger, d, 0.0).clamp(max=1e4)
    below = torch.where(teacher_larger, 0.0, d).clamp(min=-1e4)
    # log1p(w (x - 1)) is log(1 - w + w x): one keeps its digits near x = 1, the other at w = 1.
    p_over_m = torch.where(
        above < 1,
        -torch.log1p(e * torch.expm1(-above.clamp(max=1.0))),
        -torch.log(c + e * torch.exp(-above)),
    )
    q_over_m = torch.where(
        below > -1,
        -torch.log1p(c * torch.expm1(below.clamp(min=-1.0))),
        -torch.log(e + c * torch.exp(below)),
    )
    return (
        torch.where(teacher_larger, p_over_m, q_over_m + below),
        torch.where(teacher_larger, p_over_m - above, q_over_m),
    )

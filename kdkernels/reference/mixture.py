"""Divergences from the mixture of teacher and student: the specification of three losses.

    p = softmax(teacher / T),  q = softmax(student / T),  m = c p + e q,  c + e = 1      per row
    loss_row = a KL(p || m) + b KL(q || m)
    d loss_row / d student_i = q_i (g_i - sum_j q_j g_j) / T,
    g_i = b log(q_i / m_i) - (a e - b c) p_i / m_i

    Jensen-Shannon (GKD)    c = a = beta, e = b = 1 - beta
    skew KL (DistiLLM)      c = alpha, a = 1, b = 0
    skew reverse KL         e = alpha, a = 0, b = 1

A class has m (a over(p / m) + b over(q / m)), where over(x) = x log x - x + 1 >= 0; what is added
sums to 0 over the classes. With s = 1 - exp(-|log(p / q)|) and w the share of the smaller
probability, m is 1 - w s times the larger one, and the ratios less 1 are w s / (1 - w s) and
(w - 1) s / (1 - w s): no probability is divided, so that nothing underflows, and each keeps its
relative accuracy near equality, whatever the shares are.

Edges: finite everywhere while c and e are positive; a class that one side excludes contributes the
other's probability times the logarithm of its share of m. Without a mixture, c = 0 or e = 0, it is
KL or reverse KL with their edges. A row that is all -inf, or holds NaN or +inf, gives NaN and
touches no other row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._tracing import operand
from ._rows import rescale
from ._tokens import kl_terms, log_softmax, with_nan_of


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
    both = (log_p == -torch.inf) & (log_q == -torch.inf)
    d = torch.where(both, 0.0, log_p - log_q)
    of_p, of_q = _over_mixture(d, shares)
    total = torch.zeros_like(p)
    if a:
        total = total + a * of_p
    if b:
        total = total + b * of_q
    m = shares[0] * p + shares[1] * q
    return with_nan_of(log_p, (m * total).sum(-1))


def _over_mixture(d: Tensor, shares: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """over(p / m) and over(q / m) of d = log(p / q), m = c p + e q."""
    c, e = map(operand, shares)
    zero = torch.zeros_like(d)
    teacher_larger = d > 0
    # Where both differ by more, exp(-d) is 0; an infinite d would make 0 inf of the gradient.
    gap = torch.where(teacher_larger, d, -d).clamp(max=1e4)
    share = torch.where(teacher_larger, zero + e, zero + c)
    rest = torch.where(teacher_larger, zero + c, zero + e)
    # The derivative of expm1 comes from its value, which is no good where exp(-gap) is small.
    ratio = torch.exp(-gap)
    apart = torch.where(gap < 1, -torch.expm1(-gap.clamp(max=1.0)), 1 - ratio)
    lost = share * apart  # 1 - m / larger
    # The first keeps its digits near 1, the second where little is left.
    m = torch.where(lost < 0.5, 1 - lost, rest + share * ratio)
    log_m = torch.where(
        lost < 0.5, torch.log1p(-lost.clamp(max=0.5)), torch.where(lost < 0.5, 1.0, m).log()
    )
    larger = _over(1 / m, lost / m, -log_m)
    smaller = _over(ratio / m, -rest * apart / m, -log_m - gap)
    return (
        torch.where(teacher_larger, larger, smaller),
        torch.where(teacher_larger, smaller, larger),
    )


def _over(x: Tensor, z: Tensor, log_x: Tensor) -> Tensor:
    """x log x - z of x = 1 + z, with relative accuracy: near 1 by the series of 2 artanh(u)."""
    near = z.abs() < 0.25
    close = torch.where(near, z, 0.0)
    u = close / (2 + close)
    square = u * u
    series = torch.full_like(u, 1 / 21)
    for n in range(19, 1, -2):
        series = series * square + 1 / n
    # log x = 2 u (1 + u^2 series), and z (2 u) - (z - 2 u) is z u.
    return torch.where(near, u * (close + 2 * (1 + close) * square * series), x * log_x - z)

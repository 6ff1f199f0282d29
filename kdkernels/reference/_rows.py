"""What the row references share: temperature or standardisation, safe log-normalisers, and KL.

KL is summed as p phi(d) with phi(d) = exp(-d) - 1 + d and d = log p - log q: its terms are never
negative and vanish with d. d comes from the logits' differences and not from two logarithms, whose
rounding errors would be all that is left where a high temperature makes p and q nearly uniform.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._dtypes import STANDARDIZE_EPS


def rescale(
    student: Tensor, teacher: Tensor, temperature: float | Tensor, standardize: bool
) -> tuple[Tensor, Tensor]:
    """Divide by the temperature, a number or (rows, 1), after logit standardisation if asked.

    Logit standardisation (Sun et al., CVPR 2024) is ``(x - mean) / (std + 1e-7)`` per row with the
    unbiased standard deviation; the gradient flows through the student's mean and std.
    """
    if standardize:
        student, teacher = _standardize(student), _standardize(teacher)
    # From the largest logit, which changes nothing: a common offset must not cost digits.
    return (student - top(student)) / temperature, (teacher - top(teacher)) / temperature


def top(logits: Tensor) -> Tensor:
    """The largest logit of each row, a constant; 0 where it is not finite."""
    largest = logits.detach().amax(-1, keepdim=True)
    return torch.where(largest.isfinite(), largest, 0.0)


def logsumexp(logits: Tensor) -> Tensor:
    """Likewise from the largest logit, so that the gradient does not suffer from its rounding."""
    origin = top(logits)
    return (logits - origin).logsumexp(-1) + origin.squeeze(-1)


def _standardize(logits: Tensor) -> Tensor:
    # From the first logit: the mean of a constant row is that constant, its deviation exactly 0.
    logits = logits - logits[..., :1].detach()
    mean = logits.mean(-1, keepdim=True)
    std = logits.std(-1, keepdim=True)
    return (logits - mean) / (std + STANDARDIZE_EPS)


def masked_log_softmax(logits: Tensor, excluded: Tensor) -> tuple[Tensor, Tensor]:
    """Log-softmax over the classes that are not ``excluded``, and their logsumexp.

    Excluded classes get -inf. A row whose other classes are all -inf (or that has none) has no
    distribution: its logsumexp is -inf and its log-probabilities are all -inf, with zero gradient.
    """
    minus_inf = -torch.inf
    kept = logits.masked_fill(excluded, minus_inf)
    empty = (kept == minus_inf).all(-1, keepdim=True)
    safe = kept.masked_fill(empty, 0.0)
    log_probs = torch.log_softmax(safe, -1).masked_fill(empty | excluded, minus_inf)
    return log_probs, logsumexp(safe).masked_fill(empty.squeeze(-1), minus_inf)


def log_ratio(
    delta: Tensor, log_p: Tensor, log_q: Tensor, lse_p: Tensor, lse_q: Tensor
) -> tuple[Tensor, Tensor]:
    """log(p / q) of the classes, and lse_p - lse_q, both without the rounding errors of ``lse``.

    ``delta`` is teacher minus student, of the scaled logits, whose logsumexps are ``lse``. The
    gradients are those of delta - lse_p + lse_q and of lse_p - lse_q.
    """
    origin, c = _normalisers(*(x.detach() for x in (delta, log_p, log_q, lse_p, lse_q)))
    direct = (lse_p - lse_q).detach()
    by_q, by_p = (torch.where(x.isfinite(), x - x.detach(), 0.0) for x in (lse_q, lse_p))
    moves = by_q - by_p
    gap = torch.where(direct.isfinite(), (origin + c).squeeze(-1) - moves, direct)
    return delta - origin - c + moves.unsqueeze(-1), gap


def _normalisers(
    delta: Tensor, log_p: Tensor, log_q: Tensor, lse_p: Tensor, lse_q: Tensor
) -> tuple[Tensor, Tensor]:
    """lse_p - lse_q as a sum of two terms, the first of which is exact.

    With k the teacher's likeliest class and h = delta - delta_k they are delta_k and
    c = log sum_i q_i exp(h_i) = log(q_k / p_k). The sum is over positive terms, and over
    q_i (exp(h_i) - 1) where c is near 0; the quotient has the rounding errors of two logsumexps
    and is left to where the sum underflows.
    """
    best = log_p.argmax(-1, keepdim=True)
    origin, log_p_best, log_q_best = (x.gather(-1, best) for x in (delta, log_p, log_q))
    h = delta - origin
    q = probabilities(log_q)
    # q exp(h), which does not divide by a student's probability of 0.
    grown = (log_p - log_p_best).exp() * q.gather(-1, best)
    direct = log_q_best - log_p_best
    excess = torch.where(h < 20, q * torch.expm1(h), grown - q).sum(-1, keepdim=True)
    total = torch.where(h < 20, q * h.exp(), grown).sum(-1, keepdim=True)
    c = torch.where(direct.abs() < 20, total.log(), direct)
    c = torch.where(direct.abs() < 1, torch.log1p(excess), c)
    # Where the student all but excludes the teacher's likeliest class (a finite mask does so too),
    # delta there has fewer digits than the gap of the normalisers; or there is no such class.
    lost = (log_q_best < -20) | (log_p_best == -torch.inf)
    gap = (lse_p - lse_q).unsqueeze(-1)
    gap = torch.where(gap.isinf(), 0.0, gap)
    return torch.where(lost, gap, origin), torch.where(lost, 0.0, c)


def probabilities(log_probs: Tensor) -> Tensor:
    """exp(log_probs), divided by its sum: that is 1 but for an error that all classes share.

    log_softmax subtracts a rounded logsumexp, which is about 8 for 4096 classes. In float32 all
    probabilities err by some roundings in the same direction then, which no sum over the classes
    averages out. The sum is a constant for all derivatives.
    """
    probs = log_probs.exp()
    total = probs.detach().sum(-1, keepdim=True)
    return probs / torch.where(total == 0, 1.0, total)


def kl_terms(p: Tensor, q: Tensor, d: Tensor) -> Tensor:
    """p phi(d) with d = log p - log q, by the series where d is small, else as q - p + p d.

    Where exp(-d) is no extreme number it stands for q / p: an error of d that all classes share,
    that of the normalisers, cancels in the sum over the classes then, as it does in the series.
    Beside q it would be an absolute error, large against a small divergence of many classes.
    A class with p = 0 has q, whatever d is: over all classes q and p both sum to 1.
    """
    near, moderate = d.abs() < 0.25, (d.abs() < 20) & (p != 0)
    x = torch.where(near, d, 0.0)
    term = torch.full_like(x, 0.5)
    series = term
    for k in range(3, 17):
        term = term * (-x / k)
        series = series + term
    none = p == 0
    x_far = torch.where(near | none, 0.0, d)
    y = torch.where(moderate, x_far, 0.0)
    far = torch.where(moderate, p * (torch.expm1(-y) + y), q - p + p * x_far)
    return torch.where(near, p * x * x * series, far)


def divergence(log_p: Tensor, log_q: Tensor, d: Tensor) -> Tensor:
    """KL(p || q) per row; 0 where there is no p at all."""
    total = kl_terms(probabilities(log_p), probabilities(log_q), d).sum(-1)
    return torch.where((log_p == -torch.inf).all(-1), 0.0, total)


def weighted(value: Tensor, weight: Tensor | float) -> Tensor:
    """``weight * value``, and 0 where an infinite value has weight 0: it is switched off."""
    product = weight * value
    return torch.where(product.isnan() & ~value.isnan(), 0.0, product)

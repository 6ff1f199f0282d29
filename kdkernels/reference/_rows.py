"""What the row references share: temperature or standardisation, and safe log-normalisers."""

from __future__ import annotations

import torch
from torch import Tensor

from .._dtypes import STANDARDIZE_EPS


def rescale(
    student: Tensor, teacher: Tensor, temperature: float, standardize: bool
) -> tuple[Tensor, Tensor]:
    """Divide by the temperature, after logit standardisation if asked.

    Logit standardisation (Sun et al., CVPR 2024) is ``(x - mean) / (std + 1e-7)`` per row with the
    unbiased standard deviation; the gradient flows through the student's mean and std.
    """
    if standardize:
        student, teacher = _standardize(student), _standardize(teacher)
    return student / temperature, teacher / temperature


def _standardize(logits: Tensor) -> Tensor:
    # From the first logit: the mean of a constant row is that constant, its deviation exactly 0.
    logits = logits - logits[..., :1].detach()
    mean = logits.mean(-1, keepdim=True)
    std = logits.std(-1, keepdim=True)
    return (logits - mean) / (std + STANDARDIZE_EPS)


def log_softmax(logits: Tensor) -> Tensor:
    """Log-softmax over the last dimension, by the odds against the largest class.

    ``torch.log_softmax`` loses the digits of the largest log-probability where the row is certain,
    and its backward pass those of the gradient, both of which are differences there. Here the
    largest class has the logit 0, which is no variable, and the gradient of its own logit is minus
    the sum of the others'.
    """
    index = logits.argmax(-1, keepdim=True)
    largest = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, index, True)
    top = logits.gather(-1, index)
    odds = (logits - top).masked_fill(largest, 0.0)
    log_total = torch.log1p(odds.exp().masked_fill(largest, 0.0).sum(-1, keepdim=True))
    # A row whose largest logit is NaN or infinite is NaN, in the gradient of every class too.
    dead = ~torch.isfinite(top.detach())
    row_sum = torch.where(dead, logits, 0.0).sum(-1, keepdim=True)
    return odds - log_total + row_sum * torch.where(dead, torch.nan, 1.0)


def masked_log_softmax(logits: Tensor, excluded: Tensor) -> tuple[Tensor, Tensor]:
    """Log-softmax over the classes that are not ``excluded``, and their logsumexp.

    Excluded classes get -inf. A row whose other classes are all -inf (or that has none) has no
    distribution: its logsumexp is -inf and its log-probabilities are all -inf, with zero gradient.
    """
    minus_inf = -torch.inf
    kept = logits.masked_fill(excluded, minus_inf)
    empty = (kept == minus_inf).all(-1, keepdim=True)
    safe = kept.masked_fill(empty, 0.0)
    lse = torch.logsumexp(safe, -1, keepdim=True)
    log_probs = (safe - lse).masked_fill(empty | excluded, minus_inf)
    return log_probs, lse.masked_fill(empty, minus_inf).squeeze(-1)


def kl_terms(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Each class's part of KL(p || q): p (exp(-d) - 1 + d) with d = log p - log q.

    That is p d + (q - p), whose last part sums to 0 over a distribution, so that every term is >= 0
    and nothing cancels when p and q agree. A class with p = 0 gives q; p > 0 = q gives +inf.
    """
    p, q = log_p.exp(), log_q.exp()
    absent = p == 0
    d = torch.where(absent, 0.0, log_p - log_q)
    near = (d.abs() < 1) & ~absent
    close, far = torch.where(near, d, 0.0), torch.where(near, 0.0, d)
    return torch.where(near, p * (torch.expm1(-close) + close), (q - p) + p * far)

"""What the row references share: temperature or standardisation, and safe log-normalisers."""

from __future__ import annotations

import torch
from torch import Tensor

STANDARDIZE_EPS = 1e-7
"""Added to the standard deviation of a row, as in the published logit standardisation."""


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
    mean = logits.mean(-1, keepdim=True)
    std = logits.std(-1, keepdim=True)
    return (logits - mean) / (std + STANDARDIZE_EPS)


def log_softmax(logits: Tensor) -> Tensor:
    return torch.log_softmax(logits, -1)


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

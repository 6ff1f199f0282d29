"""DKD, Decoupled Knowledge Distillation (Zhao et al., CVPR 2022): the specification.

With t the row's target class, q_n = 1 - q_t and q^ the softmax over the classes i != t:

    TCKD = p_t log(p_t / q_t) + p_n log(p_n / q_n)
    NCKD = sum_{i != t} p^_i log(p^_i / q^_i)
    loss_row = alpha * TCKD + beta * NCKD                         (times T^2, outside)

    d TCKD / d student_t = (q_t - p_t) / T,  d TCKD / d student_i = -(q_t - p_t) q^_i / T
    d NCKD / d student_t = 0,                d NCKD / d student_i = (q^_i - p^_i) / T

log(1 - q_t) is the logsumexp over i != t minus the logsumexp over all classes, never log(1 - x).

Edges: as in KD. A row with no other class that is not -inf (C = 1, or all others masked) has no
non-target distribution: NCKD is 0 where the teacher's is missing; where only the student's is, it
is +inf and has no gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._rows import divergence, log_ratio, logsumexp, masked_log_softmax, rescale, weighted


class Split(NamedTuple):
    """Rows split at their target: log-probabilities of teacher and student, and d = log p / q."""

    log_p: Tensor
    """log [p_t, p_n], (rows, 2)."""
    log_q: Tensor
    d: Tensor
    log_p_others: Tensor
    """log p^, (rows, classes); the target has -inf."""
    log_q_others: Tensor
    d_others: Tensor

    def explicit(self) -> Tensor:
        """TCKD of each row."""
        return divergence(self.log_p, self.log_q, self.d)

    def implicit(self) -> Tensor:
        """NCKD of each row."""
        return divergence(self.log_p_others, self.log_q_others, self.d_others)


def split(student: Tensor, teacher: Tensor, target: Tensor) -> Split:
    """Split scaled logits, (rows, classes), at the target of each row."""
    index = target.unsqueeze(-1)
    excluded = torch.arange(student.shape[-1], device=student.device) == index
    log_p_others, lse_p = masked_log_softmax(teacher, excluded)
    log_q_others, lse_q = masked_log_softmax(student, excluded)
    delta = teacher - student
    d_others, lse_gap = log_ratio(delta, log_p_others, log_q_others, lse_p, lse_q)
    # A student without any other class has no distribution to move.
    d_others = torch.where((lse_q == -torch.inf).unsqueeze(-1), torch.inf, d_others)
    pairs = [torch.stack([x.gather(-1, index)[:, 0], rest], -1) for x, rest in
             ((delta, lse_gap), (teacher, lse_p), (student, lse_q))]  # fmt: skip
    log_p, log_q = _log_pair(teacher, pairs[1]), _log_pair(student, pairs[2])
    d, _ = log_ratio(pairs[0], log_p, log_q, logsumexp(pairs[1]), logsumexp(pairs[2]))
    return Split(log_p, log_q, d, log_p_others, log_q_others, d_others)


def _log_pair(logits: Tensor, pair: Tensor) -> Tensor:
    # A row that is all -inf is NaN through its pair, which may hang on the target's logit alone.
    # This term carries the NaN to the gradient of every class; in other rows both are exact zeros.
    dead = ((pair == -torch.inf).all(-1) | pair.isnan().any(-1)).unsqueeze(-1)
    row_sum = torch.where(dead, logits, 0.0).sum(-1, keepdim=True)
    return torch.log_softmax(pair, -1) + row_sum * torch.where(dead, torch.nan, 1.0)


def dkd(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
    standardize: bool = False,
) -> Tensor:
    """Loss of each row: (rows, classes) x (rows, classes) x (rows,) -> (rows,)."""
    student, teacher = rescale(student, teacher, temperature, standardize)
    rows = split(student, teacher, target)
    return weighted(rows.explicit(), alpha) + weighted(rows.implicit(), beta)

"""DKD, Decoupled Knowledge Distillation (Zhao et al., CVPR 2022): the specification.

With t the row's target class, q_n = 1 - q_t and q^ the softmax over the classes i != t:

    TCKD = p_t log(p_t / q_t) + p_n log(p_n / q_n)
    NCKD = sum_{i != t} p^_i log(p^_i / q^_i)
    loss_row = alpha * TCKD + beta * NCKD                         (times T^2, outside)

    d TCKD / d student_t = (q_t - p_t) / T,  d TCKD / d student_i = -(q_t - p_t) q^_i / T
    d NCKD / d student_t = 0,                d NCKD / d student_i = (q^_i - p^_i) / T

log(1 - q_t) is the logsumexp over i != t minus the logsumexp over all classes, never log(1 - x).

Edges: as in KD. A row with no other class that is not -inf (C = 1, or all others masked) has no
non-target distribution: NCKD is 0 where the teacher's is missing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._rows import masked_log_softmax, rescale
from .kd import divergence


def decouple(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Split a row at its target: log [p_t, p_n] of shape (rows, 2), and log p^ (rows, classes)."""
    index = target.unsqueeze(-1)
    excluded = torch.arange(logits.shape[-1], device=logits.device) == index
    log_others, lse_others = masked_log_softmax(logits, excluded)
    pair = torch.stack([logits.gather(-1, index).squeeze(-1), lse_others], -1)
    # A row that is all -inf is NaN through its pair, which hangs on the target's logit alone there.
    # This term carries the NaN to the gradient of every class; in other rows both are exact zeros.
    dead = (pair == -torch.inf).all(-1, keepdim=True)
    row_sum = torch.where(dead, logits, 0.0).sum(-1, keepdim=True)
    lost = torch.where(dead, torch.nan, torch.ones_like(row_sum))
    return torch.log_softmax(pair, -1) + row_sum * lost, log_others


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
    log_q, log_q_others = decouple(student, target)
    log_p, log_p_others = decouple(teacher, target)
    return alpha * divergence(log_p, log_q) + beta * divergence(log_p_others, log_q_others)

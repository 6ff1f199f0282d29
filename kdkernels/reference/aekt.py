"""AEKT, Adaptive Explicit Knowledge Transfer (Park & Lee, 2024), reconstructed: the specification.

The paper's exact formula was not available; this is a reconstruction from its abstract. Explicit
knowledge (the teacher's confidence in the target class) is weighted by the teacher/student ratio,
implicit knowledge (the non-target classes) as in DKD. With TCKD and NCKD of ``dkd.py``:

    w = min(p_t / q_t, ratio_max), a constant (0 where p_t = 0)
    loss_row = alpha * w^kappa * TCKD + beta * NCKD               (times T^2, outside)

    d loss_row / d student_t = alpha w^kappa (q_t - p_t) / T
    d loss_row / d student_i = [ -alpha w^kappa (q_t - p_t) q^_i + beta (q^_i - p^_i) ] / T

kappa = 0 is exactly DKD. The weight is not differentiated: a student that is less sure of the
target than the teacher (w > 1) is pulled harder, a surer one (w < 1) is held back less.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._tracing import operand
from ._rows import rescale, weighted
from .dkd import split


def aekt(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    kappa: float = 1.0,
    ratio_max: float = 10.0,
    temperature: float = 4.0,
    standardize: bool = False,
) -> Tensor:
    """Loss of each row: (rows, classes) x (rows, classes) x (rows,) -> (rows,)."""
    student, teacher = rescale(student, teacher, temperature, standardize)
    rows = split(student, teacher, target)
    weight = weight_of_ratio(rows.log_p[:, 0], rows.d[:, 0].detach(), kappa, ratio_max)
    return weighted(weighted(rows.explicit(), weight), alpha) + weighted(rows.implicit(), beta)


def weight_of_ratio(log_p: Tensor, log_ratio: Tensor, kappa: float, ratio_max: float) -> Tensor:
    """min(p / q, ratio_max)^kappa of the target; a constant."""
    impossible = log_p == -torch.inf
    log_ratio = torch.where(impossible, 0.0, log_ratio)
    # By the logarithm, because a ratio that underflows may have a root that does not.
    bound = operand(ratio_max)
    bound = bound.log() if isinstance(bound, Tensor) else math.log(bound)
    weight = (log_ratio.clamp(max=bound) * operand(kappa)).exp()
    return torch.where(impossible, 0.0 ** operand(kappa), weight)

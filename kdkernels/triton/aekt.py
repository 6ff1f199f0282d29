"""AEKT (reconstructed): DKD with the target-class term weighted by the teacher/student ratio."""

from __future__ import annotations

import triton
import triton.language as tl

from . import dkd
from .numerics import weighted

FAMILY = "decoupled"
CENTRED = dkd.CENTRED
rule = dkd.rule
_decoupled = dkd.explicit


@triton.jit
def explicit(
    log_p_target, log_p_rest, log_q_target, log_q_rest, alpha, beta, kappa, ratio_max
):  # fmt: skip
    """As in DKD, with alpha times min(p_t / q_t, ratio_max)^kappa, a constant, for alpha.

    kappa = 0 gives 1 even at a ratio of 0, as 0^0 does.
    """
    value, slope, implicit = _decoupled(
        log_p_target, log_p_rest, log_q_target, log_q_rest, 1.0, beta, kappa, ratio_max
    )
    none = -float("inf")
    log_ratio = tl.where(log_p_target == none, none, log_p_target - log_q_target)
    bound = tl.log(ratio_max)
    log_ratio = tl.where(log_ratio > bound, bound, log_ratio)
    weight = tl.where(kappa == 0, 1.0, tl.exp(log_ratio * kappa))
    return weighted(weighted(value, weight), alpha), slope * weight * alpha, implicit

"""DKD: KD's rule on the classes other than the target, and again on target against the rest."""

from __future__ import annotations

import triton
import triton.language as tl

from . import kd
from .numerics import weighted

FAMILY = "decoupled"
CENTRED = kd.CENTRED
rule = kd.rule
_binary = kd.rule


@triton.jit
def explicit(
    log_p_target, log_p_rest, log_q_target, log_q_rest, alpha, beta, third, fourth
):  # fmt: skip
    """The target-class term, its derivative by the student's log-odds, and the other term's weight.

    The derivative alpha (q_t - p_t) is KD's slope at the target.
    """
    p_target = tl.exp(log_p_target)
    q_target = tl.exp(log_q_target)
    d_target = log_p_target - log_q_target
    on_target, slope = _binary(p_target, q_target, d_target, alpha, beta, third, fourth)
    d_rest = log_p_rest - log_q_rest
    p_rest, q_rest = tl.exp(log_p_rest), tl.exp(log_q_rest)
    on_rest, _ = _binary(p_rest, q_rest, d_rest, alpha, beta, third, fourth)
    return weighted(on_target + on_rest, alpha), alpha * slope, beta

"""KL and reverse KL weighted: the rule of w KL(p || q) + (1 - w) KL(q || p)."""

from __future__ import annotations

import triton
import triton.language as tl

from . import kd
from .numerics import weighted

FAMILY = "divergence"
CENTRED = False
_forward = kd.rule


@triton.jit
def rule(p, q, d, forward, second, third, fourth):
    """KD's value in both directions; d value / d log q of the reverse one is -q d, 0 where q is."""
    of_p, gap = _forward(p, q, d, forward, second, third, fourth)
    of_q, _ = _forward(q, p, -d, forward, second, third, fourth)
    reverse = 1.0 - forward
    slope = gap * forward + tl.where(q == 0, 0.0, -(q * d) * reverse)
    return weighted(of_p, forward) + weighted(of_q, reverse), slope

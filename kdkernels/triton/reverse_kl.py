"""Reverse KL: the rule of KL(q || p), q the student's probabilities."""

from __future__ import annotations

import triton
import triton.language as tl

from . import kd

FAMILY = "divergence"
CENTRED = False
_forward = kd.rule


@triton.jit
def rule(p, q, d, first, second, third, fourth):
    """KD's value with the roles exchanged; d value / d log q is -q d, which is 0 where q is."""
    value, _ = _forward(q, p, -d, first, second, third, fourth)
    return value, tl.where(q == 0, 0.0, -(q * d))

"""KD: the rule of KL(p || q), p the teacher's probabilities."""

from __future__ import annotations

import triton
import triton.language as tl

from .numerics import phi

FAMILY = "divergence"
CENTRED = True
"""The slopes of a row sum to 0, so that the gradient needs no sum over the row."""


@triton.jit
def rule(p, q, d, first, second, third, fourth):
    """Value and d value / d log q - which is q - p - of each class; d = log p - log q.

    The value p phi(d) = p log(p / q) - p + q is never negative, term by term, and adds up to the
    divergence because p and q sum to 1. Near d = 0 both come from the series, so that they keep
    their relative accuracy when student and teacher agree.
    """
    near = tl.abs(d) < 0.25
    series = phi(d)
    value = tl.where(near, p * series, (q - p) + p * d)
    slope = tl.where(near, p * (series - d), q - p)
    return tl.where(p == 0, q, value), tl.where(p == 0, q, slope)

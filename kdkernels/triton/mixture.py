"""Divergences from the mixture of teacher and student: the rule of JSD and the skew divergences."""

from __future__ import annotations

import triton
import triton.language as tl

from . import kd
from .numerics import log_terms

FAMILY = "divergence"
CENTRED = False
_forward = kd.rule


@triton.jit
def rule(p, q, d, of_p, of_q, a, b):
    """a p log(p / m) + b q log(q / m) with m = of_p p + of_q q, a mixture.

    Both divergences are sums of terms >= 0, m (x log x - (x - 1)) of the ratios x = p / m and
    q / m, which are 1 + of_q delta and 1 - of_p delta with delta = (p - q) / m, exact near
    equality. The slope per q has two forms, of which the first keeps its digits where x is near 1,
    however small a share is, and the second elsewhere.
    """
    _, gap = _forward(p, q, d, of_p, of_q, a, b)  # q - p, exact where both are nearly equal
    # A ratio of 1 / share, and that times its logarithm, must not overflow; nor 1 / m.
    share = 1e-304 if p.dtype == tl.float64 else 1e-35
    least = 2.3e-308 if p.dtype == tl.float64 else 1.2e-38
    of_p = tl.where(of_p < share, share, of_p)
    of_q = tl.where(of_q < share, share, of_q)
    m = of_p * p + of_q * q
    inverse = 1.0 / tl.where(m < least, least, m)
    delta = -gap * inverse
    z = -of_p * delta
    _, of_teacher, _ = log_terms(p * inverse, of_q * delta)
    log, of_student, under = log_terms(q * inverse, z)
    value = m * (a * of_teacher + b * of_student)
    value = tl.where(value < 0, 0.0, value)  # of numbers so small that they are no ratios
    near = -b * under - (a * of_q * of_q + b * of_p * of_p) * delta
    far = b * log - of_q * (a * of_q - b * of_p) * delta
    return value, q * tl.where(tl.abs(z) < 0.25, near, far)

"""Divergences from the mixture of teacher and student: the rule of JSD and the skew divergences."""

from __future__ import annotations

import triton
import triton.language as tl

from .numerics import expm1, log1p, phi

FAMILY = "divergence"
CENTRED = False


@triton.jit
def _log(x, less_one):
    """log(x), of which x - 1 is known as well, and better near 1."""
    near = tl.abs(less_one) < 0.5
    return tl.where(near, log1p(tl.where(near, less_one, 0.0)), tl.log(x))


@triton.jit
def rule(p, q, d, of_p, of_q, a, b):
    """a p log(p / m) + b q log(q / m) with m = of_p p + of_q q, a mixture.

    Each logarithm comes from the ratio of p and q, so that neither is the difference of larger
    ones. Both divergences are sums of terms >= 0, p (m / p - 1 + log(p / m)), whose parts m - p and
    m - q cancel in JSD; what remains of them is excess (q - p).
    """
    excess = a * of_q - b * of_p
    near = tl.abs(d) < 0.25
    # Bounded, because one that overflows belongs to a probability that is as good as 0.
    most = 1e300 if p.dtype == tl.float64 else 1e37
    p_over_q = p / q
    p_over_q = tl.where(p_over_q > most, most, p_over_q)
    q_over_p = q / p
    q_over_p = tl.where(q_over_p > most, most, q_over_p)
    less_one = tl.where(near, expm1(tl.where(near, d, 0.0)), p_over_q - 1.0)
    inverse_less_one = tl.where(near, expm1(tl.where(near, -d, 0.0)), q_over_p - 1.0)
    x = -_log(q_over_p * of_q + of_p, inverse_less_one * of_q)
    y = -_log(p_over_q * of_p + of_q, less_one * of_p)
    of_x = tl.where(near, phi(x), x)
    of_y = tl.where(near, phi(y), y)
    value = tl.where(p == 0, 0.0, p * of_x * a) + tl.where(q == 0, 0.0, q * of_y * b)
    value = value + tl.where(near, 0.0, (q - p) * excess)
    value = tl.where(value < 0, 0.0, value)  # of numbers so small that their products are 0
    ratio = less_one / (less_one * of_p + 1.0) * of_q  # p / m - 1
    return value, tl.where(q == 0, 0.0, q * (y * b - ratio * excess))

"""Generalised Jensen-Shannon divergence: the rule for 0 < beta < 1."""

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
def rule(p, q, d, beta, second, third, fourth):
    """beta p log(p / m) + (1 - beta) q log(q / m) with m = beta p + (1 - beta) q.

    Each logarithm comes from the ratio of p and q, so that neither is the difference of larger
    ones. Near p = q the value is made of terms >= 0, p (m / p - 1 + log(p / m)), whose parts m - p
    and m - q cancel in the sum.
    """
    of_q = 1.0 - beta
    near = tl.abs(d) < 0.25
    # Bounded, because one that overflows belongs to a probability that is as good as 0.
    most = 1e300 if p.dtype == tl.float64 else 1e38
    p_over_q = p / q
    p_over_q = tl.where(p_over_q > most, most, p_over_q)
    q_over_p = q / p
    q_over_p = tl.where(q_over_p > most, most, q_over_p)
    less_one = tl.where(near, expm1(tl.where(near, d, 0.0)), p_over_q - 1.0)
    inverse_less_one = tl.where(near, expm1(tl.where(near, -d, 0.0)), q_over_p - 1.0)
    x = -_log(q_over_p * of_q + beta, inverse_less_one * of_q)
    y = -_log(p_over_q * beta + of_q, less_one * beta)
    of_x = tl.where(near, phi(x), x)
    of_y = tl.where(near, phi(y), y)
    value = tl.where(p == 0, 0.0, p * of_x * beta) + tl.where(q == 0, 0.0, q * of_y * of_q)
    value = tl.where(value < 0, 0.0, value)  # of numbers so small that their products are 0
    return value, tl.where(q == 0, 0.0, q * y * of_q)

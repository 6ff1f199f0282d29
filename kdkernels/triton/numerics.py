"""Scalar functions that keep their relative accuracy where the textbook form cancels."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def phi(d):
    """exp(-d) - 1 + d for |d| <= 1/4, to the last bits: d^2/2 (1 - d/3 (1 - d/4 (1 - ...)))."""
    series = 1.0 - d * 0.0
    if d.dtype == tl.float64:
        for n in tl.static_range(0, 12):
            series = 1.0 - d * (1.0 / (14 - n)) * series
    else:
        for n in tl.static_range(0, 6):
            series = 1.0 - d * (1.0 / (8 - n)) * series
    return 0.5 * d * d * series


@triton.jit
def expm1(x):
    """exp(x) - 1, relative error of a few ulp; exact at -inf, inf and NaN."""
    near = tl.abs(x) < 0.25
    return tl.where(near, phi(tl.where(near, -x, 0.0)) + x, tl.exp(x) - 1.0)


@triton.jit
def log1p(x):
    """log(1 + x) for finite x >= -1, relative error of a few ulp; exact at -1 and NaN."""
    # log(1 + x) = log(u) x / (u - 1) with u the rounded 1 + x: the two rounding errors cancel
    # (Kahan). It needs the additions as written: see FUSE_MULTIPLY_ADD in launch.py.
    rounded = 1.0 + x
    gap = rounded - 1.0
    exact = gap == 0
    return tl.where(exact, x, tl.log(rounded) * (x / tl.where(exact, 1.0, gap)))


@triton.jit
def log_terms(x, z):
    """log x of x = 1 + z >= 0, of which z is known as well and better near 1; x log x - z and
    z - log x, both >= 0 and z^2 / 2 near 1, where each keeps its relative accuracy.

    Where x is 0, some number as low as that of a small probability, and -z.
    """
    close = tl.abs(z) < 0.25
    least = 1e-300 if x.dtype == tl.float64 else 1e-37
    far = tl.where(x < least, least, x)
    log = tl.where(close, log1p(tl.where(close, z, 0.0)), tl.log(far))
    under = tl.where(close, phi(tl.where(close, -log, 0.0)), z - log)
    over = tl.where(close, z * log - under, x * log - z)
    return log, over, under


@triton.jit
def softplus(x):
    """log(1 + exp(x)), relative error of a few ulp for any x, and exact at -inf, inf and NaN."""
    return tl.where(x > 0, x, 0.0) + log1p(tl.exp(-tl.abs(x)))


@triton.jit
def weighted(value, weight):
    """A term times its weight; 0 where the weight is 0, were the term infinite."""
    product = value * weight
    return tl.where((product != product) & (value == value), 0.0, product)

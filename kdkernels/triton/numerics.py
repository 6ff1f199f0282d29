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
def softplus(x):
    """log(1 + exp(x)), relative error of a few ulp for any x, and exact at -inf, inf and NaN."""
    small = tl.exp(-tl.abs(x))
    # log(1 + y) = log(u) y / (u - 1) with u the rounded 1 + y: the two rounding errors cancel
    # (Kahan). It needs the additions as written: see FUSE_MULTIPLY_ADD in launch.py.
    rounded = 1.0 + small
    gap = rounded - 1.0
    exact = gap == 0
    log1p = tl.where(exact, small, tl.log(rounded) * (small / tl.where(exact, 1.0, gap)))
    return tl.where(x > 0, x, 0.0) + log1p


@triton.jit
def weighted(value, weight):
    """A term times its weight; 0 where the weight is 0, were the term infinite."""
    product = value * weight
    return tl.where((product != product) & (value == value), 0.0, product)

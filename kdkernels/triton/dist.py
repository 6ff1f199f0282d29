"""DIST: the rule of 1 - Pearson correlation, for a row or a column."""

from __future__ import annotations

import triton
import triton.language as tl

FAMILY = "correlation"
SIGMOID = False
"""Of softmaxes."""


@triton.jit
def rule(aa, bb, ab, eps):
    """1 - r and its derivative by a, as the coefficients of a and of b.

    a, b are the centred student and teacher; aa, bb, ab their inner products. With
    D = |a| |b| + eps and r = ab / D: dr/da = b / D - a r |b| / (|a| D), whose second term, the
    derivative of a norm at 0, is 0 where |a| = 0.
    """
    norm_a = tl.sqrt(aa)
    norm_b = tl.sqrt(bb)
    product = norm_a * norm_b
    total = product + eps
    # A constant has the correlation 0, whatever eps is; so has what underflows with it.
    none = total < (2e-305 if total.dtype == tl.float64 else 1e-35)
    total = tl.where(none, 1.0, total)
    on_a = ab / total * norm_b / (tl.where(norm_a == 0, 1.0, norm_a) * total)
    value = tl.where(none, 1.0, (product - ab + eps) / total)
    # Of squares that are not normal numbers the derivative, of size 1 / aa, has no digits and may
    # overflow; infinity times what hardly varies would be NaN.
    lost = tl.abs(on_a) > (1e307 if total.dtype == tl.float64 else 2e37)
    on_a = tl.where(lost | (norm_a == 0), 0.0, on_a)
    return value, on_a, tl.where(none | lost, 0.0, -1.0 / total)

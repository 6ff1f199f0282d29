"""Total variation: the rule of half the sum of |p - q|, or (option 1) of the overlap."""

from __future__ import annotations

import triton
import triton.language as tl

from . import kd

FAMILY = "divergence"
CENTRED = False
_forward = kd.rule


@triton.jit
def rule(p, q, d, overlap, second, third, fourth):
    """KD's slope is q - p, exact where both are nearly equal."""
    _, gap = _forward(p, q, d, overlap, second, third, fourth)
    # Closer than that, the sign would be that of a rounding error.
    equal = q * (3.5527136788005009e-15 if p.dtype == tl.float64 else 1.9073486328125e-06)
    slope = tl.where(gap > equal, 0.5 * q, tl.where(gap < -equal, -0.5 * q, gap * 0.0))
    return tl.where(overlap == 0.0, 0.5 * tl.abs(gap), tl.minimum(p, q)), slope

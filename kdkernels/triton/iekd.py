"""IE-KD: the rule of the similarity of normalised factors (see ``reference/iekd.py``)."""

from __future__ import annotations

import triton
import triton.language as tl

FAMILY = "embedding"
EPS = 1e-12
"""Lower bound of a norm."""


@triton.jit
def element(x, t, COSINE: tl.constexpr):
    """The term of the sample's sum V, and the direction u of which sum(u x) is the projection P.

    L1: |x - t| and its sign. Cosine: (x - t)^2 / 2, which is 1 - cos without cancellation, and t,
    so that P is the cosine.
    """
    d = x - t
    if COSINE:
        return 0.5 * d * d, t
    else:
        return tl.abs(d), (d > 0).to(d.dtype) - (d < 0).to(d.dtype)


@triton.jit
def sample(unit, total, projection, INHERITS: tl.constexpr, COSINE: tl.constexpr):
    """A sample's value, and the sign that multiplies the projected direction in the gradient.

    ``unit``: both vectors have norm 1 (a norm below EPS leaves a shorter one).
    """
    one = tl.full(projection.shape, 1.0, projection.dtype)
    if not COSINE:
        sign = one if INHERITS else -one
        return sign * total, sign
    elif INHERITS:
        return tl.where(unit, total, 1.0 - projection), -one
    else:
        positive = (projection > 0).to(projection.dtype)
        return tl.abs(projection), positive - (projection < 0).to(projection.dtype)

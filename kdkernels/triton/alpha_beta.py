"""The alpha-beta divergence: its rule."""

from __future__ import annotations

import triton
import triton.language as tl

from .numerics import expm1, phi

FAMILY = "divergence"
CENTRED = False


@triton.jit
def rule(p, q, d, alpha, beta, third, fourth):
    """X f(x): X the larger probability to the power alpha + beta, x = |d|; see csrc/rules.

    ``a`` is the exponent of the smaller probability, ``b`` the other one.
    """
    total = alpha + beta
    of_student = d < 0
    a = tl.where(of_student, alpha, beta)
    b = tl.where(of_student, beta, alpha)
    x = tl.abs(d)
    larger = tl.where(of_student, q, p)
    none = larger == 0
    scale = tl.exp(tl.log(tl.where(none, 1.0, larger)) * total)
    y = tl.where(a == 0, 0.0, a * x)
    z = tl.where(b == 0, 0.0, b * x)
    decay = tl.exp(-y)
    lost = decay == 0
    near_y = y < 0.25
    near_z = z < 0.25
    small = tl.where(near_y, y, 0.0)
    # (1 - (1 + y) exp(-y)) / a, of which nothing is left near 0.
    close = small * small - (small + 1.0) * phi(small)
    far = tl.where(lost, 1.0, -expm1(-y) - tl.where(lost, 0.0, y) * decay)
    first = tl.where(near_y, close, far) / tl.where(a == 0, 1.0, a)
    # phi(z) / b exp(-y)
    small = tl.where(near_z, z, 0.0)
    second = tl.where(near_z, phi(small), expm1(-z) + z) / tl.where(b == 0, 1.0, b)
    second = tl.where(lost, 0.0, second * decay)
    f = tl.where(a == 0, 0.0, first) + tl.where(b == 0, 0.0, second)
    f = f / total
    own = tl.where(a == 0, x, -expm1(-y) / tl.where(a == 0, 1.0, a))
    others = tl.where(b == 0, x, -expm1(-z) / tl.where(b == 0, 1.0, b))
    fallen = tl.where(lost, 0.0, -others * decay)
    slope = tl.where(none, 0.0, scale * tl.where(of_student, own, fallen))
    return tl.where(none, 0.0, scale * f), slope

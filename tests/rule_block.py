"""A kernel that applies a Triton rule to one block of numbers."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def block(
    p_ptr, q_ptr, d_ptr, value_ptr, slope_ptr, first, second, third, fourth,
    RULE: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    at = tl.arange(0, SIZE)
    p, q, d = tl.load(p_ptr + at), tl.load(q_ptr + at), tl.load(d_ptr + at)
    value, slope = RULE(p, q, d, first, second, third, fourth)
    tl.store(value_ptr + at, value)
    tl.store(slope_ptr + at, slope)

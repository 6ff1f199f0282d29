"""The backward pass of a stored gradient: multiply by the upstream scalar, read on the device."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import launch


@triton.jit
def scale_kernel(
    gradient_ptr,  # (size,), dense
    upstream_ptr,  # ()
    size,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    upstream = tl.load(upstream_ptr).to(ACC)
    # The usual upstream gradient is 1: nothing is read, and the host never waits to find out.
    if upstream != 1.0:
        step = tl.num_programs(0).to(tl.int64) * BLOCK
        for start in range(program * BLOCK, size, step):
            index = start + tl.arange(0, BLOCK)
            inside = index < size
            value = tl.load(gradient_ptr + index, mask=inside, other=0.0)
            scaled = (value.to(ACC) * upstream).to(value.dtype)
            tl.store(gradient_ptr + index, scaled, mask=inside)


def scale_(gradient: Tensor, upstream: Tensor) -> Tensor:
    """``gradient *= upstream`` for a dense gradient, in its accumulation dtype."""
    size = gradient.numel()
    if size == 0:
        return gradient
    config = launch.scale_launch(size)
    with launch.on_device(gradient):
        scale_kernel[(config.programs,)](
            gradient,
            upstream,
            size,
            ACC=launch.accumulator(gradient.dtype),
            BLOCK=config.block,
            num_warps=config.num_warps,
            **launch.OPTIONS,
        )
    return gradient

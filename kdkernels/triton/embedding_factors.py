"""Factors against the teacher's, ROWS samples a program (IE-KD): norms, distances, gradients.

Both students share the sweeps, so the teacher is read once. A sample that fits one block is
*resident* (see ``row_kernel.py``); of a longer one every second sweep runs backwards, to find the
end of the sample in cache. A program owns its samples: no atomics, and no bit depends on the batch.
"""

from __future__ import annotations

from types import ModuleType

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._calls import FactorCall, numbers_of
from .._dtypes import working_dtype
from . import launch, rule_module
from .blocks import block_columns, narrowed


@triton.jit
def load_block(ptr, columns, stride, inside, ACC: tl.constexpr):
    """A block of samples; 0, which adds nothing to any sum, where there is none."""
    return tl.load(ptr + columns * stride, mask=inside, other=0.0).to(ACC)


@triton.jit
def norm(
    ptr,
    stride,
    exists,
    width,
    squares,
    EPS: tl.constexpr,
    RESIDENT: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """1 / max(norm, EPS), and whether the norm is at least EPS, so that its derivative counts."""
    total = squares.to(tl.float64)
    if squares.dtype == tl.float32:
        # Squares that left float32's range are summed again; which rows, decides no other row.
        outside = exists & ((squares <= 1e-30) | (squares >= 1e30))
        if tl.max(outside.to(tl.int32)) > 0:
            wide = tl.zeros_like(total)
            for start in range(0, BLOCK if RESIDENT else width, BLOCK):
                columns = block_columns(start, BLOCK)
                inside = outside & (columns < width)
                x = load_block(ptr, columns, stride, inside, tl.float64)
                wide += tl.sum(x * x, axis=1, keep_dims=True)
            total = tl.where(outside, wide, total)
    eps = tl.full([], EPS, tl.float64)
    if squares.dtype == tl.float64:
        scale = tl.full([], 1.0, tl.float64) + tl.zeros_like(total)
        # Likewise float64's; small squares are below EPS.
        outside = exists & (squares >= 1e300)
        if tl.max(outside.to(tl.int32)) > 0:
            shrink = tl.full([], 2.0**-600, tl.float64)
            wide = tl.zeros_like(total)
            for start in range(0, BLOCK if RESIDENT else width, BLOCK):
                columns = block_columns(start, BLOCK)
                inside = outside & (columns < width)
                x = load_block(ptr, columns, stride, inside, tl.float64) * shrink
                wide += tl.sum(x * x, axis=1, keep_dims=True)
            total = tl.where(outside, wide, total)
            scale = tl.where(outside, shrink, scale)
        length = tl.sqrt(total)
        small = length < eps * scale  # NaN is not small
        inverse = tl.where(small, 1.0 / eps, scale / length)
    else:
        length = tl.sqrt(total)
        small = length < eps
        inverse = (1.0 / tl.where(small, eps, length)).to(ACC)
    return inverse, small == 0


@triton.jit(do_not_specialize=("samples",))
def factor_kernel(
    inheritance_ptr,  # (samples, width), strided
    exploration_ptr,  # as inheritance
    teacher_ptr,  # as inheritance
    upstream_ptr,  # (), or None for 1
    loss_ptr,  # (samples,), or None
    inheritance_gradient_ptr,  # (samples, width), strided, or None
    exploration_gradient_ptr,  # likewise
    samples,
    width,
    inheritance_stride,
    inheritance_element_stride,
    exploration_stride,
    exploration_element_stride,
    teacher_stride,
    teacher_element_stride,
    inheritance_gradient_stride,
    inheritance_gradient_element_stride,
    exploration_gradient_stride,
    exploration_gradient_element_stride,
    inheritance_weight: tl.float64,
    exploration_weight: tl.float64,
    ELEMENT: tl.constexpr,
    SAMPLE: tl.constexpr,
    EPS: tl.constexpr,
    COSINE: tl.constexpr,
    RESIDENT: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    exists = row < samples
    inheritance_ptr += row * inheritance_stride
    exploration_ptr += row * exploration_stride
    teacher_ptr += row * teacher_stride
    inheritance_weight = tl.full([], inheritance_weight, ACC)
    exploration_weight = tl.full([], exploration_weight, ACC)
    end = BLOCK if RESIDENT else width
    last = 0 if RESIDENT else (width - 1) // BLOCK * BLOCK

    aa = tl.zeros([ROWS, 1], ACC)
    ee = aa
    tt = aa
    for start in range(0, end, BLOCK):
        columns = block_columns(start, BLOCK)
        inside = exists & (columns < width)
        a = load_block(inheritance_ptr, columns, inheritance_element_stride, inside, ACC)
        e = load_block(exploration_ptr, columns, exploration_element_stride, inside, ACC)
        t = load_block(teacher_ptr, columns, teacher_element_stride, inside, ACC)
        aa += tl.sum(a * a, axis=1, keep_dims=True)
        ee += tl.sum(e * e, axis=1, keep_dims=True)
        tt += tl.sum(t * t, axis=1, keep_dims=True)
    a_inverse, a_unit = norm(
        inheritance_ptr, inheritance_element_stride, exists, width, aa, EPS, RESIDENT, ACC, BLOCK
    )
    e_inverse, e_unit = norm(
        exploration_ptr, exploration_element_stride, exists, width, ee, EPS, RESIDENT, ACC, BLOCK
    )
    t_inverse, t_unit = norm(
        teacher_ptr, teacher_element_stride, exists, width, tt, EPS, RESIDENT, ACC, BLOCK
    )

    a_sum = tl.zeros([ROWS, 1], ACC)
    e_sum = a_sum
    a_along = a_sum
    e_along = a_sum
    for back in range(0, end, BLOCK):
        columns = block_columns(last - back, BLOCK)
        inside = exists & (columns < width)
        a = load_block(inheritance_ptr, columns, inheritance_element_stride, inside, ACC)
        e = load_block(exploration_ptr, columns, exploration_element_stride, inside, ACC)
        t = load_block(teacher_ptr, columns, teacher_element_stride, inside, ACC) * t_inverse
        a = a * a_inverse
        e = e * e_inverse
        term, direction = ELEMENT(a, t, COSINE)
        a_sum += tl.sum(term, axis=1, keep_dims=True)
        a_along += tl.sum(direction * a, axis=1, keep_dims=True)
        term, direction = ELEMENT(e, t, COSINE)
        e_sum += tl.sum(term, axis=1, keep_dims=True)
        e_along += tl.sum(direction * e, axis=1, keep_dims=True)
    a_value, a_sign = SAMPLE(a_unit & t_unit, a_sum, a_along, True, COSINE)
    e_value, e_sign = SAMPLE(e_unit & t_unit, e_sum, e_along, False, COSINE)
    if loss_ptr is not None:
        value = inheritance_weight * a_value + exploration_weight * e_value
        tl.store(loss_ptr + row, value, mask=exists)

    if upstream_ptr is not None:
        upstream = tl.load(upstream_ptr).to(ACC)
        inheritance_weight = inheritance_weight * upstream
        exploration_weight = exploration_weight * upstream
    # A norm below EPS is a constant: nothing is projected out.
    a_outer = inheritance_weight * a_sign * a_inverse
    e_outer = exploration_weight * e_sign * e_inverse
    a_pull = tl.where(a_unit, a_outer * a_along, 0.0)
    e_pull = tl.where(e_unit, e_outer * e_along, 0.0)
    if inheritance_gradient_ptr is not None:
        inheritance_gradient_ptr += row * inheritance_gradient_stride
    if exploration_gradient_ptr is not None:
        exploration_gradient_ptr += row * exploration_gradient_stride
    if inheritance_gradient_ptr is not None or exploration_gradient_ptr is not None:
        for start in range(0, end, BLOCK):
            columns = block_columns(start, BLOCK)
            inside = exists & (columns < width)
            t = load_block(teacher_ptr, columns, teacher_element_stride, inside, ACC) * t_inverse
            if inheritance_gradient_ptr is not None:
                a = load_block(inheritance_ptr, columns, inheritance_element_stride, inside, ACC)
                a = a * a_inverse
                term, direction = ELEMENT(a, t, COSINE)
                gradient = a_outer * direction - a_pull * a
                tl.store(
                    inheritance_gradient_ptr + columns * inheritance_gradient_element_stride,
                    narrowed(gradient, inheritance_gradient_ptr),
                    mask=inside,
                )
            if exploration_gradient_ptr is not None:
                e = load_block(exploration_ptr, columns, exploration_element_stride, inside, ACC)
                e = e * e_inverse
                term, direction = ELEMENT(e, t, COSINE)
                gradient = e_outer * direction - e_pull * e
                tl.store(
                    exploration_gradient_ptr + columns * exploration_gradient_element_stride,
                    narrowed(gradient, exploration_gradient_ptr),
                    mask=inside,
                )


def forward(
    inheritance: Tensor,  # (B, D), any strides
    exploration: Tensor,
    teacher: Tensor,
    call: FactorCall,
    need_inheritance: bool,
    need_exploration: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, 0-d, and the students' gradients, each like its student or empty."""
    dtype = working_dtype(inheritance, exploration, teacher)
    losses = teacher.new_empty(teacher.shape[0], dtype=dtype)
    three = inheritance, exploration, teacher
    gradients = _run(*three, call, None, losses, need_inheritance, need_exploration)
    return losses.sum(), *gradients


def backward(
    upstream: Tensor,  # ()
    inheritance: Tensor,
    exploration: Tensor,
    teacher: Tensor,
    call: FactorCall,
    need_inheritance: bool,
    need_exploration: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients times upstream, multiplied before they are rounded to the students' dtypes."""
    three = inheritance, exploration, teacher
    return _run(*three, call, upstream, None, need_inheritance, need_exploration)


def _run(
    inheritance: Tensor,
    exploration: Tensor,
    teacher: Tensor,
    call: FactorCall,
    upstream: Tensor | None,
    losses: Tensor | None,
    need_inheritance: bool,
    need_exploration: bool,
) -> tuple[Tensor, Tensor]:
    inheritance_weight, exploration_weight = numbers_of(call)
    cosine, reduction = call.cosine, call.reduction
    wanted = ((inheritance, need_inheritance), (exploration, need_exploration))
    gradients = [torch.empty_like(x) if need else None for x, need in wanted]
    samples, width = teacher.shape
    if samples:
        rule: ModuleType = rule_module("iekd")
        accumulator = launch.accumulator(inheritance.dtype, exploration.dtype, teacher.dtype)
        # Three inputs instead of a row's two: blocks of 4096 would spill.
        limits = launch.LIMITS._replace(streamed=launch.LIMITS.streamed // 2)
        config = launch.row_launch(width, accumulator.primitive_bitwidth // 8, limits)
        divisor = (1 if cosine else width) * (samples if reduction == 1 else 1)
        strides = [
            step
            for x in (inheritance, exploration, teacher, *gradients)
            for step in ((0, 0) if x is None else x.stride())
        ]
        with launch.on_device(teacher):
            factor_kernel[(triton.cdiv(samples, config.rows),)](
                inheritance,
                exploration,
                teacher,
                upstream,
                losses,
                *gradients,
                samples,
                width,
                *strides,
                inheritance_weight / divisor,
                exploration_weight / divisor,
                ELEMENT=rule.element,
                SAMPLE=rule.sample,
                EPS=rule.EPS,
                COSINE=cosine,
                RESIDENT=config.resident,
                ACC=accumulator,
                ROWS=config.rows,
                BLOCK=config.block,
                num_warps=config.num_warps,
                **launch.OPTIONS,
            )
    first, second = (
        x.new_empty([0]) if gradient is None else gradient
        for (x, _), gradient in zip(wanted, gradients, strict=True)
    )
    return first, second

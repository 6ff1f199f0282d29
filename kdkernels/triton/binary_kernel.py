"""The traversal of the row losses of the family ``binary``: one sweep, in which nothing couples the
classes of a row (see ``contract.py``)."""

from __future__ import annotations

import triton
import triton.language as tl

from .blocks import VARYING, block_columns, load_logits, narrowed, row_offset
from .numerics import weighted


@triton.jit(do_not_specialize=VARYING)
def binary_kernel(
    student_ptr,  # (rows, classes), strided
    teacher_ptr,  # (rows, classes), strided
    target_ptr,  # (rows,), strided, or None: only a mask
    token_weight_ptr,  # (rows,), or None for 1
    temperature_ptr,  # (rows,), or None for the number
    count_ptr,  # (), the rows that are not ignored, or None: the mean is already in scale
    upstream_ptr,  # (rows,), strided, or None for 1
    loss_ptr,  # (rows,), or None
    gradient_ptr,  # (rows, classes), strided, or None
    rows,
    classes,
    inner,
    student_outer_stride,
    student_inner_stride,
    student_class_stride,
    teacher_outer_stride,
    teacher_inner_stride,
    teacher_class_stride,
    gradient_outer_stride,
    gradient_inner_stride,
    gradient_class_stride,
    target_stride,
    upstream_stride,
    ignore_index,
    inverse_temperature: tl.float64,
    scale: tl.float64,
    first: tl.float64,
    second: tl.float64,
    third: tl.float64,
    fourth: tl.float64,
    RULE: tl.constexpr,
    TWO_LEVEL: tl.constexpr,
    RESIDENT: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    exists = row < rows
    first = tl.full([], first, ACC)
    second = tl.full([], second, ACC)
    third = tl.full([], third, ACC)
    fourth = tl.full([], fourth, ACC)
    if temperature_ptr is not None:
        k = 1.0 / tl.load(temperature_ptr + row, mask=exists, other=1.0).to(ACC)
    else:
        k = tl.full([], inverse_temperature, ACC)
    weight = tl.full([], scale, ACC) + tl.zeros([ROWS, 1], ACC)
    if count_ptr is not None:
        weight = weight / tl.maximum(tl.load(count_ptr), 1).to(ACC)
    if token_weight_ptr is not None:
        weight = weight * tl.load(token_weight_ptr + row, mask=exists, other=0.0).to(ACC)
    valid = exists  # an ignored row is not read at all
    if target_ptr is not None:
        index = tl.load(target_ptr + row * target_stride, mask=exists, other=0).to(tl.int64)
        valid = exists & (index != ignore_index)
    factor = weight * k
    if upstream_ptr is not None:
        upstream = tl.load(upstream_ptr + row * upstream_stride, mask=exists, other=0.0)
        factor = factor * upstream.to(ACC)

    student_ptr += row_offset(row, inner, student_outer_stride, student_inner_stride, TWO_LEVEL)
    teacher_ptr += row_offset(row, inner, teacher_outer_stride, teacher_inner_stride, TWO_LEVEL)
    if gradient_ptr is not None:
        gradient_ptr += row_offset(
            row, inner, gradient_outer_stride, gradient_inner_stride, TWO_LEVEL
        )
    value_sum = tl.zeros([ROWS, 1], ACC)
    for start in range(0, BLOCK if RESIDENT else classes, BLOCK):
        columns = block_columns(start, BLOCK)
        inside = valid & (columns < classes)
        student = load_logits(student_ptr, columns, student_class_stride, inside, ACC)
        teacher = load_logits(teacher_ptr, columns, teacher_class_stride, inside, ACC)
        # Near p = q the difference is small and exact, before the factor rounds it.
        value, slope = RULE(
            student * k, teacher * k, (teacher - student) * k, first, second, third, fourth
        )
        value_sum += tl.sum(tl.where(inside, value, 0.0), axis=1, keep_dims=True)
        if gradient_ptr is not None:
            gradient = tl.where(valid, slope * factor, 0.0)
            tl.store(
                gradient_ptr + columns * gradient_class_stride,
                narrowed(gradient, gradient_ptr),
                mask=exists & (columns < classes),
            )
    if loss_ptr is not None:
        value = tl.where(valid, weighted(value_sum, weight), 0.0)
        tl.store(loss_ptr + row, value, mask=exists)

"""The traversal of the correlation losses: four kernels, and here the two that walk rows.

With q, p the softmax or the sigmoids of student and teacher, a rule turns the inner products of
centred a and b - a row of q and p, or a column - into a value and the coefficients of a and b in
its derivative.

1. ``correlation_row_kernel``: normalisers, inner products, value and coefficients of each row. The
   mean of a softmax is 1 / classes; of sigmoids, which have no normaliser, it takes its place.
2. ``column_kernel``: means and inner products of each column, over a chunk of the rows. Raw second
   moments would cancel where a column is small, so tiles are centred and combined pairwise (Chan et
   al.), in a fixed order.
3. ``combine_kernel``: the same over the chunks; value and coefficients of each column.
4. ``gradient_kernel``: with G = d loss / d q from all coefficients, q (G - sum(q G)) / tau of a
   softmax, q (1 - q) G / tau of sigmoids.

Loops over a resident row have one iteration, as in ``row_kernel.py``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .blocks import (
    VARYING,
    add_to_normaliser,
    block_columns,
    finite_max,
    load_logits,
    narrowed,
    probability,
    row_offset,
    rows_that_count,
)


@triton.jit(do_not_specialize=VARYING)
def correlation_row_kernel(
    student_ptr,  # (rows, classes), strided
    teacher_ptr,  # (rows, classes), strided
    counted_ptr,  # (rows,) bools: which rows take part, or None for all
    count_ptr,  # (), the rows that count, or None: what a mean divides by is in weight
    loss_ptr,  # (rows,)
    statistics_ptr,  # (6, rows): maximum (or mean) and sum of student, of teacher; coefficients
    rows,
    classes,
    inner,
    student_outer_stride,
    student_inner_stride,
    student_class_stride,
    teacher_outer_stride,
    teacher_inner_stride,
    teacher_class_stride,
    inverse_tau: tl.float64,
    weight: tl.float64,
    eps: tl.float64,
    RULE: tl.constexpr,
    SIGMOID: tl.constexpr,
    TWO_LEVEL: tl.constexpr,
    RESIDENT: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    exists = row < rows
    counts = rows_that_count(row, exists, counted_ptr)
    k = tl.full([], inverse_tau, ACC)
    mean = 1.0 / tl.full([], classes, ACC)
    student_ptr += row_offset(row, inner, student_outer_stride, student_inner_stride, TWO_LEVEL)
    teacher_ptr += row_offset(row, inner, teacher_outer_stride, teacher_inner_stride, TWO_LEVEL)
    end = BLOCK if RESIDENT else classes
    last = 0 if RESIDENT else (classes - 1) // BLOCK * BLOCK

    student_max = tl.full([ROWS, 1], -float("inf"), ACC)
    teacher_max = student_max
    student_sum = tl.zeros([ROWS, 1], ACC)
    teacher_sum = student_sum
    if SIGMOID:  # differences to the first one: the mean of a constant row is that constant
        student = tl.load(student_ptr, mask=counts, other=0.0).to(ACC)
        teacher = tl.load(teacher_ptr, mask=counts, other=0.0).to(ACC)
        q_first = probability(student, 0.0, 1.0, k, SIGMOID)
        p_first = probability(teacher, 0.0, 1.0, k, SIGMOID)
    for start in range(0, end, BLOCK):
        columns = block_columns(start, BLOCK)
        inside = counts & (columns < classes)
        student = load_logits(student_ptr, columns, student_class_stride, inside, ACC)
        teacher = load_logits(teacher_ptr, columns, teacher_class_stride, inside, ACC)
        if SIGMOID:
            q = probability(student, 0.0, 1.0, k, SIGMOID) - q_first
            p = probability(teacher, 0.0, 1.0, k, SIGMOID) - p_first
            student_sum += tl.sum(tl.where(inside, q, 0.0), axis=1, keep_dims=True)
            teacher_sum += tl.sum(tl.where(inside, p, 0.0), axis=1, keep_dims=True)
        else:
            student_max, student_sum = add_to_normaliser(student_max, student_sum, student, k)
            teacher_max, teacher_sum = add_to_normaliser(teacher_max, teacher_sum, teacher, k)
    if SIGMOID:
        student_max = q_first + student_sum * mean
        teacher_max = p_first + teacher_sum * mean
        q_mean = student_max
        p_mean = teacher_max
    else:
        student_max = finite_max(student_max)
        teacher_max = finite_max(teacher_max)
        q_mean = mean
        p_mean = mean

    qq = tl.zeros([ROWS, 1], ACC)
    pp = tl.zeros([ROWS, 1], ACC)
    qp = tl.zeros([ROWS, 1], ACC)
    for back in range(0, end, BLOCK):
        columns = block_columns(last - back, BLOCK)
        inside = counts & (columns < classes)
        student = load_logits(student_ptr, columns, student_class_stride, inside, ACC)
        teacher = load_logits(teacher_ptr, columns, teacher_class_stride, inside, ACC)
        q = probability(student, student_max, student_sum, k, SIGMOID) - q_mean
        p = probability(teacher, teacher_max, teacher_sum, k, SIGMOID) - p_mean
        q = tl.where(inside, q, 0.0)
        p = tl.where(inside, p, 0.0)
        qq += tl.sum(q * q, axis=1, keep_dims=True)
        pp += tl.sum(p * p, axis=1, keep_dims=True)
        qp += tl.sum(q * p, axis=1, keep_dims=True)

    value, on_q, on_p = RULE(qq, pp, qp, tl.full([], eps, ACC))
    weight = tl.full([], weight, ACC)
    if count_ptr is not None:
        weight = weight / tl.maximum(tl.load(count_ptr), 1).to(ACC)
    tl.store(loss_ptr + row, tl.where(counts, value * weight, 0.0), mask=exists)
    step = tl.full([], rows, tl.int64)
    statistics_ptr += row
    tl.store(statistics_ptr, student_max, mask=exists)
    tl.store(statistics_ptr + step, student_sum, mask=exists)
    tl.store(statistics_ptr + 2 * step, teacher_max, mask=exists)
    tl.store(statistics_ptr + 3 * step, teacher_sum, mask=exists)
    tl.store(statistics_ptr + 4 * step, on_q * weight, mask=exists)
    tl.store(statistics_ptr + 5 * step, on_p * weight, mask=exists)


@triton.jit
def derivative(q, p, q_row, p_row, columns, column_ptr, classes, on_q, on_p, inside):
    """G = d loss / d q of a block, from the coefficients of its rows and of its columns."""
    step = tl.full([], classes, tl.int64)
    known = columns < classes
    q_mean = tl.load(column_ptr + columns, mask=known, other=0.0)
    p_mean = tl.load(column_ptr + step + columns, mask=known, other=0.0)
    on_q_column = tl.load(column_ptr + 2 * step + columns, mask=known, other=0.0)
    on_p_column = tl.load(column_ptr + 3 * step + columns, mask=known, other=0.0)
    by_row = on_q * (q - q_row) + on_p * (p - p_row)
    by_column = on_q_column * (q - q_mean) + on_p_column * (p - p_mean)
    return tl.where(inside, by_row + by_column, 0.0)


@triton.jit(do_not_specialize=VARYING)
def gradient_kernel(
    student_ptr,  # (rows, classes), strided
    teacher_ptr,  # (rows, classes), strided
    counted_ptr,  # (rows,) bools: which rows take part, or None for all
    statistics_ptr,  # (6, rows), from correlation_row_kernel
    column_ptr,  # (4, classes), from combine_kernel
    upstream_ptr,  # (), or None for 1
    gradient_ptr,  # (rows, classes), strided
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
    inverse_tau: tl.float64,
    SIGMOID: tl.constexpr,
    TWO_LEVEL: tl.constexpr,
    RESIDENT: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    exists = row < rows
    counts = rows_that_count(row, exists, counted_ptr)
    k = tl.full([], inverse_tau, ACC)
    factor = k
    if upstream_ptr is not None:
        factor = factor * tl.load(upstream_ptr).to(ACC)
    mean = 1.0 / tl.full([], classes, ACC)
    student_ptr += row_offset(row, inner, student_outer_stride, student_inner_stride, TWO_LEVEL)
    teacher_ptr += row_offset(row, inner, teacher_outer_stride, teacher_inner_stride, TWO_LEVEL)
    gradient_ptr += row_offset(row, inner, gradient_outer_stride, gradient_inner_stride, TWO_LEVEL)
    step = tl.full([], rows, tl.int64)
    statistics_ptr += row
    student_max = tl.load(statistics_ptr, mask=counts, other=0.0)
    student_sum = tl.load(statistics_ptr + step, mask=counts, other=1.0)
    teacher_max = tl.load(statistics_ptr + 2 * step, mask=counts, other=0.0)
    teacher_sum = tl.load(statistics_ptr + 3 * step, mask=counts, other=1.0)
    on_q = tl.load(statistics_ptr + 4 * step, mask=counts, other=0.0)
    on_p = tl.load(statistics_ptr + 5 * step, mask=counts, other=0.0)
    end = BLOCK if RESIDENT else classes
    last = 0 if RESIDENT else (classes - 1) // BLOCK * BLOCK

    q_row = mean
    p_row = mean
    if SIGMOID:
        q_row = student_max
        p_row = teacher_max

    along = tl.zeros([ROWS, 1], ACC)
    if not SIGMOID:
        for start in range(0, end, BLOCK):
            columns = block_columns(start, BLOCK)
            inside = counts & (columns < classes)
            student = load_logits(student_ptr, columns, student_class_stride, inside, ACC)
            teacher = load_logits(teacher_ptr, columns, teacher_class_stride, inside, ACC)
            q = probability(student, student_max, student_sum, k, SIGMOID)
            p = probability(teacher, teacher_max, teacher_sum, k, SIGMOID)
            g = derivative(q, p, q_row, p_row, columns, column_ptr, classes, on_q, on_p, inside)
            along += tl.sum(tl.where(inside, q, 0.0) * g, axis=1, keep_dims=True)
    for back in range(0, end, BLOCK):
        columns = block_columns(last - back, BLOCK)
        inside = counts & (columns < classes)
        student = load_logits(student_ptr, columns, student_class_stride, inside, ACC)
        teacher = load_logits(teacher_ptr, columns, teacher_class_stride, inside, ACC)
        q = probability(student, student_max, student_sum, k, SIGMOID)
        p = probability(teacher, teacher_max, teacher_sum, k, SIGMOID)
        g = derivative(q, p, q_row, p_row, columns, column_ptr, classes, on_q, on_p, inside)
        moved = q * (1.0 - q) * g if SIGMOID else q * (g - along)
        gradient = tl.where(counts, moved * factor, 0.0)
        tl.store(
            gradient_ptr + columns * gradient_class_stride,
            narrowed(gradient, gradient_ptr),
            mask=exists & (columns < classes),
        )

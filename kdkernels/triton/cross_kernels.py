"""The traversal of the correlation losses: four kernels.

With q, p the softmax of student and teacher, a rule turns the inner products of centred a and b -
a row of q and p, or a column - into a value and the coefficients of a and b in its derivative.

1. ``row_kernel``: normalisers, inner products, value and coefficients of each row. The mean of a
   row is 1 / classes.
2. ``column_kernel``: means and inner products of each column, over a chunk of the rows. Raw second
   moments would cancel where a column is small, so tiles are centred and combined pairwise (Chan et
   al.), in a fixed order.
3. ``combine_kernel``: the same over the chunks; value and coefficients of each column.
4. ``gradient_kernel``: with G = d loss / d q from all coefficients, q (G - sum(q G)) / tau.

Loops over a resident row have one iteration, as in ``row_kernel.py``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .blocks import add_to_normaliser, block_columns, finite_max, load_logits, row_offset

VARYING = ("rows", "inner", "chunk_rows", "chunks")


@triton.jit
def softmax(logits, maximum, total, k):
    return tl.exp((logits - maximum) * k) / total


@triton.jit(do_not_specialize=VARYING)
def row_kernel(
    student_ptr,  # (rows, classes), strided
    teacher_ptr,  # (rows, classes), strided
    loss_ptr,  # (rows,)
    statistics_ptr,  # (6, rows): maximum and sum of student, of teacher; coefficients of q, of p
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
    TWO_LEVEL: tl.constexpr,
    RESIDENT: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    exists = row < rows
    k = tl.full([], inverse_tau, ACC)
    weight = tl.full([], weight, ACC)
    mean = 1.0 / tl.full([], classes, ACC)
    student_ptr += row_offset(row, inner, student_outer_stride, student_inner_stride, TWO_LEVEL)
    teacher_ptr += row_offset(row, inner, teacher_outer_stride, teacher_inner_stride, TWO_LEVEL)
    end = BLOCK if RESIDENT else classes
    last = 0 if RESIDENT else (classes - 1) // BLOCK * BLOCK

    student_max = tl.full([ROWS, 1], -float("inf"), ACC)
    teacher_max = student_max
    student_sum = tl.zeros([ROWS, 1], ACC)
    teacher_sum = student_sum
    for start in range(0, end, BLOCK):
        columns = block_columns(start, BLOCK)
        inside = exists & (columns < classes)
        student = load_logits(student_ptr, columns, student_class_stride, inside, ACC)
        teacher = load_logits(teacher_ptr, columns, teacher_class_stride, inside, ACC)
        student_max, student_sum = add_to_normaliser(student_max, student_sum, student, k)
        teacher_max, teacher_sum = add_to_normaliser(teacher_max, teacher_sum, teacher, k)
    student_max = finite_max(student_max)
    teacher_max = finite_max(teacher_max)

    qq = tl.zeros([ROWS, 1], ACC)
    pp = tl.zeros([ROWS, 1], ACC)
    qp = tl.zeros([ROWS, 1], ACC)
    for back in range(0, end, BLOCK):
        columns = block_columns(last - back, BLOCK)
        inside = exists & (columns < classes)
        student = load_logits(student_ptr, columns, student_class_stride, inside, ACC)
        teacher = load_logits(teacher_ptr, columns, teacher_class_stride, inside, ACC)
        q = tl.where(inside, softmax(student, student_max, student_sum, k) - mean, 0.0)
        p = tl.where(inside, softmax(teacher, teacher_max, teacher_sum, k) - mean, 0.0)
        qq += tl.sum(q * q, axis=1, keep_dims=True)
        pp += tl.sum(p * p, axis=1, keep_dims=True)
        qp += tl.sum(q * p, axis=1, keep_dims=True)

    value, on_q, on_p = RULE(qq, pp, qp, tl.full([], eps, ACC))
    tl.store(loss_ptr + row, value * weight, mask=exists)
    step = tl.full([], rows, tl.int64)
    statistics_ptr += row
    tl.store(statistics_ptr, student_max, mask=exists)
    tl.store(statistics_ptr + step, student_sum, mask=exists)
    tl.store(statistics_ptr + 2 * step, teacher_max, mask=exists)
    tl.store(statistics_ptr + 3 * step, teacher_sum, mask=exists)
    tl.store(statistics_ptr + 4 * step, on_q * weight, mask=exists)
    tl.store(statistics_ptr + 5 * step, on_p * weight, mask=exists)


@triton.jit
def centre(q, p, inside, count):
    """Means and inner products of the columns of a tile; (1, BLOCK) each."""
    q_mean = tl.sum(tl.where(inside, q, 0.0), axis=0, keep_dims=True) / count
    p_mean = tl.sum(tl.where(inside, p, 0.0), axis=0, keep_dims=True) / count
    q = tl.where(inside, q - q_mean, 0.0)
    p = tl.where(inside, p - p_mean, 0.0)
    q_error = tl.sum(q, axis=0, keep_dims=True) / count
    p_error = tl.sum(p, axis=0, keep_dims=True) / count
    q = tl.where(inside, q - q_error, 0.0)
    p = tl.where(inside, p - p_error, 0.0)
    qq = tl.sum(q * q, axis=0, keep_dims=True)
    pp = tl.sum(p * p, axis=0, keep_dims=True)
    qp = tl.sum(q * p, axis=0, keep_dims=True)
    return q_mean + q_error, p_mean + p_error, qq, pp, qp


@triton.jit(do_not_specialize=VARYING)
def column_kernel(
    student_ptr,  # (rows, classes), strided
    teacher_ptr,  # (rows, classes), strided
    statistics_ptr,  # (6, rows)
    partial_ptr,  # (5, chunks, classes): mean of q, of p, inner products qq, pp, qp
    rows,
    classes,
    inner,
    chunk_rows,
    chunks,
    student_outer_stride,
    student_inner_stride,
    student_class_stride,
    teacher_outer_stride,
    teacher_inner_stride,
    teacher_class_stride,
    inverse_tau: tl.float64,
    TWO_LEVEL: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(classes, BLOCK)
    chunk = program // blocks
    columns = block_columns(program % blocks * BLOCK, BLOCK)
    k = tl.full([], inverse_tau, ACC)
    step = tl.full([], rows, tl.int64)
    begin = chunk * chunk_rows
    stop = tl.minimum(begin + chunk_rows, step)

    q_mean = tl.zeros([1, BLOCK], ACC)
    p_mean = tl.zeros([1, BLOCK], ACC)
    qq = tl.zeros([1, BLOCK], ACC)
    pp = tl.zeros([1, BLOCK], ACC)
    qp = tl.zeros([1, BLOCK], ACC)
    for tile in range(begin, stop, ROWS):
        row = (tile + tl.arange(0, ROWS).to(tl.int64))[:, None]
        exists = row < stop
        inside = exists & (columns < classes)
        student_max = tl.load(statistics_ptr + row, mask=exists, other=0.0)
        student_sum = tl.load(statistics_ptr + step + row, mask=exists, other=1.0)
        teacher_max = tl.load(statistics_ptr + 2 * step + row, mask=exists, other=0.0)
        teacher_sum = tl.load(statistics_ptr + 3 * step + row, mask=exists, other=1.0)
        student_row = student_ptr + row_offset(
            row, inner, student_outer_stride, student_inner_stride, TWO_LEVEL
        )
        teacher_row = teacher_ptr + row_offset(
            row, inner, teacher_outer_stride, teacher_inner_stride, TWO_LEVEL
        )
        student = load_logits(student_row, columns, student_class_stride, inside, ACC)
        teacher = load_logits(teacher_row, columns, teacher_class_stride, inside, ACC)
        q = softmax(student, student_max, student_sum, k)
        p = softmax(teacher, teacher_max, teacher_sum, k)

        count = tl.full([], tl.minimum(stop - tile, ROWS), ACC)
        before = tl.full([], tile - begin, ACC)
        tile_q, tile_p, tile_qq, tile_pp, tile_qp = centre(q, p, inside, count)
        q_delta = tile_q - q_mean
        p_delta = tile_p - p_mean
        share = count / (before + count)
        q_mean += q_delta * share
        p_mean += p_delta * share
        qq += tile_qq + q_delta * q_delta * (before * share)
        pp += tile_pp + p_delta * p_delta * (before * share)
        qp += tile_qp + q_delta * p_delta * (before * share)

    step = tl.full([], chunks, tl.int64) * classes
    partial_ptr += chunk * classes + columns
    inside = columns < classes
    tl.store(partial_ptr, q_mean, mask=inside)
    tl.store(partial_ptr + step, p_mean, mask=inside)
    tl.store(partial_ptr + 2 * step, qq, mask=inside)
    tl.store(partial_ptr + 3 * step, pp, mask=inside)
    tl.store(partial_ptr + 4 * step, qp, mask=inside)


@triton.jit(do_not_specialize=VARYING)
def combine_kernel(
    partial_ptr,  # (5, chunks, classes), from column_kernel
    loss_ptr,  # (classes,)
    statistics_ptr,  # (4, classes): mean of q, of p; coefficients of q, of p
    rows,
    classes,
    chunk_rows,
    chunks,
    weight: tl.float64,
    eps: tl.float64,
    RULE: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    columns = block_columns(tl.program_id(0).to(tl.int64) * BLOCK, BLOCK)
    weight = tl.full([], weight, ACC)
    total = tl.full([], rows, tl.int64)
    step = tl.full([], chunks, tl.int64) * classes

    # The chunks' means first, then their inner products about the common means.
    q_mean = tl.zeros([1, BLOCK], ACC)
    p_mean = tl.zeros([1, BLOCK], ACC)
    for start in range(0, chunks, ROWS):
        chunk = (start + tl.arange(0, ROWS).to(tl.int64))[:, None]
        inside = (chunk < chunks) & (columns < classes)
        share = tl.minimum(total - chunk * chunk_rows, chunk_rows).to(ACC) / total.to(ACC)
        source = partial_ptr + chunk * classes + columns
        q = tl.load(source, mask=inside, other=0.0)
        p = tl.load(source + step, mask=inside, other=0.0)
        q_mean += tl.sum(q * share, axis=0, keep_dims=True)
        p_mean += tl.sum(p * share, axis=0, keep_dims=True)
    qq = tl.zeros([1, BLOCK], ACC)
    pp = tl.zeros([1, BLOCK], ACC)
    qp = tl.zeros([1, BLOCK], ACC)
    for start in range(0, chunks, ROWS):
        chunk = (start + tl.arange(0, ROWS).to(tl.int64))[:, None]
        inside = (chunk < chunks) & (columns < classes)
        count = tl.minimum(total - chunk * chunk_rows, chunk_rows).to(ACC)
        source = partial_ptr + chunk * classes + columns
        q = tl.where(inside, tl.load(source, mask=inside, other=0.0) - q_mean, 0.0)
        p = tl.where(inside, tl.load(source + step, mask=inside, other=0.0) - p_mean, 0.0)
        chunk_qq = tl.load(source + 2 * step, mask=inside, other=0.0)
        chunk_pp = tl.load(source + 3 * step, mask=inside, other=0.0)
        chunk_qp = tl.load(source + 4 * step, mask=inside, other=0.0)
        qq += tl.sum(chunk_qq + q * q * count, axis=0, keep_dims=True)
        pp += tl.sum(chunk_pp + p * p * count, axis=0, keep_dims=True)
        qp += tl.sum(chunk_qp + q * p * count, axis=0, keep_dims=True)

    value, on_q, on_p = RULE(qq, pp, qp, tl.full([], eps, ACC))
    inside = columns < classes
    tl.store(loss_ptr + columns, value * weight, mask=inside)
    statistics_ptr += columns
    tl.store(statistics_ptr, q_mean, mask=inside)
    tl.store(statistics_ptr + classes, p_mean, mask=inside)
    tl.store(statistics_ptr + 2 * tl.full([], classes, tl.int64), on_q * weight, mask=inside)
    tl.store(statistics_ptr + 3 * tl.full([], classes, tl.int64), on_p * weight, mask=inside)


@triton.jit
def derivative(q, p, mean, columns, column_ptr, classes, on_q, on_p, inside):
    """G = d loss / d q of a block, from the coefficients of its rows and of its columns."""
    step = tl.full([], classes, tl.int64)
    known = columns < classes
    q_mean = tl.load(column_ptr + columns, mask=known, other=0.0)
    p_mean = tl.load(column_ptr + step + columns, mask=known, other=0.0)
    on_q_column = tl.load(column_ptr + 2 * step + columns, mask=known, other=0.0)
    on_p_column = tl.load(column_ptr + 3 * step + columns, mask=known, other=0.0)
    by_row = on_q * (q - mean) + on_p * (p - mean)
    by_column = on_q_column * (q - q_mean) + on_p_column * (p - p_mean)
    return tl.where(inside, by_row + by_column, 0.0)


@triton.jit(do_not_specialize=VARYING)
def gradient_kernel(
    student_ptr,  # (rows, classes), strided
    teacher_ptr,  # (rows, classes), strided
    statistics_ptr,  # (6, rows), from row_kernel
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
    TWO_LEVEL: tl.constexpr,
    RESIDENT: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    exists = row < rows
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
    student_max = tl.load(statistics_ptr, mask=exists, other=0.0)
    student_sum = tl.load(statistics_ptr + step, mask=exists, other=1.0)
    teacher_max = tl.load(statistics_ptr + 2 * step, mask=exists, other=0.0)
    teacher_sum = tl.load(statistics_ptr + 3 * step, mask=exists, other=1.0)
    on_q = tl.load(statistics_ptr + 4 * step, mask=exists, other=0.0)
    on_p = tl.load(statistics_ptr + 5 * step, mask=exists, other=0.0)
    end = BLOCK if RESIDENT else classes
    last = 0 if RESIDENT else (classes - 1) // BLOCK * BLOCK

    along = tl.zeros([ROWS, 1], ACC)
    for start in range(0, end, BLOCK):
        columns = block_columns(start, BLOCK)
        inside = exists & (columns < classes)
        student = load_logits(student_ptr, columns, student_class_stride, inside, ACC)
        teacher = load_logits(teacher_ptr, columns, teacher_class_stride, inside, ACC)
        q = softmax(student, student_max, student_sum, k)
        p = softmax(teacher, teacher_max, teacher_sum, k)
        g = derivative(q, p, mean, columns, column_ptr, classes, on_q, on_p, inside)
        along += tl.sum(tl.where(inside, q, 0.0) * g, axis=1, keep_dims=True)
    for back in range(0, end, BLOCK):
        columns = block_columns(last - back, BLOCK)
        inside = exists & (columns < classes)
        student = load_logits(student_ptr, columns, student_class_stride, inside, ACC)
        teacher = load_logits(teacher_ptr, columns, teacher_class_stride, inside, ACC)
        q = softmax(student, student_max, student_sum, k)
        p = softmax(teacher, teacher_max, teacher_sum, k)
        g = derivative(q, p, mean, columns, column_ptr, classes, on_q, on_p, inside)
        gradient = q * (g - along) * factor
        tl.store(
            gradient_ptr + columns * gradient_class_stride,
            gradient.to(gradient_ptr.dtype.element_ty),
            mask=inside,
        )

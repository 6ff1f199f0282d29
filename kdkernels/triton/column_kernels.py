"""Centred moments of the columns, in chunks of the rows (see ``cross_kernels.py``)."""

from __future__ import annotations

import triton
import triton.language as tl

from .blocks import VARYING, block_columns, load_logits, probability, row_offset, rows_that_count


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
    counted_ptr,  # (rows,) bools: which rows take part, or None for all
    statistics_ptr,  # (6, rows)
    partial_ptr,  # (5, chunks, classes): mean of q, of p, inner products qq, pp, qp
    counts_ptr,  # (chunks,): rows that count
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
    SIGMOID: tl.constexpr,
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
    counted = tl.zeros([], tl.int64)
    for tile in range(begin, stop, ROWS):
        row = (tile + tl.arange(0, ROWS).to(tl.int64))[:, None]
        exists = rows_that_count(row, row < stop, counted_ptr)
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
        q = probability(student, student_max, student_sum, k, SIGMOID)
        p = probability(teacher, teacher_max, teacher_sum, k, SIGMOID)

        number = tl.sum(exists.to(tl.int64))
        count = number.to(ACC)
        before = counted.to(ACC)
        tile_q, tile_p, tile_qq, tile_pp, tile_qp = centre(q, p, inside, tl.maximum(count, 1.0))
        q_delta = tile_q - q_mean
        p_delta = tile_p - p_mean
        share = count / tl.maximum(before + count, 1.0)
        q_mean += q_delta * share
        p_mean += p_delta * share
        qq += tile_qq + q_delta * q_delta * (before * share)
        pp += tile_pp + p_delta * p_delta * (before * share)
        qp += tile_qp + q_delta * p_delta * (before * share)
        counted += number

    tl.store(counts_ptr + chunk, counted)  # the same by all blocks of columns
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
    count_ptr,  # (), the rows that count, or None for all
    counts_ptr,  # (chunks,), from column_kernel
    loss_ptr,  # (classes,)
    statistics_ptr,  # (4, classes): mean of q, of p; coefficients of q, of p
    rows,
    classes,
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
    if count_ptr is not None:
        total = tl.load(count_ptr)
        weight = tl.where(total > 0, weight, 0.0)  # columns of nothing
        total = tl.maximum(total, 1)
    step = tl.full([], chunks, tl.int64) * classes

    # The chunks' means first, then their inner products about the common means.
    q_mean = tl.zeros([1, BLOCK], ACC)
    p_mean = tl.zeros([1, BLOCK], ACC)
    for start in range(0, chunks, ROWS):
        chunk = (start + tl.arange(0, ROWS).to(tl.int64))[:, None]
        inside = (chunk < chunks) & (columns < classes)
        count = tl.load(counts_ptr + chunk, mask=chunk < chunks, other=0).to(ACC)
        share = count / total.to(ACC)
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
        count = tl.load(counts_ptr + chunk, mask=chunk < chunks, other=0).to(ACC)
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

"""What the traversals share on the device: addresses, normalisers and moments of rows in blocks.

A program walks ROWS rows at once; one value a row has shape (ROWS, 1), a block (ROWS, BLOCK).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .numerics import log1p

VARYING = ("rows", "inner", "chunk_rows", "chunks", "ignore_index")
"""Sizes that differ from call to call: they must not recompile, nor change how a row is summed."""


@triton.jit
def narrowed(value, pointer):
    """A value in the type that a pointer stores; float64 becomes bfloat16 by way of float32, as
    Triton's interpreter has no direct conversion (it takes the wrong bits)."""
    if pointer.dtype.element_ty == tl.bfloat16:
        value = value.to(tl.float32)
    return value.to(pointer.dtype.element_ty)


@triton.jit
def row_offset(row, inner, outer_stride, inner_stride, TWO_LEVEL: tl.constexpr):
    """Where rows start (see ``layout.Rows``); ``row`` is int64, so every product is."""
    if TWO_LEVEL:
        return row // inner * outer_stride + row % inner * inner_stride
    else:
        return row * inner_stride


@triton.jit
def block_columns(start, BLOCK: tl.constexpr):
    """Class indices (1, BLOCK), int64."""
    return (start + tl.arange(0, BLOCK).to(tl.int64))[None, :]


@triton.jit
def rows_that_count(row, exists, counted_ptr):
    """Of rows that exist those that a mask counts, where there is one."""
    if counted_ptr is not None:
        exists = exists & (tl.load(counted_ptr + row, mask=exists, other=0) != 0)
    return exists


@triton.jit
def load_logits(row_ptr, columns, stride, inside, ACC: tl.constexpr):
    """A block of logits; -inf, a class without probability, where there is none."""
    return tl.load(row_ptr + columns * stride, mask=inside, other=-float("inf")).to(ACC)


@triton.jit
def finite_max(maximum):
    """A maximum that can be subtracted: 0 where there is nothing but -inf."""
    return tl.where(maximum == -float("inf"), 0.0, maximum)


@triton.jit
def add_to_normaliser(maximum, total, logits, k):
    """Extend a row's maximum and sum of exp(k (logits - maximum)), begun at (-inf, 0), by a block.

    The sum stays 0 while all are -inf, and is NaN after NaN or inf.
    """
    larger = tl.maximum(maximum, tl.max(logits, axis=1, keep_dims=True))
    shift = finite_max(larger)
    total = total * tl.exp((maximum - shift) * k)
    return larger, total + tl.sum(tl.exp((logits - shift) * k), axis=1, keep_dims=True)


@triton.jit
def add_to_rest(maximum, larger, total, rest, logits, k):
    """Extend the part of the sum that the classes at the maximum have not; before ``total``."""
    shift = finite_max(larger)
    before = tl.where(maximum < larger, total * tl.exp((maximum - shift) * k), rest)
    others = tl.where(logits == larger, 0.0, tl.exp((logits - shift) * k))
    return before + tl.sum(others, axis=1, keep_dims=True)


@triton.jit
def log_ratio_of_sums(student_sum, teacher_sum, student_rest, teacher_rest):
    """log(teacher_sum / student_sum); of certain rows from the rests, whose digits 1 + x loses."""
    certain = (student_sum < 1.125) & (teacher_sum < 1.125) & (teacher_sum > 0) & (student_sum > 0)
    gap = (teacher_rest - student_rest) / student_sum
    near = log1p(tl.where(certain, gap, 0.0))
    return tl.where(certain, near, tl.log(teacher_sum / student_sum))


@triton.jit
def centred_moments(values, inside, count, axis: tl.constexpr):
    """Mean and sum of squared deviations of ``count`` values, corrected for the mean's rounding."""
    mean = tl.sum(tl.where(inside, values, 0.0), axis=axis, keep_dims=True) / count
    rest = tl.where(inside, values - mean, 0.0)
    error = tl.sum(rest, axis=axis, keep_dims=True) / count
    rest = tl.where(inside, rest - error, 0.0)
    return mean + error, tl.sum(rest * rest, axis=axis, keep_dims=True)


@triton.jit
def add_to_moments(mean, squares, before, values, inside, count):
    """Extend the moments of ``before`` values of a row by a block of ``count`` (Chan et al.)."""
    block_mean, block_squares = centred_moments(values, inside, count, 1)
    delta = block_mean - mean
    share = count / (before + count)
    return mean + delta * share, squares + block_squares + delta * delta * (before * share)


@triton.jit
def softmax(logits, maximum, total, k):
    """Probabilities from a row's normaliser."""
    return tl.exp((logits - maximum) * k) / total


@triton.jit
def probability(logits, maximum, total, k, SIGMOID: tl.constexpr):
    """That of a softmax from its row's normaliser, or the sigmoid of the logit alone."""
    if SIGMOID:
        x = logits * k
        e = tl.exp(-tl.abs(x))
        return tl.where(x < 0, e, 1.0) / (1.0 + e)
    else:
        return softmax(logits, maximum, total, k)

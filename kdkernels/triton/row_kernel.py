"""The traversal of the row losses, families ``divergence`` and ``decoupled``: the kernel.

With p, q the softmax of k t and k s, a rule gives each class a value and a slope, the derivative of
the value by log q (see ``contract.py``); the gradient by the logits is k (slope - q sum(slope)). In
the decoupled family the target is left out of p and q (its logit counts as -inf), and an explicit
rule of the log-odds of the target against the rest is added; those log-odds need no log(1 - x),
only the normaliser of the rest.

A row that fits one block is *resident*: the loops have one iteration, which the compiler unrolls,
and then reads each logit once. A longer row is *streamed*: normalisers in a first sweep, values and
gradient in a second, which runs backwards to find the end of the row in cache. Logit
standardisation, and rules whose slopes do not sum to 0, add a sweep. Such a rule's slopes are taken
relative to those of the student's most likely class, in units of q: the projection does not feel
it, and what cancels is small where the student is certain.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .blocks import (
    VARYING,
    add_to_moments,
    add_to_normaliser,
    add_to_rest,
    block_columns,
    finite_max,
    load_logits,
    log_ratio_of_sums,
    narrowed,
    row_offset,
)
from .numerics import softplus, weighted


@triton.jit
def log_odds(target_ptr, target_mask, maximum, total, k, ACC: tl.constexpr):
    """Log-odds of the target against the rest; NaN if both are -inf or any is NaN or inf."""
    logit = tl.load(target_ptr, mask=target_mask, other=0.0).to(ACC)
    logit = tl.where(logit == float("inf"), float("nan"), logit)
    return (logit - maximum) * k - tl.log(total)


@triton.jit
def terms(
    student, teacher, student_k, teacher_k, student_sum, teacher_sum, log_ratio, pivot,
    first, second, third, fourth, RULE: tl.constexpr, CENTRED: tl.constexpr,
    STANDARDIZE: tl.constexpr,
):  # fmt: skip
    """q, and the rule's value and slope, of a block of logits from which the maxima are taken."""
    q = tl.exp(student * student_k) / student_sum
    p = tl.exp(teacher * teacher_k) / teacher_sum
    if STANDARDIZE:
        gap = teacher * teacher_k - student * student_k
    else:
        # Near p = q the difference is small and exact, before the factor rounds it.
        gap = (teacher - student) * student_k
    value, slope = RULE(p, q, gap - log_ratio, first, second, third, fourth)
    if not CENTRED:
        slope = slope - q * pivot
    return q, value, slope


@triton.jit
def slope_of_likeliest(
    teacher, student_k, teacher_k, student_sum, teacher_sum, log_ratio,
    first, second, third, fourth, RULE: tl.constexpr, STANDARDIZE: tl.constexpr,
):  # fmt: skip
    """The slope, in units of q, of the student's most likely class."""
    zero = tl.zeros_like(teacher)
    q, _, slope = terms(
        zero, teacher, student_k, teacher_k, student_sum, teacher_sum, log_ratio, zero,
        first, second, third, fourth, RULE, True, STANDARDIZE,
    )  # fmt: skip
    return slope / q


@triton.jit(do_not_specialize=VARYING)
def row_kernel(
    student_ptr,  # (rows, classes), strided
    teacher_ptr,  # (rows, classes), strided
    target_ptr,  # (rows,), strided, or None
    token_weight_ptr,  # (rows,), or None for 1
    hard_token_weight_ptr,  # (rows,), or None for 1
    temperature_ptr,  # (rows,), or None for the number
    count_ptr,  # (), the rows that are not ignored, or None: the mean is already in scale
    upstream_ptr,  # (rows,), strided, or None for 1
    loss_ptr,  # (rows,), or None
    parts_ptr,  # (3, rows): divergence, cross-entropy, entropy; or None
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
    hard: tl.float64,
    first: tl.float64,
    second: tl.float64,
    third: tl.float64,
    fourth: tl.float64,
    RULE: tl.constexpr,
    EXPLICIT: tl.constexpr,
    CENTRED: tl.constexpr,
    STANDARDIZE: tl.constexpr,
    HARD: tl.constexpr,
    EPS: tl.constexpr,
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
        student_k = 1.0 / tl.load(temperature_ptr + row, mask=exists, other=1.0).to(ACC)
    else:
        student_k = tl.full([], inverse_temperature, ACC)
    teacher_k = student_k
    weight = tl.full([], scale, ACC) + tl.zeros([ROWS, 1], ACC)
    hard_weight = tl.full([], hard, ACC) + tl.zeros([ROWS, 1], ACC)
    if count_ptr is not None:
        count = tl.maximum(tl.load(count_ptr), 1).to(ACC)
        weight = weight / count
        hard_weight = hard_weight / count
    if token_weight_ptr is not None:
        weight = weight * tl.load(token_weight_ptr + row, mask=exists, other=0.0).to(ACC)
    if hard_token_weight_ptr is not None:
        its_weight = tl.load(hard_token_weight_ptr + row, mask=exists, other=0.0).to(ACC)
        hard_weight = hard_weight * its_weight

    # An ignored row is not read at all; a target that is no class makes the row NaN.
    valid = exists
    target = tl.full([ROWS, 1], -1, tl.int64)
    if target_ptr is not None:
        index = tl.load(target_ptr + row * target_stride, mask=exists, other=0).to(tl.int64)
        valid = exists & (index != ignore_index)
        if HARD or EXPLICIT is not None:
            known = (index >= 0) & (index < classes)
            if EXPLICIT is not None:
                weight = tl.where(known, weight, float("nan"))
            hard_weight = tl.where(known, hard_weight, float("nan"))
            target = tl.where(known, index, 0)

    student_ptr += row_offset(row, inner, student_outer_stride, student_inner_stride, TWO_LEVEL)
    teacher_ptr += row_offset(row, inner, teacher_outer_stride, teacher_inner_stride, TWO_LEVEL)
    end = BLOCK if RESIDENT else classes
    last = 0 if RESIDENT else (classes - 1) // BLOCK * BLOCK

    if STANDARDIZE:
        # Deviations from the first logit, so that a common offset of the row costs no accuracy.
        student_base = tl.load(student_ptr, mask=valid, other=0.0).to(ACC)
        teacher_base = tl.load(teacher_ptr, mask=valid, other=0.0).to(ACC)
        student_mean = tl.zeros([ROWS, 1], ACC)
        teacher_mean = tl.zeros([ROWS, 1], ACC)
        student_squares = tl.zeros([ROWS, 1], ACC)
        teacher_squares = tl.zeros([ROWS, 1], ACC)
        for start in range(0, end, BLOCK):
            columns = block_columns(start, BLOCK)
            inside = valid & (columns < classes)
            student = load_logits(student_ptr, columns, student_class_stride, inside, ACC)
            teacher = load_logits(teacher_ptr, columns, teacher_class_stride, inside, ACC)
            before = tl.full([], start, ACC)
            count = tl.full([], tl.minimum(classes - start, BLOCK), ACC)
            student_mean, student_squares = add_to_moments(
                student_mean, student_squares, before, student - student_base, inside, count
            )
            teacher_mean, teacher_squares = add_to_moments(
                teacher_mean, teacher_squares, before, teacher - teacher_base, inside, count
            )
        freedom = tl.full([], classes - 1, ACC)
        student_std = tl.sqrt(student_squares / freedom)
        student_scale = student_std + EPS
        teacher_k = student_k / (tl.sqrt(teacher_squares / freedom) + EPS)
        student_k = student_k / student_scale

    student_max = tl.full([ROWS, 1], -float("inf"), ACC)
    teacher_max = student_max
    likeliest_teacher = student_max  # the teacher's logit where the student's is largest
    student_sum = tl.zeros([ROWS, 1], ACC)
    teacher_sum = student_sum
    one = tl.full([], 1.0, ACC)
    hard_max = student_max  # of the classes other than the target, at temperature 1
    hard_sum = student_sum
    student_rest = student_sum  # without the likeliest class
    teacher_rest = student_sum
    for start in range(0, end, BLOCK):
        columns = block_columns(start, BLOCK)
        inside = valid & (columns < classes)
        student = load_logits(student_ptr, columns, student_class_stride, inside, ACC)
        teacher = load_logits(teacher_ptr, columns, teacher_class_stride, inside, ACC)
        if HARD:
            others = tl.where(columns == target, -float("inf"), student)
            hard_max, hard_sum = add_to_normaliser(hard_max, hard_sum, others, one)
        if EXPLICIT is not None:
            student = tl.where(columns == target, -float("inf"), student)
            teacher = tl.where(columns == target, -float("inf"), teacher)
        if not CENTRED:
            best = tl.max(student, axis=1, keep_dims=True)
            there = tl.where(student == best, teacher, -float("inf"))
            there = tl.max(there, axis=1, keep_dims=True)
            likeliest_teacher = tl.where(best > student_max, there, likeliest_teacher)
        old_student, old_teacher = student_max, teacher_max
        old_student_sum, old_teacher_sum = student_sum, teacher_sum
        student_max, student_sum = add_to_normaliser(student_max, student_sum, student, student_k)
        teacher_max, teacher_sum = add_to_normaliser(teacher_max, teacher_sum, teacher, teacher_k)
        if not CENTRED:
            student_rest = add_to_rest(
                old_student, student_max, old_student_sum, student_rest, student, student_k
            )
            teacher_rest = add_to_rest(
                old_teacher, teacher_max, old_teacher_sum, teacher_rest, teacher, teacher_k
            )
    student_max = finite_max(student_max)
    teacher_max = finite_max(teacher_max)
    hard_max = finite_max(hard_max)

    hard_value = tl.zeros([ROWS, 1], ACC)
    if HARD:
        # From the log-odds of the target against the others, so that 1 - probability is none.
        odds = log_odds(
            student_ptr + target * student_class_stride, valid, hard_max, hard_sum, one, ACC
        )
        hard_value = softplus(-odds)
        hard_others = tl.exp(-softplus(odds))
        hard_factor = tl.where(hard_sum == 0, 0.0, hard_others / hard_sum)

    if EXPLICIT is not None:
        q_odds = log_odds(
            student_ptr + target * student_class_stride,
            valid, student_max, student_sum, student_k, ACC,
        )  # fmt: skip
        p_odds = log_odds(
            teacher_ptr + target * teacher_class_stride,
            valid, teacher_max, teacher_sum, teacher_k, ACC,
        )  # fmt: skip
        explicit_value, explicit_slope, implicit = EXPLICIT(
            -softplus(-p_odds),
            -softplus(p_odds),
            -softplus(-q_odds),
            -softplus(q_odds),
            first,
            second,
            third,
            fourth,
        )
        # Without any other class p and q are 0, not 0 / 0, and nothing flows into the others.
        no_teacher = teacher_sum == 0
        nothing = no_teacher | (student_sum == 0)
        teacher_sum = tl.where(no_teacher, 1.0, teacher_sum)
        student_sum = tl.where(student_sum == 0, 1.0, student_sum)
    if CENTRED:
        log_ratio = tl.log(teacher_sum / student_sum)
    else:
        log_ratio = log_ratio_of_sums(student_sum, teacher_sum, student_rest, teacher_rest)

    if upstream_ptr is not None:
        upstream = tl.load(upstream_ptr + row * upstream_stride, mask=exists, other=0.0).to(ACC)
    else:
        upstream = tl.full([ROWS, 1], 1.0, ACC)
    if gradient_ptr is not None:
        gradient_ptr += row_offset(
            row, inner, gradient_outer_stride, gradient_inner_stride, TWO_LEVEL
        )
    gradient_weight = weight * upstream * student_k
    if HARD:
        hard_factor = hard_factor * hard_weight * upstream
        hard_others = hard_others * hard_weight * upstream

    pivot = tl.zeros([ROWS, 1], ACC)
    if not CENTRED:
        pivot = slope_of_likeliest(
            likeliest_teacher - teacher_max, student_k, teacher_k, student_sum, teacher_sum,
            log_ratio, first, second, third, fourth, RULE, STANDARDIZE,
        )  # fmt: skip

    # Sums over the row that the gradient needs, if any: everything is linear in the slopes.
    slope_sum = tl.zeros([ROWS, 1], ACC)
    slope_h = tl.zeros([ROWS, 1], ACC)
    q_h = tl.zeros([ROWS, 1], ACC)
    target_h = tl.zeros([ROWS, 1], ACC)
    if gradient_ptr is not None and (STANDARDIZE or not CENTRED):
        for start in range(0, end, BLOCK):
            columns = block_columns(start, BLOCK)
            inside = valid & (columns < classes)
            student = load_logits(student_ptr, columns, student_class_stride, inside, ACC)
            teacher = load_logits(teacher_ptr, columns, teacher_class_stride, inside, ACC)
            if STANDARDIZE:
                h = tl.where(inside, student - student_base - student_mean, 0.0) / student_scale
            if EXPLICIT is not None:
                student = tl.where(columns == target, -float("inf"), student)
                teacher = tl.where(columns == target, -float("inf"), teacher)
            q, value, slope = terms(
                student - student_max, teacher - teacher_max, student_k, teacher_k,
                student_sum, teacher_sum, log_ratio, pivot, first, second, third, fourth,
                RULE, CENTRED, STANDARDIZE,
            )  # fmt: skip
            slope_sum += tl.sum(slope, axis=1, keep_dims=True)
            if STANDARDIZE:
                slope_h += tl.sum(slope * h, axis=1, keep_dims=True)
                q_h += tl.sum(q * h, axis=1, keep_dims=True)
                target_h += tl.sum(tl.where(columns == target, h, 0.0), axis=1, keep_dims=True)
        if CENTRED:
            slope_sum = slope_sum * 0.0
        if STANDARDIZE:
            along = slope_h - slope_sum * q_h
            if EXPLICIT is not None:
                along = implicit * tl.where(nothing, 0.0, along) + explicit_slope * (target_h - q_h)
            # The derivative of a standard deviation at 0 is taken as 0.
            constant = student_std == 0
            ratio = student_scale / (tl.where(constant, 1.0, student_std) * freedom)
            along = tl.where(constant, 0.0, along * ratio)

    value_sum = tl.zeros([ROWS, 1], ACC)
    log_sum = value_sum  # of q times its logarithm, but for the normaliser's
    for back in range(0, end, BLOCK):
        columns = block_columns(last - back, BLOCK)
        inside = valid & (columns < classes)
        student = load_logits(student_ptr, columns, student_class_stride, inside, ACC)
        teacher = load_logits(teacher_ptr, columns, teacher_class_stride, inside, ACC)
        if STANDARDIZE:
            h = tl.where(inside, student - student_base - student_mean, 0.0) / student_scale
        if HARD:
            hard_gradient = tl.exp(student - hard_max) * hard_factor
            hard_gradient = tl.where(columns == target, -hard_others, hard_gradient)
        if EXPLICIT is not None:
            student = tl.where(columns == target, -float("inf"), student)
            teacher = tl.where(columns == target, -float("inf"), teacher)
        q, value, slope = terms(
            student - student_max, teacher - teacher_max, student_k, teacher_k,
            student_sum, teacher_sum, log_ratio, pivot, first, second, third, fourth,
            RULE, CENTRED, STANDARDIZE,
        )  # fmt: skip
        value_sum += tl.sum(value, axis=1, keep_dims=True)
        if parts_ptr is not None:
            log_q = tl.where(q == 0, 0.0, (student - student_max) * student_k)
            log_sum += tl.sum(q * log_q, axis=1, keep_dims=True)
        if gradient_ptr is not None:
            gradient = slope
            if not CENTRED:
                gradient = gradient - q * slope_sum
            if EXPLICIT is not None:
                gradient = implicit * tl.where(nothing, 0.0, gradient) - explicit_slope * q
                gradient = tl.where(columns == target, explicit_slope, gradient)
            if STANDARDIZE:
                gradient = gradient - along * h
            gradient = gradient * gradient_weight
            if HARD:
                gradient += hard_gradient
            gradient = tl.where(valid, gradient, 0.0)
            tl.store(
                gradient_ptr + columns * gradient_class_stride,
                narrowed(gradient, gradient_ptr),
                mask=exists & (columns < classes),
            )

    if loss_ptr is not None:
        if EXPLICIT is not None:
            value_sum = tl.where(no_teacher, 0.0, value_sum)
            value_sum = explicit_value + weighted(value_sum, implicit)
        value = tl.where(valid, weighted(value_sum, weight), 0.0)
        hard_value = tl.where(valid, weighted(hard_value, hard_weight), 0.0)
        tl.store(loss_ptr + row, value + hard_value if HARD else value, mask=exists)
        if parts_ptr is not None:
            entropy = tl.where(student_sum == 0, 0.0, tl.log(student_sum) - log_sum)
            if EXPLICIT is not None:
                if_target, if_other = -softplus(-q_odds), -softplus(q_odds)
                target_share, other_share = tl.exp(if_target), tl.exp(if_other)
                entropy = tl.where(other_share == 0, 0.0, other_share * (entropy - if_other))
                entropy -= tl.where(target_share == 0, 0.0, target_share * if_target)
            at = parts_ptr + row
            tl.store(at, value, mask=exists)
            tl.store(at + rows, hard_value, mask=exists)
            tl.store(at + 2 * tl.cast(rows, tl.int64), tl.where(valid, entropy, 0.0), mask=exists)

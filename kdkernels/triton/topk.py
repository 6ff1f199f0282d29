"""Rows of logits against K ids each (``reference/topk.py``): kernels and their launch.

Both kernels walk a row in blocks. The ids are sorted by the host, so that a program finds those of
its block as a run of them and marks each by a comparison with the block's classes. The backward
kernel has a program for each block: it reads nothing but its own block of the logits, over which
the gradient may be written. Ids that are out of range or twice in a row make the row NaN.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._calls import NO_ID, TopKCall, numbers_of
from . import launch
from .blocks import (
    add_to_normaliser,
    block_columns,
    finite_max,
    load_logits,
    narrowed,
)
from .numerics import expm1, softplus

FAMILY = "sparse"
VARYING = ("rows", "classes", "k", "ignore_index")
BEYOND = 2**62
"""An id after all others."""


@triton.jit
def log_of_sum(maximum, total):
    """The logarithm of ``total exp(maximum)``; -inf where there is nothing."""
    some = total != 0
    return tl.where(some, maximum + tl.log(tl.where(some, total, 1.0)), -float("inf"))


@triton.jit
def add_sum(maximum, total, other, others):
    """The sum of two sums of exponentials, each with its maximum."""
    larger = tl.maximum(maximum, other)
    shift = finite_max(larger)
    return larger, total * tl.exp(maximum - shift) + others * tl.exp(other - shift)


@triton.jit
def temperature_of(temperature_ptr, row, temperature, ACC: tl.constexpr):
    if temperature_ptr is None:
        return (tl.zeros((1, 1), ACC) + temperature).to(ACC)
    else:
        return tl.load(temperature_ptr + row + tl.arange(0, 1)[None, :]).to(ACC)


@triton.jit(do_not_specialize=VARYING)
def topk_kernel(
    student_ptr,  # (rows, classes)
    ids_ptr,  # (rows, k)
    ordered_ptr,  # (rows, k), the ids in ascending order
    target_ptr,  # (rows,), or None
    temperature_ptr,  # (rows,), or None for the number
    small_ptr,  # (rows, k + 1)
    numbers_ptr,  # (6, rows)
    rows,
    classes,
    k,
    ignore_index,
    temperature: tl.float64,
    SWEEP: tl.constexpr,
    REST: tl.constexpr,
    HARD: tl.constexpr,
    ENTROPY: tl.constexpr,
    ABSENT: tl.constexpr,
    BEYOND: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    none = -float("inf")
    one = tl.arange(0, 1)[None, :]
    heat = temperature_of(temperature_ptr, row, temperature, ACC)
    live = one == 0
    target = one.to(tl.int64) - 1
    if target_ptr is not None:
        target = tl.load(target_ptr + row + one).to(tl.int64)
        live = target != ignore_index
    entry = tl.arange(0, ENTRIES)[None, :]
    inside = entry < k
    base = row * k + entry
    ordered = tl.load(ordered_ptr + base, mask=inside, other=BEYOND)
    after = tl.load(ordered_ptr + base + 1, mask=entry + 1 < k, other=BEYOND)
    bad = (ordered < 0) | (ordered >= classes) | ((ordered == after) & (entry + 1 < k))
    bad = bad & inside & (ordered != ABSENT)
    if HARD:
        bad = bad | ((target < 0) | (target >= classes))
    wrong = tl.sum(bad.to(tl.int32)) > 0

    row_ptr = student_ptr + row * classes
    maximum = tl.full((1, 1), none, ACC)
    total = tl.zeros((1, 1), ACC)
    hard_total = tl.zeros((1, 1), ACC)
    moment = tl.zeros((1, 1), ACC)
    at_target = tl.full((1, 1), none, ACC)
    if SWEEP:
        begin = tl.sum((ordered < 0).to(tl.int32))
        for start in range(0, classes, BLOCK):
            columns = block_columns(start, BLOCK)
            logits = load_logits(row_ptr, columns, 1, (columns < classes) & live, ACC)
            end = tl.sum((ordered < start + BLOCK).to(tl.int32))
            apart = columns == -1
            if HARD:
                apart = columns == target
                mine = tl.where(apart, logits, none)
                at_target = tl.maximum(at_target, tl.max(mine, axis=1, keep_dims=True))
                # A maximum may pass over NaN.
                at_target += tl.sum(tl.where(apart & (logits != logits), logits, 0.0))
            for i in range(begin, end):
                apart = apart | (columns == tl.load(ordered_ptr + row * k + i))
            begin = end
            logits = tl.where(apart, none, logits)
            before, old = maximum, total
            maximum, total = add_to_normaliser(before, old, logits, 1.0 / heat)
            shift = finite_max(maximum)
            if HARD:
                _, hard_total = add_to_normaliser(before, hard_total, logits, 1.0)
            if ENTROPY:
                gap = tl.where(before == none, 0.0, before - shift)
                e = tl.exp((logits - shift) / heat)
                moment = (moment + gap * old) * tl.exp(gap / heat)
                moment += tl.sum(
                    tl.where(e == 0, 0.0, (logits - shift) * e), axis=1, keep_dims=True
                )
    # Read late, so that no register holds them in the loop.
    ids = tl.load(ids_ptr + base, mask=inside, other=ABSENT)
    valid = (ids >= 0) & (ids < classes)
    at = tl.load(row_ptr + ids, mask=valid & live, other=none).to(ACC)
    origin = tl.maximum(maximum, tl.max(at, axis=1, keep_dims=True))
    if HARD:
        origin = tl.maximum(origin, at_target)
    origin = finite_max(origin)
    nan = tl.where(wrong, float("nan"), 0.0).to(ACC)
    scaled = tl.where(valid, (at - origin) / heat, none)
    hard = tl.zeros((1, 1), ACC)
    others = tl.zeros((1, 1), ACC)
    if HARD:
        own = valid & (ids == target)
        x = tl.where(own, none, at - origin)
        largest = tl.max(x, axis=1, keep_dims=True)
        sums = tl.sum(tl.exp(x - finite_max(largest)), axis=1, keep_dims=True)
        largest, sums = add_sum(largest, sums, maximum - origin, hard_total)
        others = log_of_sum(largest, sums)
        # A target of +inf makes the row NaN.
        hard = softplus(
            others - tl.where(at_target == float("inf"), float("nan"), at_target - origin)
        )
        alone = tl.where(tl.sum(own.to(tl.int32)) == 0, at_target, none)
        top = tl.maximum(maximum, alone)
        shift = finite_max(top)
        rest_sum = tl.where(total == 0, 0.0, total * tl.exp((maximum - shift) / heat))
        rest_sum += tl.exp((alone - shift) / heat)
    else:
        top, rest_sum = maximum, total
    rest_log = log_of_sum(one.to(ACC), rest_sum)
    rest = (finite_max(top) - origin) / heat + rest_log if REST else tl.full((1, 1), none, ACC)
    entropy = tl.zeros((1, 1), ACC)
    if ENTROPY:
        mean = (moment / heat + (maximum - origin) / heat * total) * tl.exp(
            (maximum - origin) / heat
        )
        mean = tl.where(total == 0, 0.0, mean)
        e = tl.exp(scaled)
        mean += tl.sum(tl.where(e == 0, 0.0, scaled * e), axis=1, keep_dims=True)
        if HARD:
            y = tl.where(alone == none, 0.0, (alone - origin) / heat)
            mean += tl.where(alone == none, 0.0, y * tl.exp(y))
        weight = tl.exp((finite_max(top) - origin) / heat + rest_log) + tl.sum(
            e, axis=1, keep_dims=True
        )
        entropy = tl.log(weight) - mean / weight
    small = small_ptr + row * (k + 1)
    tl.store(small + entry, tl.where(live, scaled + nan, 0.0), mask=inside)
    tl.store(small + k + one, tl.where(live, rest + nan, 0.0))
    tl.store(numbers_ptr + row + one, tl.where(live, origin, 0.0))
    tl.store(numbers_ptr + rows + row + one, tl.where(live, others, 0.0))
    tl.store(numbers_ptr + 2 * rows + row + one, tl.where(live, hard + nan, 0.0))
    tl.store(numbers_ptr + 3 * rows + row + one, tl.where(live, entropy + nan, 0.0))
    some = live & (rest != none)
    tl.store(numbers_ptr + 4 * rows + row + one, tl.where(some, finite_max(top), 0.0))
    tl.store(numbers_ptr + 5 * rows + row + one, tl.where(some, rest_log, 0.0))


@triton.jit(do_not_specialize=VARYING)
def topk_gradient_kernel(
    gradient_ptr,  # (rows, classes), which may be the student
    small_ptr,  # (rows, k + 1)
    numbers_ptr,  # (6, rows)
    upstream_ptr,  # (rows, k + 1)
    hard_upstream_ptr,  # (rows,), or None
    student_ptr,  # (rows, classes)
    ordered_ptr,  # (rows, k), the ids in ascending order
    places_ptr,  # (rows, k), where each was
    target_ptr,  # (rows,), or None
    temperature_ptr,  # (rows,), or None for the number
    rows,
    classes,
    k,
    ignore_index,
    temperature: tl.float64,
    BEYOND: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1).to(tl.int64) * BLOCK
    none = -float("inf")
    one = tl.arange(0, 1)[None, :]
    heat = temperature_of(temperature_ptr, row, temperature, ACC)
    live = one == 0
    if target_ptr is not None:
        target = tl.load(target_ptr + row + one).to(tl.int64)
        live = target != ignore_index
    columns = block_columns(start, BLOCK)
    inside = columns < classes
    entry = tl.arange(0, ENTRIES)[None, :]
    ordered = tl.load(ordered_ptr + row * k + entry, mask=entry < k, other=BEYOND)
    begin = tl.sum((ordered < start).to(tl.int32))
    if start == 0:
        begin = tl.sum((ordered < 0).to(tl.int32))
    end = tl.sum((ordered < start + BLOCK).to(tl.int32))

    rest = tl.load(small_ptr + row * (k + 1) + k + one)
    of_rest = tl.load(upstream_ptr + row * (k + 1) + k + one)
    of_rest = tl.where(rest == none, 0.0, of_rest)
    # What a class that may be an id has instead of a share of the rest.
    apart = columns == -1
    own = tl.zeros((1, BLOCK), ACC)
    for i in range(begin, end):
        here = columns == tl.load(ordered_ptr + row * k + i)
        place = tl.load(places_ptr + row * k + i)
        own = tl.where(here, tl.load(upstream_ptr + row * (k + 1) + place), own)
        apart = apart | here
    logits = load_logits(student_ptr + row * classes, columns, 1, inside & live, ACC)
    top = tl.load(numbers_ptr + 4 * rows + row + one)
    rest_log = tl.load(numbers_ptr + 5 * rows + row + one)
    x = tl.where(apart, none, (logits - top) / heat - rest_log)
    share = tl.where(of_rest == 0, 0.0, of_rest * tl.exp(x))
    out = tl.where(apart, own, share) / heat
    if hard_upstream_ptr is not None:
        others = tl.load(numbers_ptr + rows + row + one)
        missed = -expm1(-tl.load(numbers_ptr + 2 * rows + row + one))
        b = tl.load(hard_upstream_ptr + row + one) * missed
        x = logits - tl.load(numbers_ptr + row + one) - others
        x = tl.where((columns == target) | (others == none), none, x)
        out += tl.where(columns == target, -b, tl.where(b == 0, 0.0, b * tl.exp(x)))
    out = tl.where(live, out, 0.0)
    tl.store(gradient_ptr + row * classes + columns, narrowed(out, gradient_ptr), mask=inside)


def _block(classes: int, accumulator: tl.dtype) -> int:
    share = accumulator.primitive_bitwidth // 32
    return min(launch.power_of_two(classes), max(launch.LIMITS.tile // share, 1))


def _warps(k: int) -> int:
    """A program holds all ids of its row."""
    return 4 if k <= 256 else 8


def forward(
    student: Tensor,  # (rows, classes), contiguous
    ids: Tensor,  # (rows, k)
    target: Tensor | None,  # (rows,)
    row_temperature: Tensor | None,  # (rows,)
    call: TopKCall,
) -> tuple[Tensor, Tensor]:
    """The small logits, (rows, k + 1), and the numbers, (6, rows)."""
    (temperature,) = numbers_of(call)
    rows, classes = student.shape
    k = ids.shape[1]
    wide = call.wide or student.dtype == torch.float64
    dtype = torch.float64 if wide else torch.float32
    small = student.new_empty((rows, k + 1), dtype=dtype)
    numbers = student.new_empty((6, rows), dtype=dtype)
    if rows == 0:
        return small, numbers
    accumulator = launch.accumulator(dtype)
    block = _block(classes, accumulator)
    ordered = ids.sort(-1).values
    with launch.on_device(student):
        topk_kernel[(rows,)](
            student,
            ids,
            ordered,
            target,
            row_temperature,
            small,
            numbers,
            rows,
            classes,
            k,
            call.ignore_index,
            temperature,
            SWEEP=call.rest or call.hard or call.entropy,
            REST=call.rest,
            HARD=call.hard,
            ENTROPY=call.entropy,
            ABSENT=NO_ID,
            BEYOND=BEYOND,
            ACC=accumulator,
            BLOCK=block,
            ENTRIES=launch.power_of_two(k),
            num_warps=_warps(k),
            **launch.OPTIONS,
        )
    return small, numbers


def backward(
    gradient: Tensor,  # (rows, classes), contiguous; it may be the student
    small: Tensor,
    numbers: Tensor,
    upstream: Tensor,  # as small
    hard_upstream: Tensor | None,  # (rows,)
    student: Tensor,
    ids: Tensor,
    target: Tensor | None,
    row_temperature: Tensor | None,
    call: TopKCall,
) -> None:
    """Writes the gradient by the logits."""
    (temperature,) = numbers_of(call)
    rows, classes = student.shape
    if rows == 0:
        return
    accumulator = launch.accumulator(small.dtype)
    block = _block(classes, accumulator)
    ordered, places = ids.sort(-1)
    k = ids.shape[1]
    with launch.on_device(student):
        topk_gradient_kernel[(rows, triton.cdiv(classes, block))](
            gradient,
            small,
            numbers,
            upstream,
            hard_upstream if call.hard else None,
            student,
            ordered,
            places,
            target,
            row_temperature,
            rows,
            classes,
            k,
            call.ignore_index,
            temperature,
            BEYOND=BEYOND,
            ACC=accumulator,
            BLOCK=block,
            ENTRIES=launch.power_of_two(k),
            num_warps=_warps(k),
            **launch.OPTIONS,
        )

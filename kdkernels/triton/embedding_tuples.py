"""Tuples of a batch from its two matrices of distances (REFILLED, stage 1).

A program has an anchor and a block of the batch. It walks the anchor's positives; for each it sums
the normalisers over the whole row and then takes its own block's terms, so that its piece of the
gradient stays in registers and is written by it alone: nothing of order B^3, no atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._calls import TupleCall, numbers_of
from . import launch, rule_module
from .blocks import add_to_normaliser, block_columns
from .row_kernel import terms


@triton.jit
def members(student, other, columns, positive, distance, margin):
    """Which of a block are semi-hard negatives of a positive at this distance, and which belong."""
    gap = student - distance
    negative = other & (gap > 0) & (gap <= margin)
    return negative, negative | (columns == positive)


@triton.jit(do_not_specialize=("batch",))
def tuple_kernel(
    student_ptr,  # (batch, batch) distances, strided
    teacher_ptr,  # as student
    target_ptr,  # (batch,), strided
    loss_ptr,  # (batch, blocks), dense
    count_ptr,  # (batch,), the anchor's tuples
    gradient_ptr,  # (batch, batch), strided, or None
    batch,
    student_stride,
    student_column_stride,
    teacher_stride,
    teacher_column_stride,
    target_stride,
    gradient_stride,
    gradient_column_stride,
    margin: tl.float64,
    inverse_temperature: tl.float64,
    RULE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    anchor = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1).to(tl.int64)
    margin = tl.full([], margin, ACC)
    k = tl.full([], inverse_temperature, ACC)
    student_ptr += anchor * student_stride
    teacher_ptr += anchor * teacher_stride
    label = tl.load(target_ptr + anchor * target_stride)

    own = block_columns(block * BLOCK, BLOCK)
    inside = own < batch
    own_student = tl.load(student_ptr + own * student_column_stride, mask=inside, other=0.0)
    own_teacher = tl.load(teacher_ptr + own * teacher_column_stride, mask=inside, other=0.0)
    own_other = inside & (tl.load(target_ptr + own * target_stride, mask=inside, other=0) != label)
    total = tl.zeros([1, BLOCK], ACC)
    slopes = tl.zeros([1, BLOCK], ACC)
    count = tl.zeros([1, 1], tl.int64)
    for index in range(0, batch):
        positive = anchor * 0 + index
        same = tl.load(target_ptr + positive * target_stride) == label
        if same & (positive != anchor):
            distance = tl.load(student_ptr + positive * student_column_stride)
            student_max = tl.full([1, 1], -float("inf"), ACC)
            teacher_max = student_max
            student_sum = tl.zeros([1, 1], ACC)
            teacher_sum = student_sum
            found = tl.zeros([1, 1], tl.int32)
            for start in range(0, batch, BLOCK):
                columns = block_columns(start, BLOCK)
                within = columns < batch
                student = tl.load(
                    student_ptr + columns * student_column_stride, mask=within, other=0.0
                )
                teacher = tl.load(
                    teacher_ptr + columns * teacher_column_stride, mask=within, other=0.0
                )
                other = tl.load(target_ptr + columns * target_stride, mask=within, other=0)
                negative, member = members(
                    student, within & (other != label), columns, positive, distance, margin
                )
                found = tl.maximum(found, tl.max(negative.to(tl.int32), axis=1, keep_dims=True))
                student = tl.where(member, -student, -float("inf"))
                teacher = tl.where(member, -teacher, -float("inf"))
                student_max, student_sum = add_to_normaliser(student_max, student_sum, student, k)
                teacher_max, teacher_sum = add_to_normaliser(teacher_max, teacher_sum, teacher, k)
            negative, member = members(own_student, own_other, own, positive, distance, margin)
            member = member & (found > 0)
            _, value, slope = terms(
                tl.where(member, -own_student - student_max, 0.0),
                tl.where(member, -own_teacher - teacher_max, 0.0),
                k, k, student_sum, teacher_sum, tl.log(teacher_sum / student_sum),
                k, k, k, k, k, RULE, True, False,  # which reads no pivot and no options
            )  # fmt: skip
            total += tl.where(member, value, 0.0)
            slopes += tl.where(member, slope, 0.0)
            count += found.to(tl.int64)
    first = tl.arange(0, 1)[None, :]
    tl.store(
        loss_ptr + anchor * tl.num_programs(1) + block + first,
        tl.sum(total, axis=1, keep_dims=True),
    )
    tl.store(count_ptr + anchor + first, count, mask=(first + block) == 0)
    if gradient_ptr is not None:
        tl.store(
            gradient_ptr + anchor * gradient_stride + own * gradient_column_stride,
            -k * slopes,
            mask=inside,
        )


def _launch(batch: int, itemsize: int) -> launch.FlatLaunch:
    """Programs an anchor: each sums all normalisers again, so blocks are long."""
    share = max(itemsize // 4, 1)
    block = min(launch.power_of_two(batch), max(launch.LIMITS.tile // share, 1))
    return launch.FlatLaunch(triton.cdiv(batch, block), block, max(block * share // 256, 1))


def forward(
    student: Tensor,  # (B, B) distances, float32 or float64, any strides
    teacher: Tensor,  # likewise
    target: Tensor,  # (B,)
    call: TupleCall,
    need_gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """Loss, 0-d, and its gradient by the student's distances, like student or None."""
    margin, temperature, scale = numbers_of(call)
    batch = len(target)
    accumulator = launch.accumulator(student.dtype)
    config = _launch(batch, accumulator.primitive_bitwidth // 8)
    losses = student.new_empty(batch, config.programs)
    counts = target.new_empty(batch, dtype=torch.int64)
    gradient = torch.empty_like(student) if need_gradient else None
    if batch:
        with launch.on_device(student):
            tuple_kernel[(batch, config.programs)](
                student,
                teacher,
                target,
                losses,
                counts,
                gradient,
                batch,
                *student.stride(),
                *teacher.stride(),
                target.stride(0),
                *((0, 0) if gradient is None else gradient.stride()),
                margin,
                1.0 / temperature,
                RULE=rule_module("tuple_matching").rule,
                ACC=accumulator,
                BLOCK=config.block,
                num_warps=config.num_warps,
                **launch.OPTIONS,
            )
    # The number of tuples is known on the device only, where it stays.
    factor = scale / counts.sum().clamp(min=1).to(losses.dtype) if call.reduction == 1 else scale
    loss = losses.sum() * factor
    return loss, None if gradient is None else gradient.mul_(factor)

"""The correlation losses on the host: allocation and launch of their kernels."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from .._calls import CorrelationCall, numbers_of
from .._dtypes import working_dtype
from . import column_kernels, cross_kernels, launch, rule_module
from .layout import rows_of


def forward(
    student: Tensor,  # (rows..., classes) in any order and strides
    teacher: Tensor,  # as student
    counted: Tensor | None,  # (rows,)
    call: CorrelationCall,
    need_gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """Loss, 0-d, and gradient, like student or None."""
    gradient = torch.empty_like(student) if need_gradient else None
    return _run(student, teacher, counted, call, None, gradient), gradient


def backward(
    upstream: Tensor,  # ()
    student: Tensor,
    teacher: Tensor,
    counted: Tensor | None,
    call: CorrelationCall,
) -> Tensor:
    """Gradient times upstream, multiplied before it is rounded to the student's dtype."""
    gradient = torch.empty_like(student)
    _run(student, teacher, counted, call, upstream, gradient)
    return gradient


def _run(
    student: Tensor,
    teacher: Tensor,
    counted: Tensor | None,
    call: CorrelationCall,
    upstream: Tensor | None,
    gradient: Tensor | None,
) -> Tensor:
    inter, intra, tau, eps = numbers_of(call)
    class_dim, reduction = call.class_dim, call.reduction
    dtype = working_dtype(student, teacher)
    if student.numel() == 0:
        return student.new_zeros([], dtype=dtype)
    written = gradient
    layout = rows_of(class_dim, student, teacher, student if written is None else written)
    if layout is None:
        student, teacher = student.contiguous(), teacher.contiguous()
        written = None if gradient is None else torch.empty_like(student)
        layout = rows_of(class_dim, student, teacher, student)
        assert layout is not None  # a contiguous tensor has at most two levels
    rows, inner, two_level, (of_student, of_teacher, of_gradient) = layout
    classes = student.shape[class_dim]
    count = None if counted is None else counted.sum()
    mean = reduction == 1
    if mean:
        intra /= classes
        if count is None:
            inter /= rows
    accumulator = launch.accumulator(student.dtype, teacher.dtype)
    itemsize = dtype.itemsize
    by_row = launch.row_launch(classes, itemsize)
    by_column = launch.column_launch(rows, classes, itemsize)
    combine = launch.combine_launch(by_column.chunks, classes, itemsize)
    shared = dict(ACC=accumulator, **launch.OPTIONS)
    module = rule_module(call.rule)
    row_shape = dict(
        SIGMOID=module.SIGMOID,
        TWO_LEVEL=two_level,
        RESIDENT=by_row.resident,
        ROWS=by_row.rows,
        BLOCK=by_row.block,
        num_warps=by_row.num_warps,
        **shared,
    )
    row_grid = (triton.cdiv(rows, by_row.rows),)
    losses = student.new_empty([rows + classes], dtype=dtype)
    row_statistics = student.new_empty([6, rows], dtype=dtype)
    column_statistics = student.new_empty([4, classes], dtype=dtype)
    partial = student.new_empty([5, by_column.chunks, classes], dtype=dtype)
    counts = student.new_empty([by_column.chunks], dtype=torch.int64)
    with launch.on_device(student):
        cross_kernels.correlation_row_kernel[row_grid](
            student, teacher, counted, count if mean else None, losses, row_statistics,
            rows, classes, inner, *of_student, *of_teacher, 1.0 / tau, inter, eps,
            RULE=module.rule, **row_shape,
        )  # fmt: skip
        column_kernels.column_kernel[(by_column.chunks * triton.cdiv(classes, by_column.block),)](
            student, teacher, counted, row_statistics, partial, counts, rows, classes, inner,
            by_column.chunk_rows, by_column.chunks, *of_student, *of_teacher, 1.0 / tau,
            SIGMOID=module.SIGMOID, TWO_LEVEL=two_level, ROWS=by_column.rows, BLOCK=by_column.block,
            num_warps=by_column.num_warps, **shared,
        )  # fmt: skip
        column_kernels.combine_kernel[(triton.cdiv(classes, combine.block),)](
            partial, count, counts, losses[rows:], column_statistics, rows, classes,
            by_column.chunks, intra, eps, RULE=module.rule,
            ROWS=combine.rows, BLOCK=combine.block, num_warps=combine.num_warps, **shared,
        )  # fmt: skip
        if written is not None:
            cross_kernels.gradient_kernel[row_grid](
                student, teacher, counted, row_statistics, column_statistics, upstream, written,
                rows, classes, inner, *of_student, *of_teacher, *of_gradient, 1.0 / tau,
                **row_shape,
            )  # fmt: skip
    if gradient is not None and written is not None and written is not gradient:
        gradient.copy_(written)
    return losses.sum()

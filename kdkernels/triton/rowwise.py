"""The row losses on the host: allocation and launch of ``row_kernel`` and ``binary_kernel``."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from .._calls import RowCall, numbers_of
from .._dtypes import STANDARDIZE_EPS, working_dtype
from . import launch, rule_module
from .binary_kernel import binary_kernel
from .layout import rows_of
from .row_kernel import row_kernel


def forward(
    student: Tensor,  # (rows..., classes) in any order and strides
    teacher: Tensor,  # as student
    target: Tensor | None,  # (rows...)
    token_weight: Tensor | None,  # (rows...)
    hard_token_weight: Tensor | None,  # (rows...)
    row_temperature: Tensor | None,  # (rows...)
    call: RowCall,
    need_gradient: bool,
    into: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Loss, 0-d or (rows...), gradient, like student or None, and parts, (3, rows...) or None.

    A gradient is written ``into`` a tensor if one is given, which may be the student itself: the
    last sweep alone writes, each block after it has read it.
    """
    shape = student.shape[: call.class_dim] + student.shape[call.class_dim + 1 :]
    losses = student.new_empty(shape, dtype=working_dtype(student, teacher))
    gradient = into
    if need_gradient and into is None:
        gradient = torch.empty_like(student)
    parts = losses.new_empty((3, *shape)) if call.parts else None
    numbers = (target, token_weight, hard_token_weight, row_temperature)
    _run(student, teacher, *numbers, call, None, losses, gradient, parts)
    return losses.sum() if call.reduction else losses, gradient, parts


def backward(
    upstream: Tensor,  # () or (rows...)
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    token_weight: Tensor | None,
    hard_token_weight: Tensor | None,
    row_temperature: Tensor | None,
    call: RowCall,
) -> Tensor:
    """Gradient times upstream, multiplied before it is rounded to the student's dtype."""
    gradient = torch.empty_like(student)
    numbers = (target, token_weight, hard_token_weight, row_temperature)
    _run(student, teacher, *numbers, call, upstream, None, gradient, None)
    return gradient


def _run(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    token_weight: Tensor | None,
    hard_token_weight: Tensor | None,
    row_temperature: Tensor | None,
    call: RowCall,
    upstream: Tensor | None,
    losses: Tensor | None,
    gradient: Tensor | None,
    parts: Tensor | None,
) -> None:
    if student.numel() == 0:
        return
    temperature, scale, hard, *options = numbers_of(call)
    if len(options) > 4:
        raise ValueError(f"numbers must be at most 7, got {len(options) + 3}")
    class_dim = call.class_dim
    written = gradient
    rows = rows_of(class_dim, student, teacher, student if written is None else written)
    if rows is None:
        student, teacher = student.contiguous(), teacher.contiguous()
        written = None if gradient is None else torch.empty_like(student)
        rows = rows_of(class_dim, student, teacher, student)
        assert rows is not None  # a contiguous tensor has at most two levels
    module = rule_module(call.rule)
    count = None
    if call.reduction == 1:
        if target is None:
            scale, hard = scale / rows.rows, hard / rows.rows
        else:
            count = (target.long() != call.ignore_index).sum()
    if target is not None:
        target = target.reshape(-1)
    of_rows = [
        None if x is None else x.reshape(-1).contiguous()
        for x in (token_weight, hard_token_weight, row_temperature)
    ]
    upstream_stride = 0
    if upstream is not None and upstream.dim() > 0:
        upstream = upstream.reshape(-1)
        upstream_stride = upstream.stride(0)
    accumulator = launch.accumulator(student.dtype, teacher.dtype)
    classes = student.shape[class_dim]
    binary = module.FAMILY == "binary"
    centred = binary or module.CENTRED
    # A rule that is not centred keeps slopes and q beside the logits, and the cross-entropy its
    # exponentials: half the classes a thread.
    kept = 1 if centred and not hard else 2
    config = launch.row_launch(classes, kept * accumulator.primitive_bitwidth // 8)
    wide = accumulator.primitive_bitwidth == 64
    if (hard or wide) and not centred and not config.resident:  # both
        config = config._replace(block=max(config.block // (4 if wide else 2), 1))
    numbers = (
        rows.rows, classes, rows.inner, *rows.strides[0], *rows.strides[1], *rows.strides[2],
        0 if target is None else target.stride(0), upstream_stride, call.ignore_index,
        1.0 / temperature, scale,
    )  # fmt: skip
    options = [*options, 0.0, 0.0, 0.0, 0.0][:4]
    grid = (triton.cdiv(rows.rows, config.rows),)
    shape = dict(
        RULE=module.rule,
        TWO_LEVEL=rows.two_level,
        RESIDENT=config.resident,
        ACC=accumulator,
        ROWS=config.rows,
        BLOCK=config.block,
        num_warps=config.num_warps,
        **launch.OPTIONS,
    )
    with launch.on_device(student):
        if binary:
            weight, _, heat = of_rows
            binary_kernel[grid](
                student, teacher, target, weight, heat, count, upstream, losses, written,
                *numbers, *options, **shape,
            )  # fmt: skip
        else:
            row_kernel[grid](
                student, teacher, target, *of_rows, count, upstream, losses, parts, written,
                *numbers, hard, *options,
                EXPLICIT=getattr(module, "explicit", None), CENTRED=module.CENTRED,
                STANDARDIZE=call.standardize, HARD=hard != 0.0, EPS=STANDARDIZE_EPS, **shape,
            )  # fmt: skip
    if gradient is not None and written is not None and written is not gradient:
        gradient.copy_(written)

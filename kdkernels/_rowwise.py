"""The public path of the row losses (families ``divergence`` and ``decoupled``)."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from . import _checks, _dtensor, _reduce
from ._autograd import apply
from ._calls import RowCall
from ._dispatch import choose
from ._dtensor import any_sharded
from ._tracing import plain, traced, transformed
from .registry import LossSpec


def row_loss(
    spec: LossSpec,
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    *,
    options: dict[str, float],
    temperature: float,
    scale: float,
    standardize: bool,
    ignore_index: int,
    reduction: str,
    backend: str | None,
    target_name: str = "target",
) -> Tensor:
    """Check the inputs, choose the backend and run it.

    ``options`` are the loss's own numbers in the order in which its rule reads them; ``scale``
    multiplies the loss (T^2 and ``loss_weight``). ``target_name`` is what the loss calls it.
    """
    code = _checks.reduction(reduction)
    class_dim = _checks.logits(student, teacher)
    if target is not None:
        _checks.target(target, student, class_dim, target_name)
        if target_name != "target":  # by which the kernels know it
            _checks.allocated(target_name, target)
    elif spec.needs_target:
        raise _checks.fail_type("target", "a Tensor of class indices", "None")
    ignore_index = _checks.integer("ignore_index", ignore_index)
    if standardize is not False:
        standardize = _checks.flag("standardize", standardize)
    if not (plain(student) and plain(teacher)) and any_sharded(student, teacher):

        def local(s: Tensor, t: Tensor, y: Tensor | None, reduction: str) -> Tensor:
            return row_loss(
                spec,
                s,
                t,
                y,
                options=options,
                temperature=temperature,
                scale=scale,
                standardize=standardize,
                ignore_index=ignore_index,
                reduction=reduction,
                backend=backend,
                target_name=target_name,
            )

        return _dtensor.row_loss(
            local,
            student,
            teacher,
            target,
            class_dim=class_dim,
            ignore_index=ignore_index,
            reduction=reduction,
        )
    chosen = choose(spec, student, backend)
    if chosen != "native":  # which checks both itself
        _checks.allocated("student_logits", student)
        _checks.allocated("teacher_logits", teacher)
        if target is not None:
            _checks.allocated("target", target)
        if target is not None and spec.needs_target:
            _check_range(target, student.shape[class_dim], ignore_index)
    if chosen == "reference":
        rows = functools.partial(
            spec.reference, **options, temperature=temperature, standardize=standardize
        )
        return _reduce.row_loss(
            rows,
            student,
            teacher,
            target,
            class_dim=class_dim,
            scale=scale,
            ignore_index=ignore_index,
            reduction=code,
            needs_target=spec.needs_target,
        )
    if target is not None and (target.dtype != torch.int64 or not target.is_contiguous()):
        _checks.allocated("target", target)
        target = target.to(torch.int64).contiguous()
    numbers = [temperature, scale, *options.values()]
    call = RowCall(spec.name, numbers, None, standardize, ignore_index, class_dim, code)
    return apply(chosen, "row", student, call, teacher, target)


def _check_range(target: Tensor, classes: int, ignore_index: int) -> None:
    """Check the values of CPU targets; a GPU would have to synchronise, so its kernels give NaN."""
    if target.device.type == "cpu" and not traced(target) and not transformed():
        _checks.target_range(target, classes, ignore_index)

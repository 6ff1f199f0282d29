"""The public path of the row losses (families ``divergence`` and ``decoupled``)."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from . import _checks, _reduce
from ._autograd import apply
from ._dispatch import choose
from ._ops import traced
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
        if type(ignore_index) is not int:
            raise _checks.fail_type("ignore_index", "an int", type(ignore_index).__name__)
    elif spec.needs_target:
        raise _checks.fail_type("target", "a Tensor of class indices", "None")
    _checks.flag("standardize", standardize)
    if standardize and student.shape[class_dim] < 2:
        raise _checks.fail(
            "student_logits", "of at least two classes with standardize=True", student.shape
        )
    chosen = choose(spec, student, backend)
    if target is not None and chosen != "native" and spec.needs_target:
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
        target = target.to(torch.int64).contiguous()
    return apply(
        chosen,
        "row",
        student,
        teacher,
        target,
        spec.name,
        list(options.values()),
        temperature,
        scale,
        standardize,
        ignore_index,
        class_dim,
        code,
    )


def _check_range(target: Tensor, classes: int, ignore_index: int) -> None:
    """Check the values of CPU targets; a GPU would have to synchronise, so its kernels give NaN."""
    if target.device.type == "cpu" and not traced(target):
        _checks.target_range(target, classes, ignore_index)

"""The public path of the row losses (families ``divergence`` and ``decoupled``)."""

from __future__ import annotations

import functools
from typing import Any, TypedDict

import torch
from torch import Tensor

from . import _checks, _dtensor, _reduce
from ._autograd import apply
from ._calls import RowCall
from ._dispatch import choose
from ._dtensor import any_sharded
from ._dtypes import working_dtype
from ._tracing import plain, traced, transformed
from .reference._rows import weighted
from .registry import LossSpec


class TokenOptions(TypedDict, total=False):
    """The keywords that every row loss has; ``row_loss`` has their defaults."""

    ignore_index: int | None
    reduction: str
    loss_weight: float | Tensor
    token_weight: Tensor | None
    num_items_in_batch: float | Tensor | None
    backend: str | None


class RowOptions(TokenOptions, total=False):
    """Likewise, of the losses of classifiers."""

    standardize: bool


def row_loss(
    spec: LossSpec,
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    options: tuple[Any, ...],
    temperature: float,
    *,
    ignore_index: int | None = -100,
    reduction: str = "mean",
    loss_weight: float | Tensor = 1.0,
    token_weight: Tensor | None = None,
    num_items_in_batch: float | Tensor | None = None,
    standardize: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Check the inputs, choose the backend and run it.

    ``options`` are the loss's own numbers, in the order of ``spec.options``.
    """
    code = _checks.reduction(reduction)
    class_dim = _checks.logits(student, teacher)
    temperature = _checks.temperature(temperature)
    if spec.options:
        named = zip(spec.options.items(), options, strict=True)
        options = tuple([check(name, value) for (name, check), value in named])
    if ignore_index is not None:
        ignore_index = _checks.integer("ignore_index", ignore_index)
    if standardize is not False:
        if spec.target_name == "labels":  # a loss of tokens
            raise TypeError(f"{spec.name}_loss() got an unexpected keyword argument 'standardize'")
        standardize = _checks.flag("standardize", standardize)
    index = _checks.NO_INDEX if ignore_index is None else ignore_index
    if target is not None:
        target, index = _indices(spec, student, target, class_dim, ignore_index)
    elif spec.needs_target:
        raise _checks.fail_type(spec.target_name, "a Tensor of class indices", "None")
    if token_weight is not None:
        _checks.token_weight(token_weight, student, class_dim)
    # Weights and counts that are tensors: nothing reads them on the host.
    factor = divisor = None
    if isinstance(loss_weight, Tensor):
        _checks.weight(loss_weight)
        factor = _checks.on_device("loss_weight", loss_weight, student.device)
        loss_weight = 1.0
    scale = _checks.number("loss_weight", loss_weight)
    if spec.t_squared:  # here, for every loss
        scale = scale * temperature * temperature
    for value, end in spec.ends:
        if options[0] == value:
            spec, options, scale = end.spec, end.options, scale * end.factor
            break
    if num_items_in_batch is not None:
        items = _checks.items(num_items_in_batch, reduction)
        code = _checks.REDUCTIONS["sum"]
        if isinstance(items, Tensor):
            divisor = _checks.on_device("num_items_in_batch", items, student.device)
        else:
            scale = scale / items
    checked = (spec, backend, options, temperature, scale, standardize, index, class_dim)
    if not (plain(student) and plain(teacher)) and any_sharded(student, teacher):
        loss = _dtensor.row_loss(
            lambda *local: _run(*checked, *local),
            student,
            teacher,
            target,
            token_weight,
            class_dim=class_dim,
            ignore_index=index,
            reduction=code,
        )
    else:
        loss = _run(*checked, student, teacher, target, token_weight, code)
    if divisor is not None:
        loss = loss / divisor.to(loss.dtype)
    return loss if factor is None else weighted(loss, factor.to(loss.dtype))


def _run(
    spec: LossSpec,
    backend: str | None,
    options: tuple[float, ...],
    temperature: float,
    scale: float,
    standardize: bool,
    ignore_index: int,
    class_dim: int,
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    token_weight: Tensor | None,
    reduction: int,
) -> Tensor:
    """The loss of checked arguments."""
    chosen = choose(spec, student, backend)
    if chosen != "native":  # which checks both itself
        _checks.allocated("student_logits", student)
        _checks.allocated("teacher_logits", teacher)
        if target is not None and spec.needs_target:
            _check_range(target, student.shape[class_dim], ignore_index)
    if chosen == "reference":
        rows = functools.partial(
            spec.reference,
            **dict(zip(spec.options, options, strict=True)),
            temperature=temperature,
            standardize=standardize,
        )
        return _reduce.row_loss(
            rows,
            student,
            teacher,
            target,
            token_weight,
            class_dim=class_dim,
            scale=scale,
            ignore_index=ignore_index,
            reduction=reduction,
            needs_target=spec.needs_target,
        )
    if target is not None and (target.dtype != torch.int64 or not target.is_contiguous()):
        target = target.to(torch.int64).contiguous()
    if token_weight is not None:
        token_weight = token_weight.to(working_dtype(student, teacher)).contiguous()
    if spec.rule_numbers is not None:
        options = spec.rule_numbers(*options)
    numbers = [temperature, scale, *options]
    call = RowCall(spec.rule, numbers, None, standardize, ignore_index, class_dim, reduction)
    return apply(chosen, "row", student, call, teacher, target, token_weight)


def _indices(
    spec: LossSpec, student: Tensor, target: Any, class_dim: int, ignore_index: int | None
) -> tuple[Tensor | None, int]:
    """The class indices, checked; those that are but a mask may be bools, of which True counts."""
    mask = not spec.needs_target
    _checks.target(target, student, class_dim, spec.target_name, mask)
    _checks.allocated(spec.target_name, target)
    if mask and target.dtype == torch.bool:
        return target.to(torch.int64) - 1, -1
    if ignore_index is None:
        return None if mask else target, _checks.NO_INDEX
    return target, ignore_index


def _check_range(target: Tensor, classes: int, ignore_index: int) -> None:
    """Check the values of CPU targets; a GPU would have to synchronise, so its kernels give NaN."""
    if target.device.type == "cpu" and not traced(target) and not transformed():
        _checks.target_range(target, classes, ignore_index)

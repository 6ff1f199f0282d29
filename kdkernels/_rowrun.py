"""Running a row loss whose arguments are checked: the backend's choice, its tensors, its call."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _checks, _decoupled, _reduce
from ._autograd import (
    apply,
    apply_with_parts,
    both_gradients,
    differentiable_once,
    wants_gradient,
)
from ._calls import RowCall
from ._dispatch import choose, choose_beside_cuda
from ._dtypes import working_dtype
from ._tracing import readable
from .registry import SPECS, LossSpec


def run(
    spec: LossSpec,
    backend: str | None,
    options: tuple[float, ...],
    temperature: float,
    scale: float,
    hard: float,
    standardize: bool,
    parts: bool,
    ignore_index: int,
    class_dim: int,
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    token_weight: Tensor | None,
    hard_token_weight: Tensor | None,
    row_temperature: Tensor | None,
    reduction: int,
) -> tuple[Tensor, Tensor | None]:
    """The loss of checked arguments, and its parts by row where they are wanted."""
    chooses = choose_beside_cuda if parts or hard != 0.0 else choose
    chosen = chooses(spec, student, backend)
    if chosen != "reference" and wants_gradient(teacher):
        loss, separate = run(
            spec, backend, options, temperature, scale, hard, standardize, parts, ignore_index,
            class_dim, student, teacher.detach(), target, token_weight, hard_token_weight,
            row_temperature, reduction,
        )  # fmt: skip
        if spec.family == "decoupled" and target is not None:
            heat = _by_row(row_temperature, student, class_dim)
            other = _decoupled.by_teacher(
                functools.partial(_reverse_kl, backend), student.detach(), teacher, target,
                temperature if heat is None else heat.reshape(-1, 1),
                _by_row(token_weight, student, class_dim), scale=scale, standardize=standardize,
                ignore_index=ignore_index, class_dim=class_dim, reduction=reduction,
                **dict(zip(spec.options, options, strict=True)),
            )  # fmt: skip
            return both_gradients(loss, other), separate
        exchanged = spec.exchanged(*options)
        if exchanged is None:
            backend, roles = "reference", (student.detach(), differentiable_once(teacher))
        else:
            spec, options = SPECS[exchanged[0]], exchanged[1]
            roles = teacher, student.detach()
        other, _ = run(
            spec, backend, options, temperature, scale, 0.0, standardize, False, ignore_index,
            class_dim, *roles, target, token_weight, None, row_temperature, reduction,
        )  # fmt: skip
        return both_gradients(loss, other), separate
    if spec.evaluate is not None:
        return _by_evaluation(
            spec, chosen, options, temperature, scale, hard, parts, ignore_index, class_dim,
            student, target, token_weight, hard_token_weight, row_temperature, reduction,
        )  # fmt: skip
    if spec.steps is not None and chosen != "reference":

        def rows(
            of: LossSpec,
            *numbers: float,
            scale: float = 1.0,
            hard: float = 0.0,
            parts: bool = False,
            constant: bool = False,
            index: Tensor | None = None,
        ) -> tuple[Tensor, Tensor | None]:
            weight, ignored = None, _checks.NO_INDEX
            if index is None:
                index, weight, ignored = target, hard_token_weight, ignore_index
            elif target is not None:  # the step's own class indices, not read where it ignores
                index = torch.where(target.long() == ignore_index, ignored, index.long())
            return run(
                of, backend, numbers, temperature, scale, hard, standardize, parts, ignored,
                class_dim, student.detach() if constant else student, teacher, index,
                None, weight, row_temperature, 0,
            )  # fmt: skip

        return _by_steps(
            spec.steps(lambda *call, **how: rows(*call, **how)[0], *options),
            rows, scale, hard, parts, target, ignore_index,
            _by_row(token_weight, student, class_dim), reduction,
        )  # fmt: skip
    if chosen != "native":  # which checks both itself
        _checks.allocated("student_logits", student)
        _checks.allocated("teacher_logits", teacher)
        if target is not None and (spec.needs_target or hard != 0.0):
            check_range(target, student.shape[class_dim], ignore_index)
    if chosen == "reference":
        own = dict(zip(spec.options, options, strict=True))
        return _reduce.row_loss(
            functools.partial(spec.reference, **own),
            student,
            teacher,
            target,
            _by_row(token_weight, student, class_dim),
            _by_row(hard_token_weight, student, class_dim),
            _by_row(row_temperature, student, class_dim),
            temperature=temperature,
            class_dim=class_dim,
            scale=scale,
            hard=hard,
            standardize=standardize,
            ignore_index=ignore_index,
            reduction=reduction,
            needs_target=spec.needs_target,
            parts=parts,
        )
    if target is not None and (target.dtype != torch.int64 or not target.is_contiguous()):
        target = target.to(torch.int64).contiguous()
    if token_weight is not None or row_temperature is not None or hard_token_weight is not None:
        dtype = working_dtype(student, teacher)
        token_weight = _by_row(token_weight, student, class_dim, dtype)
        hard_token_weight = _by_row(hard_token_weight, student, class_dim, dtype)
        row_temperature = _by_row(row_temperature, student, class_dim, dtype)
    if spec.rule_numbers is not None:
        options = spec.rule_numbers(*options)
    numbers_of_call = [temperature, scale, hard, *options]
    call = RowCall(
        spec.rule, numbers_of_call, None, standardize, parts, ignore_index, class_dim, reduction
    )
    tensors = (student, call, teacher, target, token_weight, hard_token_weight, row_temperature)
    if parts:
        return apply_with_parts(chosen, "row", *tensors)
    return apply(chosen, "row", *tensors), None


def _reverse_kl(backend: str | None, student: Tensor, teacher: Tensor, counted: Tensor) -> Tensor:
    """Of each row of (rows, classes) that counts, at temperature 1."""
    return run(
        SPECS["reverse_kl"], backend, (), 1.0, 1.0, 0.0, False, False, -1, 1,
        student, teacher, counted.long() - 1, None, None, None, 0,
    )[0]  # fmt: skip


def _by_steps(
    values: Tensor,
    rows: Callable[..., tuple[Tensor, Tensor | None]],
    scale: float,
    hard: float,
    parts: bool,
    target: Tensor | None,
    ignore_index: int,
    token_weight: Tensor | None,
    reduction: int,
) -> tuple[Tensor, Tensor | None]:
    """The loss of rows' values that other losses gave; the cross-entropy is a call of its own."""
    shape = values.shape
    valid = None if target is None else target.reshape(-1).long() != ignore_index
    soft = _reduce.weigh(values.reshape(-1), scale, token_weight, valid)
    hard_values = spread = torch.zeros_like(soft)
    if hard != 0.0 or parts:
        given, separate = rows(SPECS["kd"], scale=0.0, hard=hard, parts=parts, constant=hard == 0.0)
        hard_values = given.reshape(-1)
        if separate is not None:
            spread = separate[2].reshape(-1)
    return _reduce.finish(soft, hard_values, spread, valid, shape, reduction, parts)


def _by_evaluation(
    spec: LossSpec,
    chosen: str,
    options: tuple[Any, ...],
    temperature: float,
    scale: float,
    hard: float,
    parts: bool,
    ignore_index: int,
    class_dim: int,
    student: Tensor,
    target: Tensor | None,
    token_weight: Tensor | None,
    hard_token_weight: Tensor | None,
    row_temperature: Tensor | None,
    reduction: int,
) -> tuple[Tensor, Tensor | None]:
    """The loss of a spec that evaluates its rows itself, with cross-entropies and entropies."""
    assert spec.evaluate is not None
    shape = student.shape[:class_dim] + student.shape[class_dim + 1 :]
    heats = _by_row(row_temperature, student, class_dim)
    if target is not None:
        target = target.reshape(-1).to(torch.int64).contiguous()
    rows = _reduce.as_rows(student, class_dim).contiguous()
    heats = None if heats is None else heats.reshape(-1)
    weight, hard_weight = (
        _by_row(x, student, class_dim) for x in (token_weight, hard_token_weight)
    )
    if spec.at_once is not None and chosen == "native":
        given = spec.at_once(
            rows, target, temperature, heats, ignore_index, scale, hard, weight, hard_weight,
            parts, reduction, *options,
        )  # fmt: skip
        if given is not None:
            loss, separate = given
            return loss, None if separate is None else separate.reshape(3, *shape)
    values, hard_values, spread, valid = spec.evaluate(
        chosen, rows, target, temperature, heats, ignore_index, hard != 0.0, parts, None, *options
    )
    soft = _reduce.weigh(values, scale, weight, valid)
    if hard != 0.0:
        hard_values = _reduce.weigh(hard_values, hard, hard_weight, valid)
    return _reduce.finish(soft, hard_values, spread, valid, shape, reduction, parts)


def _by_row(
    numbers: Tensor | None, student: Tensor, class_dim: int, dtype: torch.dtype | None = None
) -> Tensor | None:
    """One number for each row, also where there is one for all; contiguous, of a dtype if asked."""
    if numbers is None:
        return None
    if not numbers.dim():
        shape = student.shape[:class_dim] + student.shape[class_dim + 1 :]
        numbers = numbers.to(student.device).expand(shape)
    return numbers if dtype is None else numbers.to(dtype).contiguous()


def check_range(target: Tensor, classes: int, ignore_index: int) -> None:
    """Check the values of CPU targets; a GPU would have to synchronise, so its kernels give NaN."""
    if readable(target):
        _checks.target_range(target, classes, ignore_index)

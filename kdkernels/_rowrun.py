"""Running a row loss whose arguments are checked: the backend's choice, its tensors, its call."""

from __future__ import annotations

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
from ._checked import Checked, Result
from ._dispatch import choose, choose_beside_cuda
from ._dtypes import working_dtype
from ._tracing import readable
from .registry import SPECS, LossSpec


def run(call: Checked) -> Result:
    """The loss on the backend of one's choice."""
    spec, student, teacher, target = call.spec, call.student, call.teacher, call.target
    chooses = choose_beside_cuda if call.parts or call.hard != 0.0 else choose
    chosen = chooses(spec, student, call.backend)
    if chosen != "reference" and wants_gradient(teacher):
        return _by_both(call)
    if spec.evaluate is not None:
        return _by_evaluation(call, chosen)
    if spec.steps is not None and chosen != "reference":
        return _by_steps(call)
    if chosen != "native":  # which checks both itself
        _checks.allocated("student_logits", student)
        _checks.allocated("teacher_logits", teacher)
        if target is not None and (spec.needs_target or call.hard != 0.0):
            check_range(target, student.shape[call.class_dim], call.ignore_index)
    if chosen == "reference":
        return _reduce.row_loss(call)
    if target is not None and (target.dtype != torch.int64 or not target.is_contiguous()):
        target = target.to(torch.int64).contiguous()
    of_rows: list[Any] = [call.token_weight, call.hard_token_weight, call.row_temperature]
    if any([x is not None for x in of_rows]):
        dtype = working_dtype(student, teacher)
        by_row = [call.by_row(x) for x in of_rows]
        of_rows = [None if x is None else x.to(dtype).contiguous() for x in by_row]
    options = spec.numbers_of_rule(call.options)
    of_kernel = RowCall(
        spec.rule, [call.temperature, call.scale, call.hard, *options], None, call.standardize,
        call.parts, call.ignore_index, call.class_dim, call.reduction,
    )  # fmt: skip
    tensors = (student, of_kernel, teacher, target, *of_rows)
    if call.parts:
        return apply_with_parts(chosen, "row", *tensors)
    return apply(chosen, "row", *tensors), None


def _by_both(call: Checked) -> Result:
    """With the gradient by the teacher too, of a second call in exchanged roles."""
    teacher, student = call.teacher, call.student.detach()
    loss, separate = run(call._replace(teacher=teacher.detach()))
    call = call._replace(student=student, hard=0.0, parts=False, hard_token_weight=None)
    exchanged = call.spec.exchanged(*call.options)
    if call.spec.family == "decoupled" and call.target is not None:
        other = _decoupled.by_teacher(lambda *rows: _reverse_kl(call.backend, *rows), call)
    elif exchanged is None:
        other, _ = run(call._replace(backend="reference", teacher=differentiable_once(teacher)))
    else:
        spec, options = SPECS[exchanged[0]], exchanged[1]
        other, _ = run(call._replace(spec=spec, options=options, student=teacher, teacher=student))
    return both_gradients(loss, other), separate


def _reverse_kl(backend: str | None, student: Tensor, teacher: Tensor, counted: Tensor) -> Tensor:
    """Of each row of (rows, classes) that counts, at temperature 1."""
    index = counted.long() - 1
    spec = SPECS["reverse_kl"]
    return run(Checked(spec, backend, (), student, teacher, index, ignore_index=-1))[0]


def _by_steps(call: Checked) -> Result:
    """The loss of rows' values that other losses give; the cross-entropy is a call of its own."""
    assert call.spec.steps is not None
    target = call.target

    def rows(
        of: LossSpec,
        *numbers: float,
        scale: float = 1.0,
        hard: float = 0.0,
        parts: bool = False,
        constant: bool = False,
        index: Tensor | None = None,
    ) -> Result:
        weight, ignored = None, _checks.NO_INDEX
        if index is None:
            index, weight, ignored = target, call.hard_token_weight, call.ignore_index
        elif target is not None:  # the step's own class indices, not read where it ignores
            index = torch.where(target.long() == call.ignore_index, ignored, index.long())
        student = call.student.detach() if constant else call.student
        return run(
            call._replace(
                spec=of, options=numbers, student=student, target=index, token_weight=None,
                hard_token_weight=weight, scale=scale, hard=hard, parts=parts,
                ignore_index=ignored, reduction=0,
            )
        )  # fmt: skip

    values = call.spec.steps(lambda *step, **how: rows(*step, **how)[0], *call.options)
    valid = None if target is None else target.reshape(-1).long() != call.ignore_index
    soft = _reduce.weigh(values.reshape(-1), call.scale, call.by_row(call.token_weight), valid)
    hard_values = spread = torch.zeros_like(soft)
    if call.hard != 0.0 or call.parts:
        constant = call.hard == 0.0
        given, separate = rows(
            SPECS["kd"], scale=0.0, hard=call.hard, parts=call.parts, constant=constant
        )
        hard_values = given.reshape(-1)
        if separate is not None:
            spread = separate[2].reshape(-1)
    return _reduce.finish(soft, hard_values, spread, valid, call)


def _by_evaluation(call: Checked, chosen: str) -> Result:
    """The loss of a spec that evaluates its rows itself, with cross-entropies and entropies."""
    spec, target = call.spec, call.target
    assert spec.evaluate is not None
    student = _reduce.as_rows(call.student, call.class_dim).contiguous()
    rows = call._replace(
        student=student, teacher=student.detach(), class_dim=1,
        target=None if target is None else target.reshape(-1).to(torch.int64).contiguous(),
        token_weight=call.flat(call.token_weight),
        hard_token_weight=call.flat(call.hard_token_weight),
        row_temperature=call.flat(call.row_temperature),
    )  # fmt: skip
    if spec.at_once is not None and chosen == "native":
        given = spec.at_once(rows)
        if given is not None:
            loss, separate = given
            return loss, None if separate is None else separate.reshape(3, *call.rows())
    return _reduce.weighed(call, *spec.evaluate(rows, chosen, None))


def check_range(target: Tensor, classes: int, ignore_index: int) -> None:
    """Check the values of CPU targets; a GPU would have to synchronise, so its kernels give NaN."""
    if readable(target):
        _checks.target_range(target, classes, ignore_index)

"""The teachers that an output layer takes: checks, one vocabulary, the operator's tensors."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor

from .. import _checks
from ..teacher import LinearTeacher


def check_teacher(teacher: Any, hidden: Tensor) -> None:
    """Check that a teacher is one, of the student's rows and on its device."""
    if isinstance(teacher, Tensor):
        _checks.tensor("teacher", teacher)
        _checks.dtype("teacher", teacher)
        _checks.constant("teacher", teacher)
        _checks.allocated("teacher", teacher)
        rows = teacher.shape[:-1] if teacher.dim() else None
    elif isinstance(teacher, LinearTeacher):
        rows = teacher.shape
    else:
        expected = "a Tensor of logits or a LinearTeacher"
        raise _checks.fail_type("teacher", expected, type(teacher).__name__)
    if rows != hidden.shape[:-1]:
        expected = f"of the rows of student_hidden, {tuple(hidden.shape[:-1])}"
        raise _checks.fail("teacher", expected, None if rows is None else tuple(rows))
    if teacher.device != hidden.device:
        raise _checks.fail("teacher", f"on the student's device {hidden.device}", teacher.device)


def one_vocabulary(
    teacher: Tensor | LinearTeacher, weight: Tensor, bias: Tensor | None, vocab: str | None
) -> tuple[Tensor | LinearTeacher, Tensor, Tensor | None]:
    """Teacher and head of as many classes, cut to the common prefix where that is asked."""
    if vocab is not None:
        _checks.choice("vocab", vocab, ("truncate",))
    of_student = weight.shape[0]
    of_teacher = teacher.shape[-1] if isinstance(teacher, Tensor) else teacher.vocab_size
    if of_student == of_teacher:
        return teacher, weight, bias
    if vocab is None:
        expected = f"of the student's {of_student} classes (vocab='truncate' where one is padded)"
        raise _checks.fail("teacher", expected, of_teacher)
    common = min(of_student, of_teacher)
    weight, bias = weight[:common], None if bias is None else bias[:common]
    if isinstance(teacher, Tensor):
        return teacher[..., :common], weight, bias
    cut = None if teacher.bias is None else teacher.bias[:common]
    return dataclasses.replace(teacher, weight=teacher.weight[:common], bias=cut), weight, bias


def tensors_of(teacher: Tensor | LinearTeacher) -> tuple[str, list[Tensor], list[float]]:
    """A teacher as the operator takes it: its kind, its tensors, its softcap and scale."""
    if isinstance(teacher, Tensor):
        return "logits", [teacher.detach()], [0.0, 1.0]
    tensors = [teacher.flatten().hidden, teacher.weight]
    if teacher.bias is not None:
        tensors.append(teacher.bias)
    return "linear", tensors, [teacher.softcap or 0.0, teacher.logit_scale]

"""Maps of two sizes: the student's, resized to the teacher's height and width."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import _checks
from ._dtensor import any_sharded
from ._dtypes import working_dtype
from ._embedding import full_precision
from .reference.pkd import resize as resized


def check(name: str, value: Any) -> Any:
    if value is not None and (not isinstance(value, str) or value != "bilinear"):
        raise _checks.fail(name, "None or 'bilinear'", repr(value))
    return value


def to_teacher(student: Tensor, teacher: Tensor) -> Tensor:
    """Maps at the teacher's height and width, in the dtype that both are promoted to."""
    if student.shape[2:] == teacher.shape[2:]:
        return student
    with full_precision(student.device):
        return resized(student.to(working_dtype(student, teacher)), teacher)


def logits(student: Any, teacher: Any, resize: Any, class_dim: Any) -> Tensor:
    """Likewise of logits (N, C, H, W), of which the loss checks all but their sizes."""
    check("resize", resize)
    members = getattr(teacher, "logits", teacher)
    first = members[0] if isinstance(members, (list, tuple)) and members else members
    for name, x in (("student_logits", student), ("teacher_logits", first)):
        _checks.tensor(name, x)
        _checks.dtype(name, x)
        _checks.allocated(name, x)
    if any_sharded(student, first):
        raise _checks.fail("resize", "None where logits are DTensors", repr(resize))
    if class_dim not in (None, 1):
        raise _checks.fail("class_dim", "None or 1 where resize is given", class_dim)
    given: Tensor = student
    if given.dim() != 4 or first.dim() != 4 or given.shape[:2] != first.shape[:2]:
        return given
    for name, x in (("student_logits", student), ("teacher_logits", first)):
        if 0 in x.shape[1:]:
            expected = "of at least one position where resize is given"
            raise _checks.fail(name, expected, f"shape {tuple(x.shape)}")
    return to_teacher(given, first)

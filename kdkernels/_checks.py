"""Argument checks, written once: every loss raises the same errors with the same words.

All messages read ``name must be <expected>, got <got>``. Checks look only at metadata (shape,
dtype, device, flags), so they cost no kernel launch and no synchronisation and are traceable by
``torch.compile``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

FLOATS = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})
INTEGERS = frozenset({torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8})
REDUCTIONS = {"none": 0, "mean": 1, "batchmean": 1, "sum": 2}
"""Reduction names and the code the kernels know them by; ``batchmean`` is ``mean``."""


def fail(name: str, expected: str, got: Any) -> ValueError:
    return ValueError(f"{name} must be {expected}, got {got}")


def fail_type(name: str, expected: str, got: Any) -> TypeError:
    return TypeError(f"{name} must be {expected}, got {got}")


def logits(student: Tensor, teacher: Tensor) -> int:
    """Check a pair of logits and return the dimension that holds the classes.

    (N, C) and (B, S, V) keep the classes last; (N, C, H, W) keeps them in dim 1, as
    ``torch.nn.functional.cross_entropy`` does.
    """
    if not isinstance(student, Tensor):
        raise fail_type("student_logits", "a Tensor", type(student).__name__)
    if not isinstance(teacher, Tensor):
        raise fail_type("teacher_logits", "a Tensor", type(teacher).__name__)
    shape = student.shape
    if shape != teacher.shape:
        raise fail("teacher_logits", f"of the student's shape {tuple(shape)}", tuple(teacher.shape))
    rank = len(shape)
    if rank == 2:
        class_dim = 1
    elif rank == 3:
        class_dim = 2
    elif rank == 4:
        class_dim = 1
    else:
        raise fail("student_logits", "(N, C), (B, S, V) or (N, C, H, W)", f"shape {tuple(shape)}")
    if shape[class_dim] < 1:
        raise fail("student_logits", "of at least one class", f"shape {tuple(shape)}")
    if student.dtype not in FLOATS:
        raise fail_type("student_logits", "float64, float32, float16 or bfloat16", student.dtype)
    if teacher.dtype not in FLOATS:
        raise fail_type("teacher_logits", "float64, float32, float16 or bfloat16", teacher.dtype)
    if student.device != teacher.device:
        raise fail("teacher_logits", f"on the student's device {student.device}", teacher.device)
    constant("teacher_logits", teacher)
    return class_dim


def constant(name: str, value: Tensor) -> None:
    """Check that a teacher's tensor is a constant."""
    if value.requires_grad and torch.is_grad_enabled():
        raise fail(
            name,
            "a constant (call .detach() on it, or run the teacher under torch.no_grad())",
            "a tensor that requires grad",
        )


def target(value: Any, student: Tensor, class_dim: int, name: str = "target") -> None:
    """Check the class indices: one integer for each row of the logits, on the same device."""
    if not isinstance(value, Tensor):
        raise fail_type(name, "a Tensor of class indices", type(value).__name__)
    shape = student.shape
    rows = shape[:class_dim] + shape[class_dim + 1 :]
    if value.shape != rows:
        raise fail(name, f"of shape {tuple(rows)}", tuple(value.shape))
    if value.dtype not in INTEGERS:
        raise fail_type(name, "integer class indices", value.dtype)
    if value.device != student.device:
        raise fail(name, f"on the student's device {student.device}", value.device)


def target_range(value: Tensor, classes: int, ignore_index: int) -> None:
    """Check the class indices of a CPU tensor against the classes (reads the data)."""
    bad = ((value < 0) | (value >= classes)) & (value != ignore_index)
    if bad.any():
        raise target_out_of_range(classes, ignore_index, int(value[bad][0]))


def target_out_of_range(classes: int, ignore_index: int, got: Any) -> ValueError:
    return fail("target", f"in [0, {classes}) or ignore_index={ignore_index}", got)


def reduction(value: Any) -> int:
    """Return the code of a reduction name."""
    code = REDUCTIONS.get(value) if isinstance(value, str) else None
    if code is None:
        raise fail("reduction", "'mean', 'batchmean', 'sum' or 'none'", repr(value))
    return code


def number(name: str, value: Any) -> float:
    """A finite Python number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise fail_type(name, "a number", type(value).__name__)
    value = float(value)
    if not -math.inf < value < math.inf:  # math.isfinite would break the compiler's graph
        raise fail(name, "finite", value)
    return value


def positive(name: str, value: Any) -> float:
    value = number(name, value)
    if value <= 0.0:
        raise fail(name, "> 0", value)
    return value


def non_negative(name: str, value: Any) -> float:
    value = number(name, value)
    if value < 0.0:
        raise fail(name, ">= 0", value)
    return value


def fraction(name: str, value: Any) -> float:
    value = number(name, value)
    if not 0.0 <= value <= 1.0:
        raise fail(name, "in [0, 1]", value)
    return value


def flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise fail_type(name, "a bool", type(value).__name__)
    return value


def integer(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise fail_type(name, "an int", type(value).__name__)
    return value


def batch_reduction(value: Any) -> int:
    """Return the code of a reduction name for a loss that couples the rows."""
    code = REDUCTIONS.get(value) if isinstance(value, str) else None
    if not code:
        raise fail("reduction", "'mean', 'batchmean' or 'sum'", repr(value))
    return code

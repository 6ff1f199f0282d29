"""Logits of any shape whose class dimension is named, as those that the kernels know."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import _checks
from ._dtensor import any_sharded


class ClassesAt:
    """The way of a shape to (rows, classes) or (N, classes, positions, 1), and back.

    Views where the strides allow it: (N, C, L) and (N, C, D, H, W) are not copied, nor is what has
    its classes last and is contiguous.
    """

    def __init__(self, class_dim: Any, student: Any, teacher: Any) -> None:
        for name, x in (("student_logits", student), ("teacher_logits", teacher)):
            _checks.tensor(name, x)
            _checks.allocated(name, x)
        if any_sharded(student, teacher):
            raise _checks.fail("class_dim", "None where logits are DTensors", class_dim)
        rank = student.dim()
        dim = _checks.integer("class_dim", class_dim)
        if not -rank <= dim < rank:
            raise _checks.fail("class_dim", f"a dimension of {tuple(student.shape)}", dim)
        if teacher.shape != student.shape:
            expected = f"of the student's shape {tuple(student.shape)}"
            raise _checks.fail("teacher_logits", expected, tuple(teacher.shape))
        self.dim = dim % rank
        self._last = self.dim == rank - 1
        self.rows = student.shape[: self.dim] + student.shape[self.dim + 1 :]
        self._flat: tuple[int, ...] = (self.rows.numel(),)
        if not self._last and rank > 2:
            self._flat = (self.rows[0], self.rows[1:].numel(), 1)

    def logits(self, x: Tensor) -> Tensor:
        if self._last:
            return x.reshape(*self._flat, x.shape[-1])
        x = x.movedim(self.dim, 1)
        return x if x.dim() == 2 else x.flatten(2).unsqueeze(-1)

    def of_rows(self, name: str, x: Any) -> Any:
        """One number a row, from the shape of the rows; what is no such tensor as it is."""
        if not isinstance(x, Tensor) or (name == "temperature" and not x.dim()):
            return x
        if x.shape != self.rows:
            raise _checks.fail(name, f"of shape {tuple(self.rows)}", tuple(x.shape))
        return x.reshape(self._flat)

    def back(self, x: Tensor) -> Tensor:
        """A value of each row, in the shape of the rows; a value of all as it is."""
        return x.reshape(self.rows) if x.dim() else x

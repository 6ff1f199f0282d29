"""A call of a row loss whose arguments are checked: what ``_rowwise`` makes and others run."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _checks
from .registry import LossSpec

Result = tuple[Tensor, Tensor | None]
"""The loss, and its parts by row where they are wanted."""


class Checked(NamedTuple):
    """The defaults are those of rows that are softened and counted already."""

    spec: LossSpec
    backend: str | None
    options: tuple[Any, ...]
    """The loss's own, in the order of ``spec.options``."""
    student: Tensor
    teacher: Tensor
    target: Tensor | None = None
    """Class indices in the rows' shape; probabilities in the logits' for ``_soft_targets``."""
    token_weight: Tensor | None = None
    """Of the divergences, as ``hard_token_weight`` of the cross-entropies: one for all rows or one
    a row."""
    hard_token_weight: Tensor | None = None
    row_temperature: Tensor | None = None
    """Likewise; counts in place of ``temperature`` where there is one."""
    temperature: float = 1.0
    scale: float = 1.0
    """Of the divergences, as ``hard`` of the cross-entropies; has T^2 where the loss has it."""
    hard: float = 0.0
    standardize: bool = False
    parts: bool = False
    ignore_index: int = _checks.NO_INDEX
    class_dim: int = 1
    reduction: int = 0

    def rows(self) -> torch.Size:
        """The rows' shape."""
        shape = self.student.shape
        return shape[: self.class_dim] + shape[self.class_dim + 1 :]

    def named(self) -> dict[str, Any]:
        """The options by name."""
        return dict(zip(self.spec.options, self.options, strict=True))

    def by_row(self, numbers: Tensor | None) -> Tensor | None:
        """One number for each row, also where there is one for all."""
        if numbers is None or numbers.dim():
            return numbers
        return numbers.to(self.student.device).expand(self.rows())

    def flat(self, numbers: Tensor | None) -> Tensor | None:
        """Likewise, (rows,)."""
        numbers = self.by_row(numbers)
        return None if numbers is None else numbers.reshape(-1)

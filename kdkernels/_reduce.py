"""Rows, masks and reductions around a row reference: what the kernels do inside, in plain PyTorch.

``as_rows`` moves the classes last and flattens the rest; ``reduce_rows`` turns one value a row into
the loss. Together with a file of ``kdkernels.reference`` they are the whole specification.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .reference._rows import weighted


def as_rows(logits: Tensor, class_dim: int) -> Tensor:
    """View logits as (rows, classes)."""
    return logits.movedim(class_dim, -1).reshape(-1, logits.shape[class_dim])


def promote(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Bring both to the working dtype: float64 if either is, else float32."""
    double = torch.float64 in (student.dtype, teacher.dtype)
    dtype = torch.float64 if double else torch.float32
    return student.to(dtype), teacher.to(dtype)


def row_loss(
    rows: Callable[..., Tensor],
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    token_weight: Tensor | None,
    *,
    class_dim: int,
    scale: float,
    ignore_index: int,
    reduction: int,
    needs_target: bool,
) -> Tensor:
    """Evaluate a row reference with its mask, scale and reduction.

    Rows whose target is ``ignore_index`` are replaced by zeros before anything is computed, so they
    contribute exact zeros to the loss and to the gradient even if they hold NaN.
    """
    shape = student.shape[:class_dim] + student.shape[class_dim + 1 :]
    student, teacher = promote(student, teacher)
    student, teacher = as_rows(student, class_dim), as_rows(teacher, class_dim)
    valid = None
    args: tuple[Tensor, ...] = ()
    if target is not None:
        target = target.reshape(-1).long()
        valid = target != ignore_index
        student = torch.where(valid.unsqueeze(-1), student, torch.zeros_like(student))
        teacher = torch.where(valid.unsqueeze(-1), teacher, torch.zeros_like(teacher))
        if needs_target:
            args = (torch.where(valid, target, torch.zeros_like(target)),)
    values = weighted(rows(student, teacher, *args), scale)
    if token_weight is not None:
        values = weighted(values, token_weight.reshape(-1).to(values.dtype))
    if valid is not None:
        values = torch.where(valid, values, torch.zeros_like(values))
    if reduction == 0:
        return values.reshape(shape)
    total = values.sum()
    if reduction == 2:
        return total
    count = valid.sum().clamp(min=1) if valid is not None else max(values.shape[0], 1)
    return total / count

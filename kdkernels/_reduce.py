"""Rows, masks and reductions around a row reference: what the kernels do inside, in plain PyTorch.

``as_rows`` moves the classes last and flattens the rest; ``reduce_rows`` turns one value a row into
the loss. Together with a file of ``kdkernels.reference`` they are the whole specification.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .reference._rows import weighted
from .reference.hard import cross_entropy, entropy


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
    hard_token_weight: Tensor | None,
    row_temperature: Tensor | None,
    *,
    temperature: float,
    class_dim: int,
    scale: float,
    hard: float,
    standardize: bool,
    ignore_index: int,
    reduction: int,
    needs_target: bool,
    parts: bool,
) -> tuple[Tensor, Tensor | None]:
    """Evaluate a row reference with its mask, scale and reduction; and the parts, (3, rows...).

    Rows whose target is ``ignore_index`` are replaced by zeros before anything is computed, so they
    contribute exact zeros to the loss and to the gradient even if they hold NaN.
    """
    shape = student.shape[:class_dim] + student.shape[class_dim + 1 :]
    student, teacher = promote(student, teacher)
    student, teacher = as_rows(student, class_dim), as_rows(teacher, class_dim)
    heat: float | Tensor = temperature
    if row_temperature is not None:
        heat = row_temperature.reshape(-1, 1).to(student.dtype)
    valid = None
    args: tuple[Tensor, ...] = ()
    if target is not None:
        target = target.reshape(-1).long()
        valid = target != ignore_index
        student = torch.where(valid.unsqueeze(-1), student, torch.zeros_like(student))
        teacher = torch.where(valid.unsqueeze(-1), teacher, torch.zeros_like(teacher))
        if isinstance(heat, Tensor):
            heat = torch.where(valid.unsqueeze(-1), heat, torch.ones_like(heat))
        target = torch.where(valid, target, torch.zeros_like(target))
        if needs_target:
            args = (target,)

    values = rows(student, teacher, *args, temperature=heat, standardize=standardize)
    soft = weigh(values, scale, token_weight, valid)
    hard_values = spread = torch.zeros_like(soft)
    if hard != 0.0:
        assert target is not None  # checked before
        hard_values = weigh(cross_entropy(student, target), hard, hard_token_weight, valid)
    if parts:
        spread = weigh(entropy(student, heat, standardize), 1.0, None, valid)
    return finish(soft, hard_values, spread, valid, shape, reduction, parts)


def weigh(values: Tensor, factor: float, weight: Tensor | None, valid: Tensor | None) -> Tensor:
    """The rows' values times their weights; 0 where a row is ignored."""
    values = weighted(values, factor)
    if weight is not None:
        values = weighted(values, weight.reshape(-1).to(values.dtype))
    return values if valid is None else torch.where(valid, values, torch.zeros_like(values))


def finish(
    soft: Tensor,
    hard: Tensor,
    spread: Tensor,
    valid: Tensor | None,
    shape: torch.Size,
    reduction: int,
    parts: bool,
) -> tuple[Tensor, Tensor | None]:
    """The loss of the rows' weighed values, and its parts if asked."""
    total = soft + hard
    separate = None
    if parts:
        separate = torch.stack([soft.detach(), hard.detach(), spread]).reshape(3, *shape)
    if reduction == 0:
        return total.reshape(shape), separate
    loss = total.sum()
    if reduction == 1:
        count = valid.sum().clamp(min=1) if valid is not None else max(soft.shape[0], 1)
        loss = loss / count
        if separate is not None:
            separate = torch.cat([separate[:2] / count, separate[2:]])
    return loss, separate

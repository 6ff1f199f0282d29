"""Rows, masks and reductions around a row reference: what the kernels do inside, in plain PyTorch.

``as_rows`` moves the classes last and flattens the rest; ``reduce_rows`` turns one value a row into
the loss. Together with a file of ``kdkernels.reference`` they are the whole specification.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._checked import Checked
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


def row_loss(call: Checked) -> tuple[Tensor, Tensor | None]:
    """Evaluate a row reference with its mask, scale and reduction; and the parts, (3, rows...).

    Rows whose target is ``ignore_index`` are replaced by zeros before anything is computed, so they
    contribute exact zeros to the loss and to the gradient even if they hold NaN.
    """
    student, teacher = promote(call.student, call.teacher)
    student, teacher = as_rows(student, call.class_dim), as_rows(teacher, call.class_dim)
    heats = call.flat(call.row_temperature)
    heat = call.temperature if heats is None else heats.unsqueeze(1).to(student.dtype)
    valid = target = None
    args: tuple[Tensor, ...] = ()
    if call.target is not None:
        target = call.target.reshape(-1).long()
        valid = target != call.ignore_index
        student = torch.where(valid.unsqueeze(-1), student, torch.zeros_like(student))
        teacher = torch.where(valid.unsqueeze(-1), teacher, torch.zeros_like(teacher))
        if isinstance(heat, Tensor):
            heat = torch.where(valid.unsqueeze(-1), heat, torch.ones_like(heat))
        target = torch.where(valid, target, torch.zeros_like(target))
        if call.spec.needs_target:
            args = (target,)

    how = {"temperature": heat, "standardize": call.standardize, **call.named()}
    values = call.spec.reference(student, teacher, *args, **how)
    hard_values = spread = torch.zeros_like(values)
    if call.hard != 0.0:
        assert target is not None  # checked before
        hard_values = cross_entropy(student, target)
    if call.parts:
        spread = entropy(student, heat, call.standardize)
    return weighed(call, values, hard_values, spread, valid)


def weighed(
    call: Checked, values: Tensor, hard: Tensor, spread: Tensor, valid: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The loss of rows' divergences, cross-entropies and entropies, and its parts if asked."""
    soft = weigh(values, call.scale, call.by_row(call.token_weight), valid)
    if call.hard != 0.0:
        hard = weigh(hard, call.hard, call.by_row(call.hard_token_weight), valid)
    if call.parts:
        spread = weigh(spread, 1.0, None, valid)
    return finish(soft, hard, spread, valid, call)


def weigh(values: Tensor, factor: float, weight: Tensor | None, valid: Tensor | None) -> Tensor:
    """The rows' values times their weights; 0 where a row is ignored."""
    values = weighted(values, factor)
    if weight is not None:
        values = weighted(values, weight.reshape(-1).to(values.dtype))
    return values if valid is None else torch.where(valid, values, torch.zeros_like(values))


def finish(
    soft: Tensor, hard: Tensor, spread: Tensor, valid: Tensor | None, call: Checked
) -> tuple[Tensor, Tensor | None]:
    """The loss of the rows' weighed values, and its parts if asked."""
    total = soft + hard
    separate = None
    if call.parts:
        separate = torch.stack([soft.detach(), hard.detach(), spread]).reshape(3, *call.rows())
    if call.reduction == 0:
        return total.reshape(call.rows()), separate
    loss = total.sum()
    if call.reduction == 1:
        count = valid.sum().clamp(min=1) if valid is not None else max(soft.shape[0], 1)
        loss = loss / count
        if separate is not None:
            separate = torch.cat([separate[:2] / count, separate[2:]])
    return loss, separate

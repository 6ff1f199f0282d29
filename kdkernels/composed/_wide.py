"""The way out of a written form: its reference, for what the dtype's squares cannot hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..reference._rows import weighted


def wide(
    reference: Callable[..., Tensor],
    student: Tensor,
    teacher: Tensor,
    scale: float,
    reduction: int,
    need_gradient: bool,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """The reference and its gradient by autograd, as a written form returns them."""
    name = "mean" if reduction == 1 else "sum"
    with torch.enable_grad():
        leaf = student.detach().requires_grad_(need_gradient)
        loss = weighted(reference(leaf, teacher, reduction=name, **options), scale)
    gradient = torch.autograd.grad(loss, leaf)[0] if need_gradient else None
    return loss.detach().to(student.dtype), gradient

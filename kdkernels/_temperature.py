"""Temperatures that are tensors: one for all rows, or one a row; constants of the kernels.

Where one is learned (CTKD, Li et al., AAAI 2023; 2211.16231) its gradient comes from a written
formula of PyTorch operations, for the losses that have one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from . import _checks
from ._autograd import save, saved
from ._checked import Checked
from ._ops import once
from ._reduce import as_rows, promote
from ._tracing import plain, transformed
from .registry import LossSpec


def split(value: Tensor, student: Tensor, class_dim: int) -> tuple[float, Tensor | None]:
    """The temperature as a number and as a tensor, of which the latter counts where there is one.

    A constant of the CPU that nobody traces is a number.
    """
    _checks.row_temperature(value, student, class_dim)
    if value.is_cpu and plain(value) and not torch.compiler.is_compiling() and not _moves(value):
        if value.dim() == 0 and not (value.requires_grad and torch.is_grad_enabled()):
            return _checks.number("temperature", value.detach()), None
        _checks.temperature_range(value.detach())
    return 1.0, value


def _moves(value: Tensor) -> bool:
    """Whether a transform or a forward-mode derivative looks at the temperature itself."""
    return transformed() and (
        torch._C._functorch.is_functorch_wrapped_tensor(value)
        or forward_ad.unpack_dual(value).tangent is not None
    )


def learned(spec: LossSpec, value: Tensor) -> bool:
    """Whether the temperature wants a gradient; raises where the loss has none to give."""
    wanted = value.requires_grad and torch.is_grad_enabled()
    if _moves(value):
        expected = "a constant under torch.func transforms and forward-mode derivatives"
        raise _checks.fail("temperature", expected, "a tensor that is transformed")
    if wanted and spec.by_temperature is None:
        expected = f"a constant ({spec.name} has no gradient by it; call .detach() on it)"
        raise _checks.fail("temperature", expected, "a tensor that requires grad")
    return wanted


class _WithGradient(torch.autograd.Function):
    """The loss as it is, with a gradient for the temperature."""

    @staticmethod
    def forward(
        ctx: Any,
        loss: Tensor,
        temperature: Tensor,
        student: Tensor,
        teacher: Tensor,
        factor: Tensor,
        spec: LossSpec,
        standardize: bool,
    ) -> Tensor:
        save(ctx, (temperature, student, teacher, factor))
        ctx.spec, ctx.standardize = spec, standardize
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        temperature, student, teacher, factor = saved(ctx)
        with torch.no_grad():
            heats = temperature.reshape(-1, 1).to(student.dtype).expand(student.shape[0], 1)
            by_row = ctx.spec.by_temperature(student, teacher, heats, standardize=ctx.standardize)
            by_row = torch.where(factor == 0, 0.0, by_row * factor) * upstream.reshape(-1)
            gradient = by_row if temperature.dim() else by_row.sum()
            gradient = gradient.reshape(temperature.shape).to(temperature.dtype)
        if torch.is_grad_enabled():
            gradient = once(gradient, upstream, temperature)
        return upstream, gradient, None, None, None, None, None


_with_gradient: Callable[..., Tensor] = _WithGradient.apply  # typed: torch leaves it untyped


def with_gradient(spec: LossSpec, loss: Tensor, temperature: Tensor, call: Checked) -> Tensor:
    """``loss`` of the call with the gradient by ``temperature`` beside that by the student.

    The call's weights have T^2 in them, which the formula of ``spec`` has too.
    """
    with torch.no_grad():
        s, t = (as_rows(x, call.class_dim) for x in promote(call.student.detach(), call.teacher))
        heats = temperature.detach().to(s)
        factor = torch.full((s.shape[0],), 1.0, dtype=s.dtype, device=s.device) * call.scale
        if call.token_weight is not None:
            factor = factor * (call.token_weight.to(s) / (heats * heats)).reshape(-1)
        if call.target is not None:
            valid = call.target.reshape(-1) != call.ignore_index
            factor = torch.where(valid, factor, 0.0)
            s, t = (torch.where(valid.unsqueeze(-1), x, 0.0) for x in (s, t))
            count: Any = valid.sum().clamp(min=1)
        else:
            count = max(s.shape[0], 1)
        if call.reduction == 1:
            factor = factor / count
    return _with_gradient(loss, temperature, s, t, factor, spec, call.standardize)

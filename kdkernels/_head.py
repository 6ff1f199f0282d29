"""The output layer of a language model: logits of hidden states, and their gradient's way back."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _checks


class Head(NamedTuple):
    """``z = logit_scale * (hidden @ weight.T + bias)``, with a softcap
    ``softcap * tanh(z / softcap)``."""

    weight: Tensor
    """(V, H)"""
    bias: Tensor | None = None
    """(V,)"""
    softcap: float | None = None
    """None or 0: none."""
    logit_scale: float = 1.0

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """(N, H) hidden states to (N, V) logits in their dtype, written into ``out`` if given.

        The way to ``out`` is no operation of autograd.
        """
        scale = self.logit_scale / (self.softcap or 1.0)
        # Products of mixed dtypes are the caller's to choose: autocast does not reach in.
        with torch.autocast(hidden.device.type, enabled=False):
            if self.bias is None and scale == 1.0:
                logits = torch.mm(hidden, self.weight.T, out=out)
            else:
                beta = 0.0 if self.bias is None else scale
                added = hidden.new_zeros(1) if self.bias is None else self.bias
                logits = torch.addmm(added, hidden, self.weight.T, beta=beta, alpha=scale, out=out)
        if not self.softcap:
            return logits
        if out is None:
            return torch.tanh(logits) * self.softcap
        return logits.tanh_().mul_(self.softcap)

    def through_softcap_(self, gradient: Tensor, logits: Tensor) -> None:
        """Multiply the gradient by the tanh's derivative; ``logits`` are overwritten."""
        assert self.softcap
        logits.div_(self.softcap)
        torch.ops.aten.tanh_backward.grad_input(gradient, logits, grad_input=gradient)


def check(
    hidden: Any,
    weight: Any,
    bias: Any,
    softcap: Any,
    logit_scale: Any,
    names: tuple[str, str, str] = ("hidden", "weight", "bias"),
    least: int = 2,
) -> tuple[float | None, float]:
    """Check an output layer beside its hidden states; its numbers as Python's.

    ``least`` classes there must be: of a shard, none.
    """
    of_hidden, of_weight, of_bias = names
    _checks.tensor(of_hidden, hidden)
    _checks.dtype(of_hidden, hidden)
    if hidden.dim() < 1 or hidden.shape[-1] < 1:
        raise _checks.fail(of_hidden, "(..., H) with H >= 1", f"shape {tuple(hidden.shape)}")
    width = hidden.shape[-1]
    _checks.tensor(of_weight, weight)
    shape = weight.shape
    if len(shape) != 2 or shape[0] < least or shape[1] != width:
        enough = f" with V >= {least}" if least else ""
        expected = f"(V, {width}){enough}, the width of {of_hidden}"
        raise _checks.fail(of_weight, expected, f"shape {tuple(shape)}")
    _beside(of_weight, weight, of_hidden, hidden)
    if bias is not None:
        _checks.tensor(of_bias, bias, "a Tensor or None")
        if bias.shape != shape[:1]:
            raise _checks.fail(of_bias, f"of shape {tuple(shape[:1])}", tuple(bias.shape))
        _beside(of_bias, bias, of_hidden, hidden)
    scale = _checks.number("logit_scale", logit_scale)
    return None if softcap is None else _checks.positive("softcap", softcap), scale


def _beside(name: str, value: Tensor, of_hidden: str, hidden: Tensor) -> None:
    if value.dtype != hidden.dtype:
        expected = f"of the dtype of {of_hidden}, {hidden.dtype} (call .to() on it)"
        raise _checks.fail_type(name, expected, value.dtype)
    if value.device != hidden.device:
        expected = f"on the device of {of_hidden}, {hidden.device}"
        raise _checks.fail(name, expected, value.device)

"""A teacher as hidden states and a head: its logits are made some rows at a time."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from .. import _checks, _head
from .._head import Head


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class LinearTeacher:
    """The teacher's last hidden states and its output layer, which stand for its logits.

    ``z = logit_scale * (hidden @ weight.T + bias)``, and with a softcap
    ``softcap * tanh(z / softcap)``: scaled first, capped second. Cohere's ``logit_scale`` and
    Gemma 2's ``final_logit_softcapping`` go in as they are, Granite's ``logits_scaling`` as
    ``logit_scale=1 / logits_scaling``. H numbers a token stand for V of them: 4096 for 151936, say.
    The teacher is a constant.

    Args:
        hidden: (..., H) hidden states after the final norm; float64, float32, float16 or bfloat16.
        weight: (V, H), the weight of the head (``lm_head.weight``), of the dtype and on the device
            of ``hidden``; a rank's shard of it may have any number of rows.
        bias: (V,) or None, likewise.
        softcap: bound of the logits, > 0, or None for no bound.
        logit_scale: finite number that multiplies the logits.

    Raises:
        TypeError, ValueError: ``name must be <expected>, got <got>``, for a wrong type, dtype,
            shape or device, a number out of its range, and for a tensor that requires grad.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    logit_scale: float = 1.0

    def __post_init__(self) -> None:
        head = (self.hidden, self.weight, self.bias, self.softcap, self.logit_scale)
        softcap, logit_scale = _head.check(*head, least=0)
        for name in ("hidden", "weight", "bias"):
            if getattr(self, name) is not None:
                _checks.constant(name, getattr(self, name))
        # The numbers are kept as Python's, whatever they came as.
        object.__setattr__(self, "softcap", softcap)
        object.__setattr__(self, "logit_scale", logit_scale)

    @property
    def shape(self) -> torch.Size:
        """The shape of the rows, without H."""
        return self.hidden.shape[:-1]

    @property
    def vocab_size(self) -> int:
        return self.weight.shape[0]

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of hidden states and head, in which the logits are computed."""
        return self.hidden.dtype

    def __repr__(self) -> str:
        return (
            f"LinearTeacher(shape={tuple(self.shape)}, hidden_size={self.hidden.shape[-1]},"
            f" vocab_size={self.vocab_size}, bias={self.bias is not None}, softcap={self.softcap},"
            f" logit_scale={self.logit_scale}, dtype={str(self.dtype).removeprefix('torch.')},"
            f" device='{self.device}')"
        )

    def flatten(self) -> LinearTeacher:
        """The rows in one dimension: hidden (N, H)."""
        rows = self.hidden.reshape(-1, self.hidden.shape[-1])
        return dataclasses.replace(self, hidden=rows)

    def to(
        self,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        non_blocking: bool = False,
    ) -> LinearTeacher:
        """Hidden states and head on another device, in another dtype."""
        if isinstance(device, torch.dtype):
            device, dtype = None, device

        def moved(x: Tensor) -> Tensor:
            return x.to(device=device, dtype=dtype or x.dtype, non_blocking=non_blocking)

        return dataclasses.replace(
            self,
            hidden=moved(self.hidden),
            weight=moved(self.weight),
            bias=None if self.bias is None else moved(self.bias),
        )

    @torch.no_grad()
    def logits(self, rows: Any = None, *, out: Tensor | None = None) -> Tensor:
        """The logits of some rows, in the dtype of the hidden states.

        Args:
            rows: a slice or a tensor of indices into the flattened rows; None: all of them, in
                their own shape.
            out: (rows, V) contiguous tensor of the same dtype and device to write into, or None.

        Returns:
            (rows, V), or (..., V) where ``rows`` is None and nothing is given as ``out``.
        """
        hidden = self.hidden.reshape(-1, self.hidden.shape[-1])
        if rows is not None:
            hidden = hidden[rows]
            if hidden.dim() != 2:
                raise _checks.fail_type("rows", "a slice or a 1-d tensor of indices", repr(rows))
        if out is not None:
            shape = (hidden.shape[0], self.vocab_size)
            _checks.tensor("out", out)
            if out.shape != shape or out.dtype != self.dtype or out.device != self.device:
                expected = f"of shape {shape}, {self.dtype}, on {self.device}"
                got = f"{tuple(out.shape)}, {out.dtype}, on {out.device}"
                raise _checks.fail("out", expected, got)
        head = Head(self.weight, self.bias, self.softcap, self.logit_scale)
        logits = head.logits(hidden, out)
        if rows is not None or out is not None:
            return logits
        return logits.view(*self.shape, self.vocab_size)

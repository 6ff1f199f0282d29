"""Tokens in chunks through an output layer: buffers that are reused, and sums of gradients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .._dtypes import working_dtype
from .._head import Head

_BUDGET = {"cpu": 64 << 20}
"""Bytes of logits of a chunk, student's and teacher's together."""
_LEAST = {"cpu": 64}
_LARGEST = 4096


def default_tokens(device: torch.device, vocab: int, *dtypes: torch.dtype) -> int:
    """Tokens of a chunk. Each chunk reads and writes the whole gradient of the weight, so that
    small ones cost time (on a GPU below 1000, on a CPU below 100) and large ones memory."""
    budget = _BUDGET.get(device.type, 1 << 30)
    tokens = budget // (vocab * sum(dtype.itemsize for dtype in dtypes))
    return int(min(max(tokens // 64 * 64, _LEAST.get(device.type, 1024)), _LARGEST))


def logits_buffer(like: Tensor, rows: int, vocab: int) -> Tensor:
    """(rows, vocab) for a chunk's logits, with a gap between the rows where that begins each on a
    cache line of a CPU: the product that makes the logits takes up to a third less time then."""
    if like.device.type != "cpu" or like.element_size() < 4:
        return like.new_empty(rows, vocab)
    line = 64 // like.element_size()
    return like.new_empty(rows, -(-vocab // line) * line)[:, :vocab]


class Rows:
    """The rows that count, in chunks: slices where all do, else indices, on which the host waits.

    ``tokens`` are those of a chunk, all but the last.
    """

    def __init__(self, count: int, labels: Tensor | None, ignore_index: int, tokens: int) -> None:
        self.index: Tensor | None = None
        if labels is not None:
            index = (labels.long() != ignore_index).nonzero().squeeze(1)
            if index.numel() < count:
                count, self.index = index.numel(), index
        self.count = count
        self.tokens = max(min(tokens, count), 1)

    def __iter__(self) -> Iterator[Any]:
        for start in range(0, self.count, self.tokens):
            chunk = slice(start, min(start + self.tokens, self.count))
            yield chunk if self.index is None else self.index[chunk]


def as_rows(x: Tensor) -> Tensor | None:
    """(rows..., classes) as (rows, classes) of the same memory; None where no one stride walks the
    rows, as of ``logits[:, :-1]``."""
    try:
        return x.view(-1, x.shape[-1])
    except RuntimeError:
        return None


def rows_at(x: Tensor, at: Any, out: Tensor | None = None) -> Tensor:
    """Rows of (rows..., classes), contiguous: a view where that is possible, else in ``out`` if
    ``as_rows`` can take them from ``x``, else new."""
    flat = as_rows(x) if x.dim() > 1 else x
    if flat is None:
        numbers = torch.arange(at.start, at.stop, device=x.device) if type(at) is slice else at
        return x[torch.unravel_index(numbers, x.shape[:-1])].contiguous()
    if out is None or type(at) is slice:
        return flat[at].contiguous()
    return torch.index_select(flat, 0, at, out=out[: at.numel()])


def empty_gradients(
    hidden: Tensor, weight: Tensor, needs: tuple[bool, ...], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """What ``Gradients.result`` gives, without values; ``dtype`` is that of weight and bias."""
    of_hidden, of_weight, of_bias = needs
    return (
        torch.empty_like(hidden) if of_hidden else hidden.new_empty(0),
        hidden.new_empty(weight.shape if of_weight else 0, dtype=dtype),
        hidden.new_empty(weight.shape[0] if of_bias else 0, dtype=dtype),
    )


class Gradients:
    """The gradients of hidden states, weight and bias, summed over the chunks in the working dtype.

    The weight's and the bias's are float32 (float64 for float64 inputs), the hidden states' of
    their dtype.
    """

    def __init__(self, hidden: Tensor, head: Head, needs: tuple[bool, bool, bool]) -> None:
        self.head = head
        self._work = working_dtype(hidden)
        self._first = True
        of_hidden, of_weight, self._of_bias = needs
        self.hidden = torch.zeros_like(hidden) if of_hidden else hidden.new_empty(0)
        shape = head.weight.shape if of_weight else (0,)
        self.weight = hidden.new_empty(shape, dtype=self._work)
        self.bias = hidden.new_zeros(head.weight.shape[0] * self._of_bias, dtype=self._work)
        self._wide: Tensor | None = None

    def add(self, gradient: Tensor, hidden: Tensor, at: Any) -> None:
        """A chunk's: ``gradient`` (n, V) by its logits, ``hidden`` (n, H) its rows ``at``."""
        scale = self.head.logit_scale
        if self.hidden.numel():
            if type(at) is slice and scale == 1.0:
                torch.mm(gradient, self.head.weight, out=self.hidden[at])
            else:
                self.hidden[at] = torch.mm(gradient, self.head.weight) * scale
        if self._of_bias:
            self.bias.add_(gradient.sum(0, dtype=self._work), alpha=scale)
        if self.weight.numel():
            beta = 0.0 if self._first else 1.0
            how: dict[str, Any] = {"beta": beta, "alpha": scale, "out": self.weight}
            if gradient.dtype == self._work:
                torch.addmm(self.weight, gradient.T, hidden, **how)
            elif gradient.is_cuda:  # tensor cores sum in float32
                torch.addmm(self.weight, gradient.T, hidden, out_dtype=self._work, **how)
            else:
                torch.addmm(self.weight, self._widened(gradient).T, hidden.to(self._work), **how)
        self._first = False

    def _widened(self, gradient: Tensor) -> Tensor:
        if self._wide is None or self._wide.shape[0] < gradient.shape[0]:
            self._wide = torch.empty_like(gradient, dtype=self._work)
        return self._wide[: gradient.shape[0]].copy_(gradient)

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        if self._first:
            self.weight.zero_()
        return self.hidden, self.weight, self.bias

"""The operators of log-probabilities through an output layer: forward, and backward by recomputing.

Which weight a token's log-probability has is known only when the backward pass begins, so that the
gradient cannot be made in the forward pass; a chunk's logits are made twice instead of kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _topk
from .._autograd import save, saved
from .._calls import NO_ID, TopKCall, numbers_of
from .._dtypes import working_dtype
from .._head import Head
from .._ops import TAGS, library, no_double_backward, once
from ._chunks import Gradients, Rows, default_tokens, empty_gradients, logits_buffer

ENTROPY = 3
"""The row of ``_topk``'s numbers."""


class LogprobCall(NamedTuple):
    """What a call consists of besides its tensors."""

    backend: str
    numbers: Sequence[float]
    """temperature."""
    symbolic: Tensor | None
    softcap: float
    """0: none."""
    logit_scale: float
    tokens: int
    """Of a chunk; 0 leaves it to us."""


_TENSORS = "Tensor hidden, Tensor weight, Tensor? bias, Tensor ids"
_FIELDS = (
    "str backend, float[] numbers, Tensor? symbolic, float softcap, float logit_scale, int tokens"
)
_GIVEN = 4 + len(LogprobCall._fields)


class _Chunk(NamedTuple):
    at: Any
    hidden: Tensor
    logits: Tensor
    ids: Tensor
    """(n, K), each once; what came before in its row is ``NO_ID``."""
    first: Tensor
    """(n, K): where each id stands first."""
    small: Tensor
    of_rows: Tensor
    how: TopKCall


def _chunks(
    hidden: Tensor, weight: Tensor, ids: Tensor, head: Head, call: LogprobCall, entropy: bool
) -> Iterator[_Chunk]:
    """Chunks of logits in one buffer, with their ids' small logits (``reference/topk.py``)."""
    how = TopKCall(
        numbers_of(call), None, False, rest=True, hard=False, entropy=entropy, ignore_index=NO_ID
    )
    count, vocab = hidden.shape[0], weight.shape[0]
    tokens = call.tokens or default_tokens(hidden.device, vocab, hidden.dtype)
    rows = Rows(count, None, NO_ID, tokens)
    if call.backend == "native":
        buffer = logits_buffer(hidden, rows.tokens, vocab)
    else:
        buffer = hidden.new_empty(rows.tokens, vocab)
    places = torch.arange(ids.shape[1], device=ids.device)
    for at in rows:
        h, asked = hidden[at], ids[at].long()
        first = first_places(asked, places)
        once_each = _topk.marked(asked, first != places)
        z = head.logits(h, buffer[: h.shape[0]])
        small, of_rows = _topk.rows_of(call.backend, z, once_each, None, None, how)
        yield _Chunk(at, h, z, once_each, first, small, of_rows, how)


def first_places(ids: Tensor, places: Tensor) -> Tensor:
    """Where each id stands first in its row, in memory of the ids' size."""
    ordered, order = ids.sort(dim=1, stable=True)
    repeated = torch.zeros_like(ids, dtype=torch.bool)
    repeated[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    start = torch.where(repeated, 0, places).cummax(1).values
    return torch.empty_like(order).scatter_(1, order, order.gather(1, start))


class _Softmax(NamedTuple):
    """Of small logits: where one class is certain, what the others leave has its digits."""

    log: Tensor
    """(n, K + 1)"""
    lse: Tensor
    """(n, 1)"""
    largest: Tensor
    """(n, 1): the class, which alone can be certain."""
    others: Tensor
    """(n, 1): the probability of all others."""


def softmax(small: Tensor) -> _Softmax:
    top, largest = small.max(1, keepdim=True)
    below = small - top
    others = below.exp().scatter_(1, largest, 0.0).sum(1, keepdim=True)
    log_sum = others.log1p()
    return _Softmax(below - log_sum, top + log_sum, largest, others / (1 + others))


def through(q: _Softmax, first: Tensor, upstream: Tensor) -> Tensor:
    """The gradient by the small logits, of those by the log-probabilities, in float64."""
    own = torch.zeros_like(q.log, dtype=upstream.dtype).scatter_add_(1, first, upstream)
    total = upstream.sum(1, keepdim=True)
    slopes = own - q.log.exp() * total
    of_largest = own.gather(1, q.largest) - total + q.others * total
    return slopes.scatter_(1, q.largest, of_largest)


def logprob(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, *fields: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """The log-probabilities (N, K), and of each row logsumexp and entropy (N,)."""
    call = LogprobCall(*fields)
    head = Head(weight, bias, call.softcap, call.logit_scale)
    count, dtype = hidden.shape[0], working_dtype(hidden)
    found = hidden.new_empty(ids.shape, dtype=dtype)
    sums, entropies = (hidden.new_empty(count, dtype=dtype) for _ in range(2))
    for chunk in _chunks(hidden, weight, ids, head, call, entropy=True):
        q = softmax(chunk.small)
        found[chunk.at] = q.log.gather(1, chunk.first).to(dtype)
        sums[chunk.at] = (q.lse[:, 0] + chunk.of_rows[0] / chunk.how.numbers[0]).to(dtype)
        entropies[chunk.at] = chunk.of_rows[ENTROPY]
    return found, sums, entropies


def logprob_backward(
    upstream: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of hidden states, weight and bias; empty where none is wanted."""
    call, needs = LogprobCall(*rest[:-3]), rest[-3:]
    head = Head(weight, bias, call.softcap, call.logit_scale)
    gradients = Gradients(hidden, head, needs)
    for chunk in _chunks(hidden, weight, ids, head, call, entropy=False):
        slopes = through(softmax(chunk.small), chunk.first, upstream[chunk.at].double())
        slopes = slopes.to(chunk.small.dtype)
        kept = chunk.logits.clone() if head.softcap else chunk.logits
        gradient = _topk.gradient_of(
            call.backend, chunk.logits, chunk.ids, None, None, chunk.small, chunk.of_rows,
            slopes, None, chunk.how, into=chunk.logits,
        )  # fmt: skip
        if head.softcap:
            head.through_softcap_(gradient, kept)
        gradients.add(gradient, chunk.hidden, chunk.at)
    made = gradients.result()
    return made[0], made[1].to(weight.dtype), made[2].to(weight.dtype)


def _fake(hidden: Tensor, weight: Tensor, bias: Any, ids: Tensor, *_: Any) -> tuple[Tensor, ...]:
    like = hidden.new_empty(hidden.shape[0], dtype=working_dtype(hidden))
    return like.new_empty(ids.shape), like, torch.empty_like(like)


def _fake_backward(
    upstream: Tensor, hidden: Tensor, weight: Tensor, bias: Any, ids: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    return empty_gradients(hidden, weight, rest[-3:], weight.dtype)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    call = LogprobCall(*inputs[4:])
    ctx.call = call._replace(symbolic=None)
    save(ctx, (*inputs[:4], call.symbolic))


def _differentiate(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Any, ...]:
    *tensors, symbolic = saved(ctx)
    needs = tuple(ctx.needs_input_grad[:3])
    call = ctx.call._replace(symbolic=symbolic)
    operator = torch.ops.kdkernels.linear_logprob_backward.default
    made = operator(upstream, *tensors, *call, *needs)
    given = [g if need else None for g, need in zip(made, needs, strict=True)]
    if torch.is_grad_enabled():  # to differentiate again must not be silent
        pairs = zip(given, tensors, strict=False)
        given = [None if g is None else once(g, upstream, x) for g, x in pairs]
    return (*given, *(None,) * (_GIVEN - 3))


library.define(
    f"linear_logprob({_TENSORS}, {_FIELDS}) -> (Tensor logprob, Tensor lse, Tensor entropy)",
    tags=TAGS,
)
library.define(
    f"linear_logprob_backward(Tensor upstream, {_TENSORS}, {_FIELDS}, bool need_hidden,"
    " bool need_weight, bool need_bias) -> (Tensor hidden, Tensor weight, Tensor bias)",
    tags=TAGS,
)
for _key in ("CPU", "CUDA", "XPU"):
    library.impl("linear_logprob", logprob, _key)
    library.impl("linear_logprob_backward", logprob_backward, _key)
torch.library.register_fake("kdkernels::linear_logprob", _fake, lib=library)
torch.library.register_fake("kdkernels::linear_logprob_backward", _fake_backward, lib=library)
torch.library.register_autograd(
    "kdkernels::linear_logprob", _differentiate, setup_context=_setup, lib=library
)
torch.library.register_autograd(
    "kdkernels::linear_logprob_backward", no_double_backward, lib=library
)

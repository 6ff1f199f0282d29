"""Log-probabilities through an output layer whose classes lie on the ranks of a process group.

A chunk takes one sum over the ranks: of the logits of its ids, which one rank has each, and of
every rank's logsumexps and entropy, in its own column. The backward pass makes the rank's logits
again and needs no other rank's, because the small logits of all ranks are kept; but the hidden
states' gradient is summed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _group, _topk
from .._autograd import save, saved
from .._calls import NO_ID, TopKCall
from .._dtypes import working_dtype
from .._head import Head
from .._ops import once
from .._shards import Shards, agree
from ..reference._rows import top
from ._chunks import Gradients, Rows, default_tokens
from ._inputs import check_ids
from ._logprob import ENTROPY, LogprobCall, first_places, softmax, through
from ._sharded import needs_of


class _Chunk(NamedTuple):
    at: Any
    hidden: Tensor
    logits: Tensor
    """(n, V_r), or one excluded class where the rank has none."""
    ids: Tensor
    """(n, K), global, each once in its row."""
    local: Tensor
    first: Tensor
    small: Tensor
    of_rows: Tensor
    wide: Tensor
    """(n, K + 1): the small logits in float64, as they are and not from the largest."""
    how: TopKCall


def _chunks(
    hidden: Tensor, head: Head, ids: Tensor, shards: Shards, call: LogprobCall
) -> Iterator[_Chunk]:
    temperature = call.numbers[0]
    double = hidden.dtype == torch.float64
    how = TopKCall([temperature], None, double, True, False, True, NO_ID)
    count, vocab = hidden.shape[0], head.weight.shape[0]
    rows = Rows(count, None, NO_ID, call.tokens)
    buffer = hidden.new_full((rows.tokens, max(vocab, 1)), -torch.inf)
    places = torch.arange(ids.shape[1], device=ids.device)
    for at in rows:
        h, asked = hidden[at], ids[at].long()
        first = first_places(asked, places)
        once_each = _topk.marked(asked, first != places)
        local = shards.own(once_each)
        z = buffer[: h.shape[0]]
        if vocab:
            z = head.logits(h, z)
        small, of_rows = _topk.rows_of(call.backend, z, local, None, None, how)
        wide = small.double() + (of_rows[0].double() / temperature).unsqueeze(-1)
        yield _Chunk(at, h, z, once_each, local, first, small, of_rows, wide, how)


def _told(chunk: _Chunk, shards: Shards) -> tuple[Tensor, Tensor, Tensor]:
    """The small logits of all ranks, and each rank's logsumexp and entropy of its classes."""
    k, ranks = chunk.ids.shape[1], len(shards.sizes)
    own = torch.where(chunk.local == NO_ID, 0.0, chunk.wide[:, :k])
    sums = chunk.wide.logsumexp(-1)
    of_rank = [shards.among(x) for x in (chunk.wide[:, k], sums, chunk.of_rows[ENTROPY].double())]
    told = _group.total(torch.cat([own, *of_rank], -1), shards.group)
    columns = told[:, :k].masked_fill(chunk.ids == NO_ID, -torch.inf)
    columns = columns.masked_fill(shards.unknown(chunk.ids), torch.nan)
    rests, sums, entropies = told[:, k:].split(ranks, -1)
    rest = rests.logsumexp(-1, keepdim=True)
    return torch.cat([columns, rest], -1), sums, entropies


class _Logprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ids: Tensor,
        shards: Shards,
        call: LogprobCall,
    ) -> tuple[Tensor, Tensor, Tensor]:
        head = Head(weight, bias, call.softcap, call.logit_scale)
        count, dtype = hidden.shape[0], working_dtype(hidden)
        found = hidden.new_empty(ids.shape, dtype=dtype)
        sums, entropies = (hidden.new_empty(count, dtype=dtype) for _ in range(2))
        kept = hidden.new_empty((count, ids.shape[1] + 1), dtype=torch.float64)
        for chunk in _chunks(hidden, head, ids, shards, call):
            whole, of_ranks, spread = _told(chunk, shards)
            kept[chunk.at] = whole
            origin = top(whole)
            q = softmax(whole - origin)
            found[chunk.at] = q.log.gather(1, chunk.first).to(dtype)
            sums[chunk.at] = (q.lse + origin).squeeze(1).to(dtype)
            masses = of_ranks.softmax(-1)
            within = torch.where(masses == 0, 0.0, masses * spread).sum(-1)
            entropies[chunk.at] = (torch.special.entr(masses).sum(-1) + within).to(dtype)
        ctx.shards, ctx.call = shards, call
        save(ctx, (hidden, weight, bias, ids, kept))
        ctx.mark_non_differentiable(sums, entropies)
        return found, sums, entropies

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Any, ...]:
        hidden, weight, bias, ids, kept = saved(ctx)
        shards, call, needs = ctx.shards, ctx.call, tuple(ctx.needs_input_grad[:3])
        head = Head(weight, bias, call.softcap, call.logit_scale)
        gradients = Gradients(hidden, head, needs)
        with torch.no_grad():
            for chunk in _chunks(hidden, head, ids, shards, call):
                _add(gradients, chunk, kept[chunk.at], upstream[chunk.at].double(), call)
            made = list(gradients.result())
            if needs[0]:
                made[0] = _group.total(made[0].contiguous(), shards.group)
        given: list[Any] = [None] * 3
        for i, (x, g) in enumerate(zip((hidden, weight, bias), made, strict=True)):
            if needs[i]:
                g = g.to(x.dtype)
                given[i] = once(g, upstream, x) if torch.is_grad_enabled() else g
        return (*given, None, None, None)


def _add(
    gradients: Gradients, chunk: _Chunk, whole: Tensor, upstream: Tensor, call: LogprobCall
) -> None:
    """A chunk's gradients, of the rank's classes alone."""
    slopes = through(softmax(whole - top(whole)), chunk.first, upstream)
    rests = chunk.wide[:, -1:], whole[:, -1:]
    share = torch.where(rests[0] == -torch.inf, 0.0, (rests[0] - rests[1]).exp())
    own = torch.where(chunk.local == NO_ID, 0.0, slopes[:, :-1])
    own = torch.cat([own, slopes[:, -1:] * share], -1).to(chunk.small.dtype)
    kept = chunk.logits.clone() if call.softcap else chunk.logits
    gradient = _topk.gradient_of(
        call.backend, chunk.logits, chunk.local, None, None, chunk.small, chunk.of_rows, own,
        None, chunk.how, into=chunk.logits,
    )  # fmt: skip
    head = gradients.head
    if not head.weight.shape[0]:
        gradient = gradient[:, :0]
        kept = kept[:, :0]
    if head.softcap:
        head.through_softcap_(gradient, kept)
    gradients.add(gradient, chunk.hidden, chunk.at)


_apply: Callable[..., tuple[Tensor, Tensor, Tensor]] = _Logprob.apply


def apply(
    group: Any, call: LogprobCall, hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``_logprob.logprob``, of the classes of all ranks, of checked arguments but the ids."""
    settings = call._replace(backend="", symbolic=None)
    said = ("linear_logprob", hidden.shape[1], ids.shape[1], hidden.dtype, settings)
    needs, dtype = needs_of(hidden, weight, bias), working_dtype(hidden)
    shards = agree(
        group, said, hidden.shape[0], weight.shape[0], dtype, needs, hidden.device, "weight"
    )
    check_ids(ids, shards.classes)
    if not call.tokens:
        tokens = default_tokens(hidden.device, max(shards.sizes), hidden.dtype)
        call = call._replace(tokens=tokens)
    return _apply(hidden, weight, bias, ids, shards, call)

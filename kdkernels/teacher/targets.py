"""Sparse teachers from logits: the K most likely ids, or ids drawn at random."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .. import _checks
from .._dtypes import working_dtype
from .sparse import TopKTeacher

BLOCK = 1 << 22
"""Elements of a block of rows: 16 MiB in float32, whatever the size of the logits."""


def top_k(teacher_logits: Tensor, k: int, temperature: float = 1.0) -> TopKTeacher:
    """The K most likely ids of each row with their log-probabilities, and the exact rest.

    The probabilities are softmax(teacher_logits / temperature) over the whole vocabulary.
    ``log_rest`` is the logsumexp of the other logits minus that of all, so that it keeps its digits
    where the rest is 1e-12. The logits are read once, in blocks of rows: beside the result this
    holds one block of 16 MiB (float64: 32 MiB), whatever the number of rows.

    Args:
        teacher_logits: (..., V), the vocabulary last; float64, float32, float16 or bfloat16, any
            strides. A constant. Logits of -inf are absent entries where they come among the K.
        k: entries a row, 1 <= k <= V. k = V leaves no rest: ``log_rest`` is -inf.
        temperature: softening temperature, between 1e-6 and 1e6.

    Returns:
        :class:`TopKTeacher` of rows (...): ids int64, the most likely first (of equal ones any),
        logprobs and log_rest float32 (float64 for float64 logits). A row that is all -inf, or
        holds NaN or +inf, is NaN.

    Raises:
        TypeError, ValueError: ``name must be <expected>, got <got>``.
    """
    teacher_logits = _constant(teacher_logits)
    vocab = teacher_logits.shape[-1]
    k = _checks.integer("k", k)
    if not 1 <= k <= vocab:
        raise _checks.fail("k", f"in [1, {vocab}], the size of the vocabulary", k)
    temperature = _checks.temperature(temperature)
    rows = teacher_logits.shape[:-1]
    kind, device = working_dtype(teacher_logits), teacher_logits.device
    ids = torch.empty(rows.numel(), k, dtype=torch.int64, device=device)
    logprobs = torch.empty(rows.numel(), k, dtype=kind, device=device)
    log_rest = torch.empty(rows.numel(), dtype=kind, device=device)
    room = teacher_logits.new_empty(0)
    for start, block in _blocks(teacher_logits):
        part = slice(start, start + len(block))
        # Memory that is used again costs no page faults: half of the time otherwise.
        if room.shape[:1] != block.shape[:1]:
            room = torch.empty(block.shape, dtype=kind, device=device)
        others = room.copy_(block)
        top, ids[part], log_sum, base = _split(others, k, temperature)
        # Differences from the maximum keep the digits of logits that are far from 0.
        rest = (base - top[:, 0]).div_(temperature).add_(log_sum)
        top = (top - top[:, :1]).div_(temperature)
        total = top.logsumexp(1).logaddexp(rest)
        torch.sub(top, total[:, None], out=logprobs[part])
        torch.sub(rest, total, out=log_rest[part])
    return TopKTeacher(ids.view(*rows, k), logprobs.view(*rows, k), log_rest.view(rows))


def _split(logits: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The k greatest logits, their ids, and the others as log(sum exp((x - base) / T)) and base.

    Spends the logits. ``base`` is the greatest of the others, 0 where they are all -inf.
    """
    vocab = logits.shape[1]
    top, ids = logits.topk(min(k + 1, vocab))
    if k == vocab:
        return top, ids, top.new_full(top.shape[:1], -torch.inf), top.new_zeros(top.shape[:1])
    base = top[:, k]
    base = torch.where(base == -torch.inf, 0.0, base)
    top, ids = top[:, :k], ids[:, :k]
    logits.scatter_(1, ids, -torch.inf).sub_(base[:, None])
    if temperature != 1.0:
        logits.div_(temperature)
    return top, ids, logits.exp_().sum(1).log_(), base


def sampled(
    teacher_logits: Tensor,
    n: int,
    temperature: float = 1.0,
    *,
    generator: torch.Generator | None = None,
) -> TopKTeacher:
    """Ids drawn from the teacher, with their share of the draws as probabilities.

    Random sampling of targets (Anshumann et al., "Sparse Logit Sampling", 2025): n independent
    draws a row from softmax(teacher_logits / temperature), and count / n as the probability of an
    id. Its expectation is the teacher's own probability, for every id of the vocabulary, so the
    expected gradient of a cross-entropy with these targets is that of the whole distribution;
    a truncated top-k is biased towards its K. The targets sum to 1: nothing is outside.

    The draws invert the cumulative distribution, which is summed in float64, in blocks of rows.
    They do not depend on the size of the blocks.

    Args:
        teacher_logits: (..., V), the vocabulary last; float64, float32, float16 or bfloat16, any
            strides. A constant.
        n: draws a row, >= 1.
        temperature: softening temperature, between 1e-6 and 1e6.
        generator: source of the draws, on the device of the logits; None: the device's default.

    Returns:
        :class:`TopKTeacher` of rows (...) and K = min(n, V) entries: ids int64, ascending, each
        once, then absent ones with id 0; logprobs = log(count / n), float32 (float64 for float64
        logits); log_rest = -inf. A row that is all -inf, or holds NaN or +inf, is NaN.

    Raises:
        TypeError, ValueError: ``name must be <expected>, got <got>``.
    """
    teacher_logits = _constant(teacher_logits)
    vocab = teacher_logits.shape[-1]
    n = _checks.at_least_one("n", n)
    temperature = _checks.temperature(temperature)
    device = teacher_logits.device
    if generator is not None:
        if not isinstance(generator, torch.Generator):
            raise _checks.fail_type("generator", "a torch.Generator", type(generator).__name__)
        if generator.device.type != device.type:
            raise _checks.fail("generator", f"on the logits' device {device}", generator.device)
    rows, k = teacher_logits.shape[:-1], min(n, vocab)
    kind = working_dtype(teacher_logits)
    draws = torch.rand(rows.numel(), n, dtype=torch.float64, device=device, generator=generator)
    ids = torch.zeros(rows.numel(), k, dtype=torch.int64, device=device)
    logprobs = torch.empty(rows.numel(), k, dtype=kind, device=device)
    for start, block in _blocks(teacher_logits, width=2):  # in float64: half as many rows
        part = slice(start, start + len(block))
        weights = _copy(block, torch.float64)
        weights.sub_(weights.amax(1, keepdim=True)).div_(temperature)
        cumulative = weights.exp_().cumsum_(1)
        total = cumulative[:, -1:]
        # A draw that rounding lifts to the total would fall behind the last id.
        below = torch.nextafter(total, torch.zeros_like(total))
        points = torch.minimum(draws[part] * total, below)
        drawn = torch.searchsorted(cumulative, points, right=True).clamp_(max=vocab - 1)
        drawn = drawn.sort(1).values
        first = torch.ones_like(drawn, dtype=torch.bool)
        first[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
        place = first.cumsum(1) - 1
        ids[part].scatter_(1, place, drawn)
        counts = torch.zeros(len(block), k, dtype=torch.float64, device=device)
        counts.scatter_add_(1, place, torch.ones_like(draws[part]))
        counts.masked_fill_(~total.isfinite(), torch.nan)
        logprobs[part] = counts.div_(n).log_().to(kind)
    log_rest = torch.full(rows, -torch.inf, dtype=kind, device=device)
    if rows.numel():
        log_rest.masked_fill_(logprobs[:, 0].isnan().view(rows), torch.nan)
    return TopKTeacher(ids.view(*rows, k), logprobs.view(*rows, k), log_rest)


def _constant(value: Tensor) -> Tensor:
    """Check logits and return them without their graph."""
    name = "teacher_logits"
    _checks.tensor(name, value)
    _checks.dtype(name, value)
    if value.dim() < 1 or value.shape[-1] < 2:
        raise _checks.fail(name, "(..., V) with V >= 2", f"shape {tuple(value.shape)}")
    _checks.allocated(name, value)
    _checks.constant(name, value)
    return value.detach()


def _copy(block: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy to work in; rows in one piece, so that sums do not depend on the logits' strides."""
    return block.to(dtype, copy=True, memory_format=torch.contiguous_format)


def _blocks(logits: Tensor, width: int = 1, start: int = 0) -> Iterator[tuple[int, Tensor]]:
    """Blocks (rows, V) of the logits with the number of their first row; none is a copy.

    Rows that do not lie evenly, such as those of ``logits[:, :-1]``, are taken batch by batch.
    """
    if logits.dim() == 1:
        yield start, logits[None]
        return
    rows = logits.shape[:-1].numel()
    try:
        flat = logits.view(rows, logits.shape[-1])
    except RuntimeError:
        for part in logits:
            yield from _blocks(part, width, start)
            start += part.shape[:-1].numel()
        return
    step = max(1, BLOCK // (width * logits.shape[-1]))
    for first in range(0, rows, step):
        yield start + first, flat[first : first + step]

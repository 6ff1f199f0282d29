"""Rows of logits against K ids each: the specification of what sparse teachers need of a student.

    z' = (student - m) / T                   m the row's largest logit
    small_k = z'_{id_k}                      for k < K; -inf where the entry is absent
    small_K = rest = log sum_j exp(z'_j)     over all j that are no ids; -inf where there is none

The softmax of the K + 1 small logits is the student's distribution of the ids and of everything
else together, so every divergence of dense logits, at temperature 1, is one of sparse teachers
here: value and gradient. The rest is never 1 less the sum of the ids' probabilities, whose digits
would be gone where the student is certain of an id. With g the gradient by the small logits

    d / d student_j = g_k / T  for j = id_k,      g_K exp(z'_j - rest) / T  elsewhere.

A row has six numbers too: m (``lse = logsumexp(small) + m / T``), the logsumexp of z - m over all
classes but the target's at temperature 1, the target's cross-entropy (which alone has a gradient),
the entropy of softmax(z'), and what the backward pass takes the rest's shares from: its largest
logit and the logarithm of its sum relative to that. They are 0 where they are not wanted.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._rows import masked_log_softmax, top
from .hard import cross_entropy, entropy


def compress(
    student: Tensor, present: Tensor, ids: Tensor, temperature: float | Tensor
) -> tuple[Tensor, Tensor]:
    """(rows, V) logits, (rows, K) entries that count and their ids -> (rows, K + 1), (rows, 1)."""
    origin = top(student)
    scaled = (student - origin) / temperature
    ids = torch.where(present, ids, 0)
    # Added, not written: absent entries share an id with others.
    count = torch.zeros(scaled.shape, dtype=torch.int32, device=ids.device)
    taken = count.scatter_add(-1, ids, present.to(torch.int32)) > 0
    columns = scaled.gather(-1, ids).masked_fill(~present, -torch.inf)
    _, rest = masked_log_softmax(scaled, taken)
    return torch.cat([columns, rest.unsqueeze(-1)], -1), origin


def rows(
    student: Tensor,
    present: Tensor,
    ids: Tensor,
    target: Tensor | None,
    temperature: float | Tensor,
    *,
    rest: bool,
    hard: bool,
    spread: bool,
) -> tuple[Tensor, Tensor]:
    """The small logits of each row, and its numbers, (6, rows)."""
    small, origin = compress(student, present, ids, temperature)
    if not rest:
        last = torch.arange(small.shape[-1], device=small.device) == small.shape[-1] - 1
        small = small.masked_fill(last, -torch.inf)
    zero = torch.zeros_like(origin).squeeze(-1)
    others = values = spreads = zero
    if hard:
        assert target is not None
        index = torch.arange(student.shape[-1], device=student.device)
        _, others = masked_log_softmax(student - origin, index == target.unsqueeze(-1))
        values = cross_entropy(student, target)
    if spread:
        spreads = entropy(student, temperature, False)
    # Autograd needs nothing of the rest.
    return small, torch.stack([origin.squeeze(-1), others.detach(), values, spreads, zero, zero])

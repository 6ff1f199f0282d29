"""Sequences of a cache, and batches of them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _checks
from .sparse import TopKTeacher


class CachedSequence(NamedTuple):
    """One sequence: ``input_ids`` (S,) int32, and a teacher of rows (S,)."""

    input_ids: Tensor
    teacher: TopKTeacher


class TeacherBatch(NamedTuple):
    """Sequences of one length.

    ``input_ids``, ``attention_mask`` (1 for tokens, 0 for padding) and ``labels`` are (B, S) int64,
    the teacher's rows (B, S). The labels are shifted already, as the losses want them:
    ``labels[b, i]`` is the token after ``input_ids[b, i]``.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    teacher: TopKTeacher

    def to(self, device: torch.device | str | int, *, non_blocking: bool = False) -> TeacherBatch:
        """The same on another device."""
        input_ids, mask, labels = (x.to(device, non_blocking=non_blocking) for x in self[:3])
        teacher = self.teacher.to(device, non_blocking=non_blocking)
        return TeacherBatch(input_ids, mask, labels, teacher)


def _widest(tensors: Sequence[Tensor]) -> torch.dtype:
    """The dtype that holds the values of all."""
    return functools.reduce(torch.promote_types, [x.dtype for x in tensors])


def collate(
    sequences: Sequence[CachedSequence],
    pad_token_id: int = 0,
    ignore_index: int = -100,
    length: int | None = None,
) -> TeacherBatch:
    """Pad sequences on the right to a batch: the ``collate_fn`` of a DataLoader.

    Padded rows hold ``pad_token_id``, absent entries, and ``log_rest`` = 0: all of the probability
    is outside. A label is ``ignore_index`` where no token follows (the last of a sequence, and
    padding), and where the teacher's row has no entry (the prompt of a served completion).

    Args:
        sequences: of a cache, at least one; all with K entries, all with a ``log_rest`` or none.
        pad_token_id: input id of the padding.
        ignore_index: label of the rows that do not count.
        length: tokens of the batch; None: those of the longest sequence. Fixed lengths spare a
            compiled model from recompiling.

    Raises:
        TypeError, ValueError: ``name must be <expected>, got <got>``.
    """
    if not sequences:
        raise _checks.fail("sequences", "at least one", "none")
    pad_token_id = _checks.integer("pad_token_id", pad_token_id)
    ignore_index = _checks.integer("ignore_index", ignore_index)
    longest = max(len(sequence.input_ids) for sequence in sequences)
    length = longest if length is None else _checks.integer("length", length)
    if length < longest:
        raise _checks.fail("length", f"at least {longest}, that of the longest sequence", length)
    first = sequences[0].teacher
    for _, teacher in sequences:
        if teacher.k != first.k or (teacher.log_rest is None) != (first.log_rest is None):
            raise _checks.fail("sequences", f"all like the first, {first}", teacher)
    shape = (len(sequences), length)
    input_ids = torch.full(shape, pad_token_id)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, ignore_index)
    teachers = [teacher for _, teacher in sequences]
    ids = torch.zeros(*shape, first.k, dtype=_widest([x.ids for x in teachers]))
    kind = _widest([x.logprobs for x in teachers])
    logprobs = torch.full((*shape, first.k), -torch.inf, dtype=kind)
    log_rest = None
    rests = [x.log_rest for x in teachers if x.log_rest is not None]
    if rests:
        log_rest = torch.zeros(shape, dtype=_widest(rests))
    for row, (tokens, teacher) in enumerate(sequences):
        n = len(tokens)
        input_ids[row, :n] = tokens
        attention_mask[row, :n] = 1
        labels[row, : n - 1] = tokens[1:]
        ids[row, :n] = teacher.ids
        logprobs[row, :n] = teacher.logprobs
        if log_rest is not None and teacher.log_rest is not None:
            log_rest[row, :n] = teacher.log_rest
    labels.masked_fill_((logprobs == -torch.inf).all(-1), ignore_index)
    return TeacherBatch(input_ids, attention_mask, labels, TopKTeacher(ids, logprobs, log_rest))

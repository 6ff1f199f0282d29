"""A teacher of which a few ids a row are known: top-k, sampled or served."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from .. import _checks
from .._dtypes import INTEGERS


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class TopKTeacher:
    """The log-probabilities of K ids a row, and of everything else together.

    A row is one position of a sequence, and its entries are the teacher's distribution of the token
    that follows: aligned with the student's logits at that position. A log-probability of -inf
    marks an absent entry, whose id means nothing, so rows may hold fewer than K ids. The entries
    need no order. The teacher is a constant.

    Construction looks only at shapes, dtypes and devices; :meth:`check` reads the data.

    Args:
        ids: (..., K) vocabulary indices, any integer type; K >= 1. No id twice in a row.
        logprobs: (..., K) natural logarithms of probabilities, any floating type.
        log_rest: (...) log of the probability of all other ids together, -inf where there is none;
            None where it is not known. Never compute it as log(1 - sum): of rounded
            log-probabilities little of it is left.

    Raises:
        TypeError, ValueError: ``name must be <expected>, got <got>``, for a wrong type, dtype,
            shape or device, and for a tensor that requires grad.
    """

    ids: Tensor
    logprobs: Tensor
    log_rest: Tensor | None = None

    def __post_init__(self) -> None:
        _checks.tensor("ids", self.ids)
        _checks.tensor("logprobs", self.logprobs)
        if self.ids.dtype not in INTEGERS:
            raise _checks.fail_type("ids", "of an integer dtype", self.ids.dtype)
        if self.ids.dim() < 1 or self.ids.shape[-1] < 1:
            expected = "(..., K) with K >= 1"
            raise _checks.fail("ids", expected, f"shape {tuple(self.ids.shape)}")
        _beside("logprobs", self.logprobs, self.ids.shape, self.ids)
        if self.log_rest is not None:
            _checks.tensor("log_rest", self.log_rest, "a Tensor or None")
            _beside("log_rest", self.log_rest, self.ids.shape[:-1], self.ids)

    @property
    def shape(self) -> torch.Size:
        """The shape of the rows, without K."""
        return self.ids.shape[:-1]

    @property
    def k(self) -> int:
        """The entries of a row, absent ones included."""
        return self.ids.shape[-1]

    @property
    def device(self) -> torch.device:
        return self.ids.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the log-probabilities."""
        return self.logprobs.dtype

    def __repr__(self) -> str:
        rest = "None" if self.log_rest is None else str(self.log_rest.dtype).removeprefix("torch.")
        kinds = [str(x.dtype).removeprefix("torch.") for x in (self.ids, self.logprobs)]
        return (
            f"TopKTeacher(shape={tuple(self.shape)}, k={self.k}, ids={kinds[0]},"
            f" logprobs={kinds[1]}, log_rest={rest}, device='{self.device}')"
        )

    def __len__(self) -> int:
        """The size of the first dimension of the rows."""
        if not self.shape:
            raise _checks.fail_type("teacher", "of at least one dimension of rows", "one row")
        return self.shape[0]

    def __getitem__(self, index: Any) -> TopKTeacher:
        """Rows by anything that indexes a tensor of shape ``shape``; K stays as it is.

        Raises:
            IndexError: the index is out of range, or has more dimensions than the rows have.
        """
        parts = index if isinstance(index, tuple) else (index,)
        if sum(_dimensions(part) for part in parts) > len(self.shape):
            raise IndexError(
                f"index must be of at most {len(self.shape)} dimensions, those of the rows,"
                f" got {index!r}"
            )
        entries = (*parts, slice(None)) if any(part is Ellipsis for part in parts) else parts
        rest = None if self.log_rest is None else self.log_rest[parts]
        return TopKTeacher(self.ids[entries], self.logprobs[entries], rest)

    def flatten(self) -> TopKTeacher:
        """The rows in one dimension: ids and logprobs (N, K), log_rest (N,)."""
        rest = None if self.log_rest is None else self.log_rest.reshape(-1)
        ids, logprobs = (x.reshape(-1, self.k) for x in (self.ids, self.logprobs))
        return TopKTeacher(ids, logprobs, rest)

    def to(
        self,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        non_blocking: bool = False,
    ) -> TopKTeacher:
        """The same on another device; ``dtype`` is that of the log-probabilities alone.

        ``log_rest`` keeps its dtype: it is one number a row, and rounding it saves nothing.
        """
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        if dtype is not None and not dtype.is_floating_point:
            raise _checks.fail_type("dtype", "a floating dtype", dtype)

        def moved(x: Tensor, kind: torch.dtype | None = None) -> Tensor:
            return x.to(device=device, dtype=kind or x.dtype, non_blocking=non_blocking)

        rest = None if self.log_rest is None else moved(self.log_rest)
        return TopKTeacher(moved(self.ids), moved(self.logprobs, dtype), rest)

    def pin_memory(self) -> TopKTeacher:
        """The same in pinned memory; ``DataLoader(pin_memory=True)`` calls it."""
        rest = None if self.log_rest is None else self.log_rest.pin_memory()
        return TopKTeacher(self.ids.pin_memory(), self.logprobs.pin_memory(), rest)

    def check(self, vocab_size: int | None = None) -> None:
        """Read the data and raise where it is no distribution; on a GPU the host waits.

        Absent entries may hold any id. A row of absent entries alone, with no ``log_rest``, is a
        position that the teacher says nothing about.

        Args:
            vocab_size: V; ids must be in [0, V). None: ids must be >= 0.

        Raises:
            ValueError: an id out of range or twice in a row, a NaN, a log-probability above 0 or
                probabilities that sum to more than 1 (both by more than the dtype's rounding).
        """
        flat = self.flatten()
        present = flat.logprobs > -torch.inf
        ids = flat.ids.long()
        beyond = ids < 0 if vocab_size is None else (ids < 0) | (ids >= vocab_size)
        bad = beyond & present
        if bad.any():
            expected = "[0, V)" if vocab_size is None else f"[0, {vocab_size})"
            raise _checks.fail("ids", f"in {expected}", int(ids[bad][0]))
        # Absent entries get numbers of their own, so that they equal nothing.
        own = -1 - torch.arange(self.k, device=ids.device)
        ordered = _sorted(torch.where(present, ids, own))
        twice = ordered[:, 1:] == ordered[:, :-1]
        if twice.any():
            raise _checks.fail(
                "ids", "different within a row", f"{int(ordered[:, 1:][twice][0])} twice"
            )
        _no_more_than_one("logprobs", flat.logprobs)
        total = flat.logprobs.double().logsumexp(-1)
        if flat.log_rest is not None:
            _no_more_than_one("log_rest", flat.log_rest)
            total = total.logaddexp(flat.log_rest.double())
        # Rounding a log-probability l moves p by p |l| eps: the entropy times eps in all.
        slack = 1e-4 + 16 * torch.finfo(self.dtype).eps
        if (total > slack).any():
            got = f"probabilities that sum to {float(total.max().exp()):g}"
            raise _checks.fail("logprobs", "of sum at most 1 in each row, log_rest included", got)


def _beside(name: str, value: Tensor, shape: torch.Size, ids: Tensor) -> None:
    _checks.dtype(name, value)
    if value.shape != shape:
        like = "that of ids" if name == "logprobs" else "one number a row of ids"
        raise _checks.fail(name, f"of shape {tuple(shape)}, {like}", tuple(value.shape))
    if value.device != ids.device:
        raise _checks.fail(name, f"on the device of ids, {ids.device}", value.device)
    _checks.constant(name, value)


def _sorted(rows: Tensor) -> Tensor:
    """Rows in ascending order; NumPy sorts short ones ten times faster than torch does."""
    if rows.is_cpu:
        try:
            import numpy
        except ImportError:
            pass
        else:
            return torch.from_numpy(numpy.sort(rows.numpy(), -1))
    return rows.sort(-1).values


def _no_more_than_one(name: str, value: Tensor) -> None:
    if value.isnan().any():
        raise _checks.fail(name, "log-probabilities", "a NaN")
    if (value > 1e-3).any():
        raise _checks.fail(name, "log-probabilities, at most 0", float(value.max()))


def _dimensions(part: Any) -> int:
    """How many dimensions of a tensor one part of an index takes."""
    if part is None or part is Ellipsis or isinstance(part, bool):
        return 0
    if getattr(part, "dtype", None) == torch.bool or (
        isinstance(part, list) and part and isinstance(part[0], bool)
    ):
        return getattr(part, "ndim", 1)
    return 1

"""Writes a teacher's cache to disk, shard by shard."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from .. import _checks
from .._dtypes import INTEGERS
from . import _format
from .sparse import TopKTeacher

SHARD_TOKENS = 131072
"""Tokens of a shard: 51 MB at K = 64 and float16."""


class CacheWriter:
    """Streams sequences with their teacher into a cache of safetensors files.

        with CacheWriter("cache", vocab_size=50257, k=64) as writer:
            for input_ids in sequences:
                writer.append(input_ids, top_k(teacher(input_ids), 64))

    Memory is one shard, whatever the size of the cache: sequences are copied into its buffers and
    written when it is full. At K = 64 and float16 a token takes 392 bytes and a sequence 8. Leaving
    the ``with`` block, or :meth:`close`, finishes the cache; after an exception it stays
    unfinished, and cannot be opened. Several processes write a cache each, which
    ``torch.utils.data.ConcatDataset`` reads as one.

    Args:
        path: folder to make; it must not exist, or be empty.
        vocab_size: V, the size of the teacher's distribution; 2 <= V <= 2^31.
        k: entries a token, 1 <= k <= V.
        temperature: that of the log-probabilities, recorded for the reader; between 1e-6 and 1e6.
        logprob_dtype: torch.float16 (error of a probability up to 0.4 % at log p = -10), or
            torch.float32 (644 bytes a token at K = 64, and 4 more for the input id).
        shard_tokens: tokens of a shard, >= 1; a longer sequence has a shard of its own.
        tokenizer, model: fingerprints that :func:`open_cache` can ask for, any text.

    Raises:
        TypeError, ValueError: ``name must be <expected>, got <got>``.
        ModuleNotFoundError: safetensors is not installed; the message has the command.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        vocab_size: int,
        k: int,
        temperature: float = 1.0,
        logprob_dtype: torch.dtype = torch.float16,
        shard_tokens: int = SHARD_TOKENS,
        tokenizer: str = "",
        model: str = "",
    ) -> None:
        self._save = _format.library().save_file
        self.vocab_size = _checks.integer("vocab_size", vocab_size)
        if not 2 <= self.vocab_size <= 2**31:
            raise _checks.fail("vocab_size", "in [2, 2**31]", vocab_size)
        self.k = _checks.integer("k", k)
        if not 1 <= self.k <= self.vocab_size:
            raise _checks.fail("k", f"in [1, {self.vocab_size}], the size of the vocabulary", k)
        self.temperature = _checks.temperature(temperature)
        if logprob_dtype not in _format.LOGPROBS.values():
            raise _checks.fail("logprob_dtype", "torch.float16 or torch.float32", logprob_dtype)
        self.logprob_dtype = logprob_dtype
        self._capacity = _checks.at_least_one("shard_tokens", shard_tokens)
        for name, value in (("tokenizer", tokenizer), ("model", model)):
            if not isinstance(value, str):
                raise _checks.fail_type(name, "a str", type(value).__name__)
        self.tokenizer, self.model = tokenizer, model
        self.path = Path(path)
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise _checks.fail(
                "path", "a new or an empty folder", f"{self.path}, which holds files"
            )
        self.path.mkdir(parents=True, exist_ok=True)
        self._facts: _format.Facts | None = None  # with the first sequence: it has a rest or not
        self._buffers: dict[str, Tensor] = {}
        self._starts = [0]
        self._shards: list[dict[str, Any]] = []
        self._closed = False

    def append(self, input_ids: Tensor, teacher: TopKTeacher) -> None:
        """Add one sequence.

        Args:
            input_ids: (S,) token ids, any integer type, in [0, 2^31); S >= 1.
            teacher: rows (S,) and at most ``k`` entries, on any device; row i is the distribution
                of the token after ``input_ids[i]``. Narrower rows get absent entries. Either every
                sequence of a cache has a ``log_rest`` or none has. Rows that are to stay out of the
                loss, a prompt's, hold -inf alone: :func:`collate` gives them no label.

        Raises:
            TypeError, ValueError: ``name must be <expected>, got <got>``; the data of the teacher
                are read, see :meth:`TopKTeacher.check`. Nothing is added then.
        """
        if self._closed:
            raise _checks.fail("writer", "open", "a closed one")
        tokens = self._checked(input_ids, teacher)
        rest = teacher.log_rest is not None
        if self._facts is None:
            name = str(self.logprob_dtype).removeprefix("torch.")
            self._facts = _format.Facts(
                self.vocab_size, self.k, self.temperature, name, rest, self.tokenizer, self.model
            )
        elif self._facts.log_rest != rest:
            expected = "a Tensor" if self._facts.log_rest else "None"
            got = "a Tensor" if rest else "None"
            raise _checks.fail("teacher.log_rest", f"{expected}, as of the first sequence", got)
        start = self._starts[-1]
        if start and start + tokens > self._capacity:
            self._flush()
            start = 0
        stop = start + tokens
        buffers = self._room(stop)
        ids, logprobs = buffers["topk_ids"], buffers["topk_logprobs"]
        width = teacher.k
        logprobs[start:stop, :width].copy_(teacher.logprobs)
        logprobs[start:stop, width:] = -torch.inf
        ids[start:stop, :width].copy_(teacher.ids)
        ids[start:stop, width:] = 0
        ids[start:stop].masked_fill_(logprobs[start:stop] == -torch.inf, 0)
        if teacher.log_rest is not None:
            buffers["log_rest"][start:stop].copy_(teacher.log_rest)
        buffers["input_ids"][start:stop].copy_(input_ids)
        self._starts.append(stop)

    def _checked(self, input_ids: Tensor, teacher: TopKTeacher) -> int:
        """The tokens of a sequence that can be stored."""
        _checks.tensor("input_ids", input_ids)
        if input_ids.dtype not in INTEGERS:
            raise _checks.fail_type("input_ids", "of an integer dtype", input_ids.dtype)
        if input_ids.dim() != 1 or not len(input_ids):
            got = f"shape {tuple(input_ids.shape)}"
            raise _checks.fail("input_ids", "(S,) with S >= 1", got)
        if not isinstance(teacher, TopKTeacher):
            raise _checks.fail_type("teacher", "a TopKTeacher", type(teacher).__name__)
        if teacher.shape != input_ids.shape:
            expected = f"of {tuple(input_ids.shape)} rows, one for each input id"
            raise _checks.fail("teacher", expected, tuple(teacher.shape))
        if teacher.k > self.k:
            raise _checks.fail("teacher", f"of at most k={self.k} entries a row", teacher.k)
        low, high = (int(x) for x in input_ids.aminmax())
        if low < 0 or high >= 2**31:
            raise _checks.fail("input_ids", "in [0, 2**31)", low if low < 0 else high)
        teacher.check(self.vocab_size)
        return len(input_ids)

    def _room(self, tokens: int) -> dict[str, Tensor]:
        """The buffers of a shard; larger ones for a sequence that is longer than a shard."""
        assert self._facts is not None
        if not self._buffers or len(self._buffers["input_ids"]) < tokens:
            size = max(tokens, self._capacity)
            self._buffers = {
                name: torch.empty((size, self.k) if name.startswith("topk") else size, dtype=dtype)
                for name, dtype in self._facts.dtypes.items()
                if name != "offsets"
            }
        return self._buffers

    def _flush(self) -> None:
        assert self._facts is not None
        tokens = self._starts[-1]
        tensors = {name: buffer[:tokens] for name, buffer in self._buffers.items()}
        tensors["offsets"] = torch.tensor(self._starts)
        entry = {
            "file": f"shard-{len(self._shards):05d}.safetensors",
            "tokens": tokens,
            "sequences": len(self._starts) - 1,
            "hash": _format.content_hash(tensors),
        }
        metadata = {"format": _format.NAME, "version": _format.VERSION, "hash": entry["hash"]}
        file = self.path / str(entry["file"])
        self._save(tensors, file, metadata={**metadata, **self._facts.text()})
        entry["bytes"] = file.stat().st_size
        self._shards.append(entry)
        self._starts = [0]

    def close(self) -> None:
        """Write what is left, and the index; a second call does nothing.

        Raises:
            ValueError: no sequence was appended.
        """
        if self._closed:
            return
        if self._facts is None:
            raise _checks.fail("writer", "given at least one sequence", "none")
        if self._starts[-1]:
            self._flush()
        index = {
            "format": _format.NAME,
            "version": _format.VERSION,
            **vars(self._facts),
            "tokens": sum(shard["tokens"] for shard in self._shards),
            "sequences": sum(shard["sequences"] for shard in self._shards),
            "hash": _format.cache_hash(self._facts, self._shards),
            "shards": self._shards,
        }
        # Under another name first: an index that is there is whole.
        unfinished = self.path / f"{_format.INDEX}.unfinished"
        unfinished.write_text(json.dumps(index, indent=1), encoding="utf-8")
        unfinished.replace(self.path / _format.INDEX)
        self._closed = True
        self._buffers = {}

    def __enter__(self) -> CacheWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()

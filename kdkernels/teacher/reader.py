"""Reads a teacher's cache: memory-mapped, a sequence at a time."""

from __future__ import annotations

import bisect
import itertools
import json
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .. import _checks
from . import _format
from .batches import CachedSequence
from .sparse import TopKTeacher

OPEN_SHARDS = 4
"""Shards that stay mapped: what was read of them counts as the process's memory, until the system
wants it back. Mapping one again takes 0.3 ms."""


def open_cache(
    path: str | os.PathLike[str],
    *,
    vocab_size: int | None = None,
    k: int | None = None,
    temperature: float | None = None,
    tokenizer: str | None = None,
    model: str | None = None,
    hash: str | None = None,
    verify: bool = False,
) -> TeacherCache:
    """Open a cache that a :class:`CacheWriter` has finished.

    This reads the index and the header of every shard, no data, and compares them: a file that is
    cut short, of another cache or of another program raises here. What a caller gives besides the
    path is what it expects of the cache; the first difference raises.

    Args:
        path: the cache's folder.
        vocab_size, k, temperature, tokenizer, model: as given to the writer; None: anything.
        hash: ``TeacherCache.hash`` of the cache that is meant; None: anything.
        verify: read all data once and compare them with their hashes, see
            :meth:`TeacherCache.verify`.

    Raises:
        TypeError, ValueError: ``name must be <expected>, got <got>``.
        ModuleNotFoundError: safetensors is not installed; the message has the command.
    """
    cache = TeacherCache(path)
    facts = cache.facts
    expected = {
        "vocab_size": (vocab_size, facts.vocab_size),
        "k": (k, facts.k),
        "temperature": (temperature, facts.temperature),
        "tokenizer": (tokenizer, facts.tokenizer),
        "model": (model, facts.model),
        "hash": (hash, cache.hash),
    }
    for name, (given, stored) in expected.items():
        if given is not None and given != stored:
            raise _checks.fail(name, f"{stored!r}, that of the cache {cache.path}", repr(given))
    if verify:
        cache.verify()
    return cache


class TeacherCache(Dataset[CachedSequence]):
    """A cache on disk as a map-style Dataset of sequences; made by :func:`open_cache`.

        loader = DataLoader(open_cache("cache"), batch_size=8, shuffle=True, collate_fn=collate)

    ``cache[i]`` maps the shard of sequence i and reads that sequence: ``input_ids`` (S,) int32 and
    a :class:`TopKTeacher` with ids (S, K) int32, logprobs (S, K) float16 or float32 as written, and
    log_rest (S,) float32 or None. ``len(cache)`` counts sequences. Workers of a DataLoader map the
    same pages; nothing is loaded whole.

    Attributes:
        path: the folder.
        vocab_size, k, temperature, logprob_dtype, tokenizer, model: as given to the writer.
        tokens: of all sequences.
        hash: SHA-256 of the content and of the facts above, to record beside a training run.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        library = _format.library()
        index = _index(self.path)
        self.facts = _facts(self.path, index)
        self._shards: list[dict[str, Any]] = index["shards"]
        for shard in self._shards:
            _check_shard(library, self.path / shard["file"], shard, self.facts)
        self.hash: str = index["hash"]
        if self.hash != _format.cache_hash(self.facts, self._shards):
            raise _foreign(self.path, f"one whose {_format.INDEX} does not match its own hash")
        self.tokens = sum(shard["tokens"] for shard in self._shards)
        # Sequences before each shard, and all of them.
        counts = (shard["sequences"] for shard in self._shards)
        self._first = list(itertools.accumulate(counts, initial=0))
        self._open: OrderedDict[int, _Shard] = OrderedDict()

    @property
    def vocab_size(self) -> int:
        return self.facts.vocab_size

    @property
    def k(self) -> int:
        return self.facts.k

    @property
    def temperature(self) -> float:
        return self.facts.temperature

    @property
    def logprob_dtype(self) -> torch.dtype:
        return _format.LOGPROBS[self.facts.logprob_dtype]

    @property
    def tokenizer(self) -> str:
        return self.facts.tokenizer

    @property
    def model(self) -> str:
        return self.facts.model

    def __repr__(self) -> str:
        return (
            f"TeacherCache({str(self.path)!r}, sequences={len(self)}, tokens={self.tokens},"
            f" vocab_size={self.vocab_size}, k={self.k}, temperature={self.temperature:g})"
        )

    def __len__(self) -> int:
        return self._first[-1]

    def __getitem__(self, index: int) -> CachedSequence:
        """One sequence; negative indices count from the end.

        Raises:
            TypeError, IndexError: not an int, or out of range.
        """
        i = _checks.integer("index", index)
        if not -len(self) <= i < len(self):
            raise IndexError(f"index must be in [{-len(self)}, {len(self)}), got {index}")
        i %= len(self)
        number = bisect.bisect_right(self._first, i) - 1
        return self._shard(number).sequence(i - self._first[number])

    def lengths(self) -> Tensor:
        """The tokens of each sequence, (len(self),) int64, for samplers that group by length."""
        parts = [self._shard(i).offsets.diff() for i in range(len(self._shards))]
        return torch.cat(parts)

    def verify(self) -> None:
        """Read all data, a shard at a time, and compare them with the hashes that were recorded.

        Raises:
            ValueError: a shard's data are not those that were written.
        """
        opened = _format.library().safe_open
        for shard in self._shards:
            file = self.path / shard["file"]
            with opened(file, framework="pt") as handle:
                tensors = {name: handle.get_tensor(name) for name in self.facts.dtypes}
                if _format.content_hash(tensors) != shard["hash"]:
                    got = f"{file}, whose data are damaged"
                    raise _checks.fail("shard", f"of the content hash {shard['hash']}", got)

    def _shard(self, number: int) -> _Shard:
        shard = self._open.pop(number, None)
        if shard is None:
            shard = _Shard(self.path / self._shards[number]["file"], self.facts)
            if len(self._open) >= OPEN_SHARDS:
                self._open.popitem(last=False)
        self._open[number] = shard  # as the one that was used last
        return shard

    def __getstate__(self) -> dict[str, Any]:
        # Mappings do not go into another process; it opens its own.
        return {**self.__dict__, "_open": OrderedDict()}


class _Shard:
    """A shard that is mapped, and where its sequences start."""

    def __init__(self, file: Path, facts: _format.Facts) -> None:
        handle = _format.library().safe_open(file, framework="pt")
        self.offsets: Tensor = handle.get_tensor("offsets").clone()
        self._slices = {name: handle.get_slice(name) for name in facts.dtypes if name != "offsets"}

    def sequence(self, i: int) -> CachedSequence:
        start, stop = int(self.offsets[i]), int(self.offsets[i + 1])
        # A copy: what views the map would share its whole shard with a DataLoader's process.
        part = {name: piece[start:stop].clone() for name, piece in self._slices.items()}
        teacher = TopKTeacher(part["topk_ids"], part["topk_logprobs"], part.get("log_rest"))
        return CachedSequence(part["input_ids"], teacher)


def _foreign(path: Path, got: str) -> ValueError:
    return _checks.fail("path", "the folder of a teacher's cache", f"{path}, {got}")


def _index(path: Path) -> dict[str, Any]:
    """The index of a cache of this version."""
    if not path.is_dir():
        raise _foreign(path, "which is no folder")
    file = path / _format.INDEX
    if not file.exists():
        got = f"one without {_format.INDEX} (its writer was not closed, or another program's)"
        raise _foreign(path, got)
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
        own = index["format"] == _format.NAME
    except (ValueError, KeyError, TypeError):
        own = False
    if not own:
        raise _foreign(path, f"one whose {_format.INDEX} is of another program, or damaged")
    if index.get("version") != _format.VERSION:
        expected = f"a cache of format version {_format.VERSION}"
        raise _checks.fail("path", expected, f"{path}, of version {index.get('version')}")
    return dict(index)


def _facts(path: Path, index: dict[str, Any]) -> _format.Facts:
    """The facts of an index whose parts are all there."""
    try:
        facts = _format.Facts.of(index)
        for shard in index["shards"]:
            numbers = (shard["bytes"], shard["tokens"], shard["sequences"])
            texts = (shard["file"], shard["hash"], index["hash"])
            if not all(isinstance(x, int) and x > 0 for x in numbers):
                raise ValueError("a shard of no size")
            # A file's name alone: an index leads nowhere else.
            if not all(isinstance(x, str) for x in texts) or Path(shard["file"]).name != texts[0]:
                raise ValueError("a shard without a name")
        return facts
    except (ValueError, KeyError, TypeError):
        raise _foreign(path, f"one whose {_format.INDEX} is incomplete") from None


def _check_shard(library: Any, file: Path, shard: dict[str, Any], facts: _format.Facts) -> None:
    """Compare a file's size and header with what the index says of it."""
    if not file.exists():
        raise _checks.fail("shard", f"at {file}, as {_format.INDEX} says", "no file")
    size = file.stat().st_size
    if size != shard["bytes"]:
        expected = f"{shard['bytes']} bytes, as {_format.INDEX} says"
        kind = "cut short" if size < shard["bytes"] else "too long"
        raise _checks.fail("shard", expected, f"{file} of {size} bytes, {kind}")
    wanted = {"format": _format.NAME, "version": _format.VERSION, "hash": shard["hash"]}
    wanted |= facts.text()
    shapes: dict[str, tuple[int, ...]] = {
        "topk_ids": (shard["tokens"], facts.k),
        "topk_logprobs": (shard["tokens"], facts.k),
        "log_rest": (shard["tokens"],),
        "input_ids": (shard["tokens"],),
        "offsets": (shard["sequences"] + 1,),
    }
    try:
        with library.safe_open(file, framework="pt") as handle:
            found = handle.metadata() or {}
            parts = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118
            tensors = {
                name: (tuple(part.get_shape()), part.get_dtype()) for name, part in parts.items()
            }
    except Exception as error:  # safetensors has its own, OSError, and panics of its parser
        raise _checks.fail("shard", "a safetensors file", f"{file} ({error})") from None
    for name, value in wanted.items():
        if found.get(name) != value:
            expected = f"of {name} {value!r}, as {_format.INDEX} says"
            raise _checks.fail("shard", expected, f"{file} of {name} {found.get(name)!r}")
    stored = {name: (shapes[name], _CODES[dtype]) for name, dtype in facts.dtypes.items()}
    if tensors != stored:
        raise _checks.fail("shard", f"of tensors {stored}", f"{file} of {tensors}")


_CODES = {torch.int32: "I32", torch.int64: "I64", torch.float16: "F16", torch.float32: "F32"}
"""safetensors' names of the dtypes."""

"""``python -m benchmarks.teacher_cache``: a teacher's cache of a million tokens, written and read.

Each step runs in a process of its own, whose peak of memory is reported above what it held before;
pages that a reader has mapped count, though they are the system's cache of the files.
Beside it stands the plain form of the same bytes: files written from one buffer, read into one.
"Cold" reads come after the files' pages were dropped from the system's cache.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from kdkernels.teacher import CacheWriter, TopKTeacher, collate, open_cache, top_k

from .alone import alone, mark
from .machine import busy

BUDGET = 400
"""Bytes a token at K = 64 and float16."""
MIB = 2**20


def sequences(count: int, length: int, vocab: int, k: int) -> list[tuple[Any, TopKTeacher]]:
    """Some sequences with the top-k of Gaussian logits, which are written again and again."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(count):
        ids = torch.rand(length, 4 * k, generator=generator).argsort(-1)[:, :k] * (vocab // (4 * k))
        logits = torch.randn(length, k + 1, generator=generator) * 4
        logprobs = torch.log_softmax(logits, -1)
        input_ids = torch.randint(vocab, (length,), generator=generator)
        made.append((input_ids, TopKTeacher(ids, logprobs[:, :k], logprobs[:, k])))
    return made


def write(folder: Path, tokens: int, length: int, vocab: int, k: int) -> float:
    pool = sequences(8, length, vocab, k)
    mark()
    start = time.perf_counter()
    with CacheWriter(folder, vocab_size=vocab, k=k) as writer:
        for i in range(tokens // length):
            writer.append(*pool[i % len(pool)])
    return time.perf_counter() - start


def read(folder: Path, order: str) -> float:
    """All sequences, one at a time; each number is touched, because a map reads nothing before."""
    mark()
    start = time.perf_counter()
    cache = open_cache(folder)
    indices = torch.randperm(len(cache)) if order == "shuffled" else torch.arange(len(cache))
    for i in indices.tolist():
        _, teacher = cache[i]
        assert teacher.k == cache.k
    return time.perf_counter() - start


def batches(folder: Path) -> float:
    """Shuffled batches of eight, as training reads them, in one process."""
    mark()
    start = time.perf_counter()
    loader = torch.utils.data.DataLoader(
        open_cache(folder), batch_size=8, shuffle=True, collate_fn=collate
    )
    for batch in loader:
        assert len(batch.input_ids)
    return time.perf_counter() - start


def verify(folder: Path) -> float:
    mark()
    start = time.perf_counter()
    open_cache(folder, verify=True)
    return time.perf_counter() - start


def plain_write(folder: Path, source: Path) -> float:
    """The same bytes from one buffer, file by file."""
    folder.mkdir()
    files = [(file.name, file.stat().st_size) for file in sorted(source.iterdir())]
    buffer = bytes(max(size for _, size in files))
    mark()
    start = time.perf_counter()
    for name, size in files:
        with (folder / name).open("wb", buffering=0) as out:
            out.write(memoryview(buffer)[:size])
    return time.perf_counter() - start


def plain_read(folder: Path) -> float:
    """The same bytes into one buffer, file by file."""
    files = sorted(folder.iterdir())
    buffer = bytearray(max(file.stat().st_size for file in files))
    mark()
    start = time.perf_counter()
    for file in files:
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass
    return time.perf_counter() - start


def cool(folder: Path) -> None:
    """Write the files' pages to the disk and drop them from the system's cache."""
    for file in folder.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def time_top_k(rows: int, vocab: int, k: int) -> tuple[float, float]:
    """Seconds of ``top_k`` and of ``log_softmax`` with ``topk``: one thread, the best of three."""
    torch.set_num_threads(1)
    logits = 4 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(0))
    ours, plain = [], []
    for _ in range(3):
        start = time.perf_counter()
        top_k(logits, k)
        middle = time.perf_counter()
        torch.log_softmax(logits, -1).topk(k)
        ours.append(middle - start)
        plain.append(time.perf_counter() - middle)
    return min(ours), min(plain)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--length", type=int, default=1000, help="tokens of a sequence")
    parser.add_argument("--vocab", type=int, default=50257)
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--folder", type=Path, help="where to write; default: a temporary folder")
    parser.add_argument("--rows", type=int, default=256, help="rows of logits to time top_k on")
    options = parser.parse_args()
    if warning := busy():
        print(warning)
    root = Path(tempfile.mkdtemp(prefix="teacher-cache-", dir=options.folder))
    try:
        return measure(root, options)
    finally:
        shutil.rmtree(root)


def measure(root: Path, options: argparse.Namespace) -> int:
    cache, plain = root / "cache", root / "plain"
    arguments = (options.tokens, options.length, options.vocab, options.k)
    steps = [("write", alone(write, cache, *arguments))]
    size = sum(file.stat().st_size for file in cache.iterdir())
    steps.append(("plain write", alone(plain_write, plain, cache)))
    steps.append(("read in order", alone(read, cache, "in order")))
    steps.append(("read shuffled", alone(read, cache, "shuffled")))
    steps.append(("batches of 8", alone(batches, cache)))
    steps.append(("verify", alone(verify, cache)))
    steps.append(("plain read", alone(plain_read, cache)))
    if hasattr(os, "posix_fadvise"):
        cool(cache)
        steps.append(("read in order, cold", alone(read, cache, "in order")))
        cool(cache)
        steps.append(("plain read, cold", alone(plain_read, cache)))
    tokens = options.tokens // options.length * options.length
    each = size / tokens
    print(f"{tokens} tokens, K = {options.k}: {size / 1e6:.1f} MB, {each:.1f} bytes a token")
    print(f"{'step':<22}{'s':>8}{'MB/s':>8}{'peak RSS':>14}")
    for name, (seconds, peak) in steps:
        speed = size / 1e6 / seconds
        print(f"{name:<22}{seconds:>8.2f}{speed:>8.0f}{peak / MIB:>+10.0f} MiB")
    ours, usual = time_top_k(options.rows, options.vocab, options.k)
    print(
        f"top_k of {options.rows} x {options.vocab} float32, one thread: {ours * 1e3:.0f} ms,"
        f" {ours / usual:.2f} of log_softmax and topk"
    )
    if options.k == 64 and each > BUDGET:
        print(f"MISS: more than {BUDGET} bytes a token")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

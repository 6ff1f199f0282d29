"""A step in a fresh process: its seconds, and the increase of the process's peak of memory."""

from __future__ import annotations

import contextlib
import multiprocessing
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

MIB = 2**20
_before = 0


def mark() -> None:
    """What the process holds before the step that is measured; where the system can (Linux), a
    peak that a warm-up left behind is forgotten."""
    global _before
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    _before = _peak()


def _peak() -> int:
    status = Path("/proc/self/status")
    if status.exists():
        lines = status.read_text().splitlines()
        (peak,) = [line.split()[1] for line in lines if line.startswith("VmHWM")]
        return int(peak) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _child(
    pipe: Any, threads: int, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(threads)
    result = function(*arguments)
    pipe.send((result, _peak() - _before))


def alone(function: Callable[..., Any], *arguments: Any, threads: int = 1) -> tuple[Any, int]:
    """What the function returns, its seconds usually, and the increase of the peak in bytes."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_child, args=(there, threads, function, arguments))
    process.start()
    there.close()
    result: tuple[Any, int] = here.recv()
    process.join()
    return result

"""Times taken in turns, and the backend that a loss takes."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence

import torch

import kdkernels


def best_backend(name: str, device: torch.device) -> str:
    """The backend that ``backend=None`` picks: the first with nothing against it."""
    requested = os.environ.get("KDKERNELS_BACKEND")
    reasons = kdkernels.available(device)[name]
    return requested or next(backend for backend, against in reasons.items() if not against)


def _nothing() -> None:
    pass


def median_seconds(
    contenders: Sequence[Callable[[], object]],
    device: torch.device,
    rounds: int = 15,
) -> list[float]:
    """Median time of a call of each, taken in turns so that a busy machine slows all alike."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else _nothing
    seconds: list[list[float]] = [[] for _ in contenders]
    for turn in range(rounds):
        for once, taken in zip(contenders, seconds, strict=True):
            # As many calls as take about 4 ms, by the turn before.
            calls = min(20, max(1, round(4e-3 / taken[-1]))) if turn else 1
            synchronize()
            begin = time.perf_counter()
            for _ in range(calls):
                once()
            synchronize()
            taken.append((time.perf_counter() - begin) / calls)
    return [statistics.median(taken[1:]) for taken in seconds]  # the first round warms up

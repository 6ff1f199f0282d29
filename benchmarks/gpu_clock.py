"""The clock of a GPU's benchmarks, and one of the CPU that rehearses them.

A rehearsal runs the same code on tiny CPU tensors, so that a mistake is found where no GPU is; its
numbers mean nothing.
"""

from __future__ import annotations

import gc
import re
import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import torch

Step = Callable[[], object]

ROUND = 2e-3
"""Seconds: a round repeats a short step until the clock and the noise of a call do not matter."""
BURST = 40
"""Steps whose launches the queue holds without making the host wait."""


class Launch(NamedTuple):
    """One kernel that ran."""

    name: str
    microseconds: float


class Clock(Protocol):
    """What is measured of a step."""

    device: str
    rehearsal: bool

    def synchronize(self) -> None: ...
    def seconds(self, body: Step, iterations: int) -> float: ...
    def launches(self, body: Step, steps: int = 3) -> list[Launch]: ...
    def peak(self, body: Step) -> int: ...
    def free_bytes(self) -> int: ...
    def release(self) -> None: ...


LETTING_GO = 0.02
"""Seconds until autograd's thread has let go of a gradient that it returned."""


class CudaClock:
    """Events on the current stream, the profiler's kernels, the caching allocator's peak."""

    device = "cuda"
    rehearsal = False

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def seconds(self, body: Step, iterations: int) -> float:
        """Seconds a call between two events around ``iterations`` calls."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(iterations):
            body()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / iterations

    def launches(self, body: Step, steps: int = 3) -> list[Launch]:
        """The kernels of one step, in order, with their mean times over ``steps``."""
        from torch.autograd import DeviceType

        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        self.synchronize()
        with torch.profiler.profile(activities=activities) as profile:
            for _ in range(steps):
                body()
            self.synchronize()
        found = [
            event
            for event in profile.events()
            if event.device_type == DeviceType.CUDA
            and not getattr(event, "is_user_annotation", False)
            and is_work(event.name)
        ]
        found.sort(key=lambda event: event.time_range.start)
        return merged([(e.name, e.time_range.elapsed_us()) for e in found], steps)

    def peak(self, body: Step) -> int:
        self.synchronize()
        time.sleep(LETTING_GO)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        body()
        self.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def free_bytes(self) -> int:
        free, _ = torch.cuda.mem_get_info()
        kept: int = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return free + kept

    def release(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()


class RehearsalClock:
    """The CPU in the place of a GPU; nothing that it returns is a measurement."""

    device = "cpu"
    rehearsal = True

    def synchronize(self) -> None:
        return None

    def seconds(self, body: Step, iterations: int) -> float:
        start = time.perf_counter()
        for _ in range(iterations):
            body()
        return (time.perf_counter() - start) / iterations

    def launches(self, body: Step, steps: int = 3) -> list[Launch]:
        for _ in range(steps):
            body()
        return merged([("rehearsed<float>(int)", 1.0)] * steps, steps)

    def peak(self, body: Step) -> int:
        body()
        return 0

    def free_bytes(self) -> int:
        return 8 << 30

    def release(self) -> None:
        gc.collect()


def is_work(name: str) -> bool:
    """Whether an event of the device is a kernel or a copy, and no annotation around them."""
    return not re.match(r"ProfilerStep|## |Torch-Compiled|CompiledFunction", name)


def merged(events: list[tuple[str, float]], steps: int) -> list[Launch]:
    """The kernels of one step of several equal ones, each with the mean of its times.

    Where the steps are not equal - one launched a kernel that the others did not - the kernels of
    all are counted, and divided by the steps only in their times.
    """
    if not events or len(events) % steps:
        return [Launch(short(name), took) for name, took in events]
    size = len(events) // steps
    return [
        Launch(short(events[i][0]), statistics.fmean(took for _, took in events[i::size]))
        for i in range(size)
    ]


def short(name: str) -> str:
    """``row_lanes<float, 32, 8>`` of a demangled kernel; Triton's names are short as they are."""
    text = re.sub(r"\(anonymous namespace\)::", "", name.removeprefix("void "))
    text = re.sub(r"\b(?:kdkernels|at|cuda|native)::", "", text)
    depth = 0
    for index, letter in enumerate(text):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            text = text[:index]
            break
    return text if len(text) <= 60 else text[:57] + "..."


def calibrate(clock: Clock, body: Step) -> tuple[int, float]:
    """Iterations of a round, and the time of a call, after a warm-up."""
    clock.seconds(body, 2)
    took = max(min(clock.seconds(body, 1) for _ in range(2)), 1e-7)
    iterations = max(1, min(200, int(ROUND / took)))
    return iterations, took


def interleaved(
    clock: Clock, bodies: Mapping[str, Step], budget: float, rounds: tuple[int, int] = (5, 60)
) -> dict[str, list[float]]:
    """Seconds of each step in each round, taking turns so that noise hits all alike."""
    iterations, expected = {}, 0.0
    for name, body in bodies.items():
        iterations[name], took = calibrate(clock, body)
        expected += took * iterations[name]
    count = max(rounds[0], min(rounds[1], int(budget / max(expected, 1e-9))))
    taken: dict[str, list[float]] = {name: [] for name in bodies}
    names = list(bodies)
    collecting = gc.isenabled()
    gc.disable()
    try:
        for _ in range(count):
            for name in names:
                taken[name].append(clock.seconds(bodies[name], iterations[name]))
            names.append(names.pop(0))  # nobody always runs after the same neighbour
    finally:
        if collecting:
            gc.enable()
    return taken


def host_seconds(clock: Clock, body: Step, calls: int = 400) -> float:
    """Median time from the call of a step to its return; nothing waits for the device inside."""
    taken = []
    clock.seconds(body, 3)
    for index in range(calls):
        if index % BURST == 0:
            clock.synchronize()
        start = time.perf_counter()
        body()
        taken.append(time.perf_counter() - start)
    clock.synchronize()
    return statistics.median(taken)


def copy_bandwidth(clock: Clock, size: int, repeats: int = 20) -> float:
    """Bytes a second of a device-to-device copy, read and written bytes together."""
    source = torch.empty(size // 4, dtype=torch.float32, device=clock.device).normal_()
    target = torch.empty_like(source)

    def body() -> None:
        target.copy_(source)

    clock.seconds(body, 3)
    took = statistics.median(clock.seconds(body, 2) for _ in range(repeats))
    return 2 * source.numel() * 4 / took

"""What is measured: the step, its time, its peak memory."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .problem import Problem

Step = Callable[[], Any]

MIN_ROUND = 2e-3
"""Seconds: a round repeats a short step until the clock and the noise of a call do not matter."""

SLOW = 0.3
"""Seconds of a step that is warm after two calls, and long enough to be a round."""


def step(function: Callable[..., Tensor], problem: Problem, mode: str, floor: bool = False) -> Step:
    """The measured step: the loss without gradients, or the loss and ``backward()``."""
    inputs = problem.inputs

    def forward() -> None:
        with torch.no_grad():
            function(*inputs)

    def forward_backward() -> None:
        problem.forget_gradients()
        function(*inputs).backward()

    return forward if floor or mode == "forward" else forward_backward


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize()


def repeated(body: Step, device: str, iterations: int) -> Step:
    """The step, waiting for the device after every ``iterations`` calls and not after each.

    A training step does not wait for its loss, so the queue may run ahead within a round.
    """
    if device == "cpu":
        return body
    calls = 0

    def call() -> None:
        nonlocal calls
        body()
        calls += 1
        if calls % iterations == 0:
            synchronize(device)

    return call


def seconds(body: Step, device: str, iterations: int) -> float:
    """Seconds a call, over one round."""
    start = time.perf_counter()
    for _ in range(iterations):
        body()
    synchronize(device)
    return (time.perf_counter() - start) / iterations


def calibrate(body: Step, device: str) -> tuple[int, float]:
    """Warm up; return the iterations of a round and the time of a call."""
    took = seconds(body, device, 2)
    if took > SLOW:
        return 1, took
    took = min(seconds(body, device, 1) for _ in range(3))
    iterations = max(1, min(2000, int(MIN_ROUND / took)))
    if iterations > 1:
        took = min(seconds(body, device, iterations) for _ in range(3))
    return iterations, took


def plan(body: Step, device: str, budget: float) -> tuple[int, int]:
    """Rounds and iterations a round that fill ``budget`` seconds, at least five rounds."""
    iterations, took = calibrate(body, device)
    return max(5, min(200, int(budget / (took * iterations)))), iterations


def interleaved(bodies: Mapping[str, Step], device: str, budget: float) -> dict[str, float]:
    """Median seconds of each step, taking turns round by round so that noise hits all alike."""
    iterations, expected = {}, 0.0
    for name, body in bodies.items():
        iterations[name], took = calibrate(body, device)
        expected += took * (iterations[name] + 1)
    rounds = max(7, min(300, int(budget / expected)))
    times: dict[str, list[float]] = {name: [] for name in bodies}
    names = list(bodies)
    collecting = gc.isenabled()
    gc.disable()
    try:
        for _ in range(rounds):
            for name in names:
                # What a large neighbour left of the allocator and the page tables is paid for here:
                # a rotation alone leaves everybody behind the same one.
                seconds(bodies[name], device, 1)
                times[name].append(seconds(bodies[name], device, iterations[name]))
            names.append(names.pop(0))
    finally:
        if collecting:
            gc.enable()
    return {name: statistics.median(values) for name, values in times.items()}


def peak_bytes(body: Step, problem: Problem) -> int:
    """Peak of the memory that a step allocates beside its inputs, outputs included."""
    problem.forget_gradients()
    if problem.device == "cuda":
        return _cuda_peak(body)
    if problem.device == "cpu":
        return _cpu_peak(body)
    return 0


def _cuda_peak(body: Step) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    body()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _cpu_peak(body: Step) -> int:
    """Follow the CPU allocator's events through the profiler."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        body()
    events = profile.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    live = peak = 0
    for _, change in sorted(changes, key=lambda event: event[0]):
        live += change
        peak = max(peak, live)
    return peak

"""``python -m benchmarks.targets``: the speed that the project promises, measured; PASS or MISS.

Forward + backward, medians in one process, contenders taking turns round by round. Each result is
first compared with the float64 reference. ``--strict`` makes a miss the exit status.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from kdkernels import _dispatch
from kdkernels.registry import SPECS, LossSpec

from . import contenders, measure
from .machine import busy, default_device, machine
from .problem import Problem, Refused
from .report import duration
from .results import ratio
from .shapes import BY_NAME, Workload

AT_LEAST, AT_MOST = ">=", "<="


@dataclass(frozen=True)
class Target:
    """A bound on one time divided by another, for a loss at a workload.

    ``rival / ours`` at least ``bound`` (times faster), or ``ours / rival`` at most ``bound``.
    """

    loss: str
    workload: Workload
    rival: str
    sense: str
    bound: float


def _faster(workload: Workload, rival: str, **bounds: float) -> list[Target]:
    return [Target(loss, workload, rival, AT_LEAST, bound) for loss, bound in bounds.items()]


def _at_most(workload: Workload, rival: str, **bounds: float) -> list[Target]:
    return [Target(loss, workload, rival, AT_MOST, bound) for loss, bound in bounds.items()]


SMALL, CIFAR = BY_NAME["cifar100_b64"], BY_NAME["cifar100"]
IMAGENET, LARGER, LLM = BY_NAME["imagenet"], BY_NAME["imagenet_b1024"], BY_NAME["llm_32k"]

EQUAL = 1.03
"""'No slower': equal times differ by this much from run to run."""

TARGETS = {
    "cpu": [
        *_faster(SMALL, "eager", kd=3, dkd=4, dist=8),
        *_faster(IMAGENET, "eager", kd=15, dkd=15, dist=20, aekt=12),
        *_faster(IMAGENET, "compile", kd=6, dkd=5, dist=5),
        *_faster(LARGER, "eager", kd=15, dkd=15, dist=20, aekt=12),
        *_faster(LARGER, "compile", kd=6, dkd=5, dist=5),
        *_faster(LLM, "eager", kd=10, dkd=10, dist=20),
        *_faster(LLM, "compile", kd=4, dkd=4, dist=5),
        *_at_most(LLM, "floor", kd=2.5, dist=5),
        *_faster(BY_NAME["factors"], "eager", iekd=5),
        *_faster(BY_NAME["tuples_10"], "eager", tuple_matching=5),
        *_faster(BY_NAME["tuples_100"], "eager", tuple_matching=5),
        # bfloat16 moves half the bytes, so it must not be slower than float32.
        *_at_most(SMALL, "float32", kd=EQUAL, dkd=EQUAL, dist=EQUAL),
        *_at_most(IMAGENET, "float32", kd=EQUAL, dkd=EQUAL, dist=EQUAL),
        *_at_most(LARGER, "float32", kd=EQUAL, dkd=EQUAL, dist=EQUAL),
        *_at_most(LLM, "float32", kd=EQUAL, dkd=EQUAL, dist=EQUAL),
    ],
    "cuda": [
        *_faster(CIFAR, "eager", kd=8, dkd=8, dist=8),
        *_faster(CIFAR, "compile", kd=3, dkd=3, dist=3),
        *_faster(LARGER, "eager", kd=8, dkd=8, dist=8),
        *_faster(LARGER, "compile", kd=3, dkd=3, dist=3),
    ],
}


def groups(targets: Iterable[Target]) -> dict[tuple[Workload, str], list[Target]]:
    """Targets by workload and loss: those that are measured in turns with each other."""
    found: dict[tuple[Workload, str], list[Target]] = {}
    for target in targets:
        found.setdefault((target.workload, target.loss), []).append(target)
    return found


def times(
    spec: LossSpec, workload: Workload, rivals: set[str], options: argparse.Namespace
) -> dict[str, float]:
    """Median seconds of the library (``ours``) and its rivals, interleaved."""
    device = options.device
    full = Problem(spec, workload, torch.float32, device)
    bodies = {}
    entries = [("ours", options.backend or contenders.ours(spec, device), full)]
    entries += [(rival, rival, full) for rival in sorted(rivals - {"float32"})]
    if "float32" in rivals:
        half = Problem(spec, workload, torch.bfloat16, device)
        entries.append(("bfloat16", entries[0][1], half))
    for label, name, problem in entries:
        function = contenders.build(name, problem)
        if name != "floor":
            problem.check(name, function, "forward_backward")
        bodies[label] = measure.step(function, problem, "forward_backward", floor=name == "floor")
    return measure.interleaved(bodies, device, options.budget)


def judge(target: Target, taken: dict[str, float]) -> tuple[float | None, bool]:
    """The measured ratio and whether it keeps the bound."""
    if target.rival == "float32":
        value = ratio(taken.get("bfloat16"), taken.get("ours"))
        return value, value is not None and value <= target.bound
    ours, rival = taken.get("ours"), taken.get(target.rival)
    if target.sense == AT_LEAST:
        value = ratio(rival, ours)
        return value, value is not None and value >= target.bound
    value = ratio(ours, rival)
    return value, value is not None and value <= target.bound


def row(target: Target, taken: dict[str, float]) -> str:
    value, passed = judge(target, taken)
    half = target.rival == "float32"
    ours = duration(taken.get("bfloat16" if half else "ours"))
    rival = duration(taken.get("ours" if half else target.rival))
    what = {"eager": "times eager", "compile": "times compile", "floor": "of the add"}
    return (
        f"{SPECS[target.loss].title:17s} {target.workload.size:20s}"
        f" {what.get(target.rival, 'bf16 / fp32'):14s} {ours:>9s} {rival:>9s}"
        f" {'-' if value is None else f'{value:.2f}':>7s} {target.sense} {target.bound:<4g}"
        f" {'PASS' if passed else 'MISS'}"
    )


def _absent(rival: str, spec: LossSpec, device: str) -> bool:
    return rival != "float32" and bool(contenders.why_not(rival, spec, device))


def measured(options: argparse.Namespace) -> Iterator[tuple[Target, dict[str, float]]]:
    for (workload, loss), targets in groups(TARGETS[options.device]).items():
        spec = SPECS[loss]
        targets = [t for t in targets if not _absent(t.rival, spec, options.device)]
        if options.no_compile:
            targets = [t for t in targets if t.rival != "compile"]
        if not targets:
            continue
        try:
            taken = times(spec, workload, {target.rival for target in targets}, options)
        except Refused as error:
            print(f"refused: {error}")
            taken = {}
        for target in targets:
            yield target, taken


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.targets", description=__doc__)
    parser.add_argument("--strict", action="store_true", help="exit with 1 on a miss")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--device", default=default_device(), choices=sorted(TARGETS))
    parser.add_argument("--backend", choices=_dispatch.BACKENDS, help="instead of the fastest")
    parser.add_argument("--budget", type=float, default=2.5, help="seconds of timing a group")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    start = time.monotonic()
    print(", ".join(f"{key} {value}" for key, value in machine(options.device).items() if value))
    if warning := busy():
        print(warning)
    for name in dict.fromkeys(target.loss for target in TARGETS[options.device]):
        backend = options.backend or contenders.ours(SPECS[name], options.device)
        print(f"{name}: {backend}")
    print(f"{'loss':17s} {'shape':20s} {'ratio':14s} {'ours':>9s} {'rival':>9s} {'is':>7s} target")
    missed = total = 0
    for target, taken in measured(options):
        print(row(target, taken), flush=True)
        total += 1
        missed += not judge(target, taken)[1]
    print(f"{total - missed} of {total} kept, in {time.monotonic() - start:.0f} s")
    return 1 if missed and options.strict else 0


if __name__ == "__main__":
    sys.exit(main())

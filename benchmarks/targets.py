"""``python -m benchmarks.targets``: the speed that the project promises, measured; PASS or MISS.

Forward + backward, medians in one process, contenders taking turns round by round. Each result is
first compared with the float64 reference. ``--strict`` makes a miss the exit status.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch

from kdkernels import _dispatch
from kdkernels.registry import SPECS, LossSpec

from . import contenders, measure, token_rivals
from .machine import busy, default_device, machine
from .problem import Problem, Refused
from .report import duration
from .results import ratio
from .shapes import BY_NAME, TOKENS, Workload

AT_LEAST, AT_MOST = ">=", "<="


@dataclass(frozen=True)
class Target:
    """A bound on one time divided by another, for a loss at a workload.

    ``PAIRS`` says which two times a rival stands for. ``sense`` is that of the bound.
    """

    loss: str
    workload: Workload
    rival: str
    sense: str
    bound: float
    dtype: torch.dtype = torch.float32


PAIRS = {
    "eager": ("eager", "ours"),
    "compile": ("compile", "ours"),
    "floor": ("ours", "floor"),
    "float32": ("bfloat16", "ours"),
    **token_rivals.PAIRS,
}
WHAT = {
    "eager": "times eager",
    "compile": "times compile",
    "floor": "of the add",
    "float32": "bf16 / fp32",
    "masked": "rows ignored",
    "beside": "two / one call",
    **{name: f"hard, T = {name[5:]}" for name in token_rivals.PAIRS if name.startswith("hard")},
}


def _faster(workload: Workload, rival: str, **bounds: float) -> list[Target]:
    return [Target(loss, workload, rival, AT_LEAST, bound) for loss, bound in bounds.items()]


def _of_tokens() -> list[Target]:
    """The losses of language models, where torch.compile of the eager form is the rival too."""
    place = BY_NAME["tokens_32k"]
    found = [
        *_faster(place, "eager", reverse_kl=8, mixed_kl=8, skew_kl=8, jsd=15, tv=5),
        *_faster(place, "compile", reverse_kl=3, mixed_kl=3, skew_kl=3, jsd=4, tv=2),
    ]
    for loss in TOKENS:
        found += _at_most(place, "masked", **{loss: 0.55})
    for rival, bound in (("hard_1", 1.15), ("hard_2", 1.3), ("hard_4", 1.3), ("hard_3", 1.6)):
        found += _at_most(place, rival, reverse_kl=bound, jsd=bound)
    found += _faster(place, "beside", reverse_kl=2, jsd=2)
    halves = [replace(target, dtype=torch.bfloat16) for target in found]
    return [*found, *halves]


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
        *_faster(BY_NAME["retinanet"], "eager", sigmoid_dist=8),
        *_at_most(BY_NAME["segmentation"], "masked", kd=EQUAL, dkd=EQUAL, dist=EQUAL),
        *_of_tokens(),
    ],
    "cuda": [
        *_faster(CIFAR, "eager", kd=8, dkd=8, dist=8),
        *_faster(CIFAR, "compile", kd=3, dkd=3, dist=3),
        *_faster(LARGER, "eager", kd=8, dkd=8, dist=8),
        *_faster(LARGER, "compile", kd=3, dkd=3, dist=3),
    ],
}


Group = tuple[Workload, str, torch.dtype]


def groups(targets: Iterable[Target]) -> dict[Group, list[Target]]:
    """Targets by workload, loss and dtype: those that are measured in turns with each other."""
    found: dict[Group, list[Target]] = {}
    for target in targets:
        found.setdefault((target.workload, target.loss, target.dtype), []).append(target)
    return found


def times(
    spec: LossSpec,
    workload: Workload,
    dtype: torch.dtype,
    rivals: set[str],
    options: argparse.Namespace,
) -> dict[str, float]:
    """Median seconds of the library (``ours``) and its rivals, interleaved."""
    device = options.device
    ours = options.backend or contenders.ours(spec, device)
    names = {name for rival in rivals for name in PAIRS[rival]}
    full = Problem(spec, workload, dtype, device)
    entries = [("ours", ours, full)]
    entries += [(n, n, full) for n in ("compile", "eager", "floor") if n in names]
    if "bfloat16" in names:
        entries.append(("bfloat16", ours, Problem(spec, workload, torch.bfloat16, device)))
    bodies = {}
    for label, name, problem in entries:
        function = contenders.build(name, problem)
        if name != "floor":
            problem.check(name, function, "forward_backward")
        bodies[label] = measure.step(function, problem, "forward_backward", floor=name == "floor")
    function = contenders.build(ours, full)
    own = token_rivals.bodies(spec, workload, dtype, device, function, names)
    for label, (loss, problem) in own.items():
        if label in ("masked", "alone_1"):  # the others are no answer of the problem
            problem.check(label, loss, "forward_backward")
        bodies[label] = measure.step(loss, problem, "forward_backward")
    return measure.interleaved(bodies, device, options.budget)


def judge(target: Target, taken: dict[str, float]) -> tuple[float | None, bool]:
    """The measured ratio and whether it keeps the bound."""
    above, below = PAIRS[target.rival]
    value = ratio(taken.get(above), taken.get(below))
    if value is None:
        return None, False
    return value, value >= target.bound if target.sense == AT_LEAST else value <= target.bound


def row(target: Target, taken: dict[str, float]) -> str:
    value, passed = judge(target, taken)
    above, below = PAIRS[target.rival]
    ours, rival = (below, above) if target.sense == AT_LEAST else (above, below)
    half = " bf16" if target.dtype == torch.bfloat16 else ""
    seconds = (duration(taken.get(name)) for name in (ours, rival))
    return (
        f"{SPECS[target.loss].title:17s} {target.workload.size + half:20s}"
        f" {WHAT[target.rival]:14s} {' '.join(f'{text:>9s}' for text in seconds)}"
        f" {'-' if value is None else f'{value:.2f}':>7s} {target.sense} {target.bound:<4g}"
        f" {'PASS' if passed else 'MISS'}"
    )


def _absent(rival: str, spec: LossSpec, device: str) -> bool:
    return rival in ("eager", "compile", "floor") and bool(contenders.why_not(rival, spec, device))


def measured(options: argparse.Namespace) -> Iterator[tuple[Target, dict[str, float]]]:
    chosen = [
        target
        for target in TARGETS[options.device]
        if options.only in (None, target.workload.name) and options.loss in (None, target.loss)
    ]
    for (workload, loss, dtype), targets in groups(chosen).items():
        spec = SPECS[loss]
        targets = [t for t in targets if not _absent(t.rival, spec, options.device)]
        if options.no_compile:
            targets = [t for t in targets if t.rival != "compile"]
        if not targets:
            continue
        try:
            taken = times(spec, workload, dtype, {target.rival for target in targets}, options)
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
    parser.add_argument(
        "--only", metavar="WORKLOAD", choices=BY_NAME, help="one workload's targets"
    )
    parser.add_argument("--loss", metavar="LOSS", choices=SPECS, help="one loss's targets")
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

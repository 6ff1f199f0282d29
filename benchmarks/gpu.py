"""``python -m benchmarks.gpu``: what a GPU gives, beside eager, torch.compile, Liger and a copy.

python -m benchmarks.gpu                  about two and a half minutes; benchmarks/results
python -m benchmarks.gpu --quick          forty seconds
python -m benchmarks.gpu --output DIR     JSON, table and plot in DIR
python -m benchmarks.gpu --warm 0/3       compile one of three parts of torch.compile's work
python -m benchmarks.gpu --rehearse       the same code on tiny CPU tensors; nothing is measured

Forward + backward, medians of interleaved rounds; every result is checked against the float64
reference before it is timed. What is done is written after each case, so that nothing is lost
where the time runs out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import gpu_report
from .gpu_cases import (
    CASES,
    OURS,
    UNCHECKED,
    Case,
    Problem,
    build,
    captured,
    floor_bytes,
    why_not,
)
from .gpu_clock import Clock, CudaClock, RehearsalClock, copy_bandwidth, host_seconds, interleaved
from .machine import machine, slug

RESULTS = Path(__file__).resolve().parent / "results"
PREDICTIONS = RESULTS / "h200-predictions.json"
COPY = 2 << 30
COMPILATION = 12.0
"""Seconds that must be left for a compilation to be begun."""
TRAVERSALS = ("row_lanes", "row_block", "row_cluster", "row_stream", "row_split", "row_general",
              "correlate_stream", "correlate_columns", "correlate_slices", "correlate")  # fmt: skip


def driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip().split("\n")[0]


def facts(clock: Clock) -> dict[str, Any]:
    found: dict[str, Any] = machine(clock.device)
    if clock.device == "cuda":
        found["capability"] = ".".join(map(str, torch.cuda.get_device_capability()))
        found["cuda"] = torch.version.cuda
        found["driver"] = driver()
    return found


def traversal(names: Sequence[str]) -> str:
    """The traversal whose kernel is among those that ran."""
    return next((t for t in TRAVERSALS for name in names if name.startswith(t)), "")


def sum_backward(problem: Problem) -> Any:
    """``student.sum().backward()``, which a loss's host time is compared with."""

    def loss(student: Tensor, *rest: Tensor) -> Tensor:
        return student.sum()

    return problem.step(loss)


def measure(case: Case, clock: Clock, budget: float, left: float) -> dict[str, Any]:
    """Everything about one case: contenders checked, timed in turns, and looked into."""
    size = case.size(clock.rehearsal)
    elements = 1
    for n in size:
        elements *= n
    record: dict[str, Any] = {
        "case": case.name,
        "loss": case.loss,
        "shape": size,
        "dtype": str(case.dtype).removeprefix("torch."),
        "floor_bytes": floor_bytes(case.loss, elements, case.dtype.itemsize),
        "contenders": {},
    }
    deadline = time.monotonic() + left
    problem = Problem(case, clock)
    record["input_sets"] = len(problem.sets)
    steps = {}
    torch.compiler.reset()  # no shapes left over, no limit on recompilations reached
    for name in (*OURS, *case.rivals):
        found: dict[str, Any] = record["contenders"].setdefault(name, {})
        reason = why_not(name, case, clock)
        if not reason and name in ("compile", "graphs") and not clock.rehearsal:
            rest = deadline - time.monotonic()
            reason = f"only {rest:.0f} s were left" if rest < COMPILATION else ""
        if reason:
            found["skipped"] = reason
            continue
        try:
            began = time.monotonic()
            function, mark = build(name, case, clock)
            body = problem.step(function, mark)
            clock.seconds(body, 3)  # what torch.compile replays is there after the second
            if mark is not None:
                mark()
            if name in UNCHECKED:
                found["unchecked"] = UNCHECKED[name]
            else:
                found["errors"] = problem.check(function)
            found["ready_seconds"] = time.monotonic() - began
            steps[name] = body
        except Exception as error:  # whoever cannot run stops nobody else from being timed
            found["skipped"] = f"{type(error).__name__}: {str(error).splitlines()[0:1]}"[:300]
            found["failed"] = not isinstance(error, torch.OutOfMemoryError)
        problem.forget()
        clock.release()
    if case.shape.small and "native" in steps:
        found = record["contenders"].setdefault("captured", {})
        try:
            steps["captured"], found["errors"] = captured(problem, clock)
        except Exception as error:
            found["skipped"] = f"{type(error).__name__}: {error}"[:300]
            found["failed"] = True
    rounds = (2, 2) if clock.rehearsal else (5, 60)
    for name, seconds in (interleaved(clock, steps, budget, rounds) if steps else {}).items():
        found = record["contenders"][name]
        found["seconds"] = statistics.median(seconds)
        found["rounds"] = len(seconds)
        found["spread"] = (max(seconds) - min(seconds)) / found["seconds"]
    for name, body in steps.items():
        look(case, clock, problem, name, body, record["contenders"][name])
    if case.shape.small:
        calls = 10 if clock.rehearsal else 400
        record["host_sum_seconds"] = host_seconds(clock, sum_backward(problem), calls)
    return record


def look(
    case: Case, clock: Clock, problem: Problem, name: str, body: Any, found: dict[str, Any]
) -> None:
    """Launches, kernel time, peak memory and host time of a contender that was timed."""
    try:
        launches = clock.launches(body)
        found["launches"] = len(launches) or None  # none were seen: that is no count
        found["kernels"] = [(x.name, round(x.microseconds, 2)) for x in launches][:40]
        if name in OURS:
            # The ones that autograd begins with are no launch of ours.
            work = [x for x in launches if "Fill" not in x.name]
            found["launches"] = len(work) or None
            found["kernel_microseconds"] = sum(x.microseconds for x in work)
            found["traversal"] = traversal([x.name for x in work])
        problem.forget()
        found["peak_gradients"] = clock.peak(body) / problem.gradient_bytes
        if case.shape.small:
            found["host_seconds"] = host_seconds(clock, body, 10 if clock.rehearsal else 400)
    except Exception as error:
        found["look_failed"] = f"{type(error).__name__}: {error}"[:300]
    problem.forget()


def write(run: dict[str, Any], base: Path, plot: bool = False) -> list[Path]:
    run["targets"] = gpu_report.judge(run)
    run["predictions"] = gpu_report.compare(run, gpu_report.read_predictions(PREDICTIONS))
    data, page, picture = (base.with_suffix(ending) for ending in (".json", ".md", ".png"))
    data.write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
    page.write_text(gpu_report.markdown(run), encoding="utf-8")
    written = [data, page]
    if plot:
        try:
            written += [picture] if gpu_report.draw(run, picture) else []
        except ImportError as error:
            print(f"no plot: {error}")
    return written


def warm(clock: Clock, part: str) -> int:
    """Fill the compiler's cache on disk for every n-th case, beside other work."""
    index, count = map(int, part.split("/"))
    wanted = [
        (case, name) for case in CASES for name in case.rivals if name in ("compile", "graphs")
    ]
    for case, name in wanted[index::count]:
        try:
            torch.compiler.reset()
            problem = Problem(case, clock)
            function, mark = build(name, case, clock)
            clock.seconds(problem.step(function, mark), 2)
        except Exception as error:
            print(f"{case.name}, {name}: {type(error).__name__}: {error}"[:300])
            continue
        finally:
            clock.release()
        print(f"compiled {case.name}, {name}", flush=True)
    return 0


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--output", type=Path, help="folder to write (benchmarks/results)")
    parser.add_argument("--quick", action="store_true", help="the most important cases only")
    parser.add_argument("--seconds", type=float, help="the time in which cases are begun")
    parser.add_argument("--warm", metavar="I/N", help="only compile, part I of N")
    parser.add_argument("-k", metavar="WORD", help="only cases whose name contains the word")
    parser.add_argument("--rehearse", action="store_true", help="tiny CPU tensors, no measurement")
    options = parser.parse_args(arguments)
    if options.seconds is None:
        options.seconds = 40.0 if options.quick else 150.0
    elsewhere = options.output is not None and options.output.resolve() != RESULTS
    if options.rehearse and not options.warm and not elsewhere:
        parser.error("a rehearsal must not write to benchmarks/results: give --output DIR")
    options.output = options.output or RESULTS
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    start = time.monotonic()
    if not options.rehearse and not torch.cuda.is_available():
        print("benchmarks.gpu: no CUDA device here, and nothing was measured (--rehearse tries the"
              " code)", file=sys.stderr)  # fmt: skip
        return 1
    clock: Clock = RehearsalClock() if options.rehearse else CudaClock()
    if options.warm:
        return warm(clock, options.warm)
    run: dict[str, Any] = {"rehearsal": clock.rehearsal, "machine": facts(clock), "cases": []}
    print(", ".join(f"{key} {value}" for key, value in run["machine"].items() if value != ""))
    run["copy_bytes_per_second"] = copy_bandwidth(clock, 1 << 20 if clock.rehearsal else COPY)
    print(f"copy: {run['copy_bytes_per_second'] / 1e12:.3f} TB/s", flush=True)
    clock.release()
    options.output.mkdir(parents=True, exist_ok=True)
    stem = slug(run["machine"]) + ("-rehearsal" if clock.rehearsal else "-steps")
    base = options.output / (stem + "-quick" * options.quick)
    run["left_out"] = {}
    chosen = [case for case in CASES if (case.quick or not options.quick)]
    for case in (c for c in chosen if not options.k or options.k in c.name):
        left = options.seconds - (time.monotonic() - start)
        if left < 3 and not clock.rehearsal:
            run["left_out"][case.name] = f"the {options.seconds:.0f} s were spent"
            continue
        began = time.monotonic()
        try:
            record = measure(case, clock, 0.4 if options.quick else 0.8, left)
        except Exception as error:
            run["left_out"][case.name] = f"{type(error).__name__}: {error}"[:300]
            print(f"{case.name}: {run['left_out'][case.name]}", flush=True)
            clock.release()
            continue
        clock.release()
        run["cases"].append(record)
        run["seconds"] = time.monotonic() - start
        write(run, base)
        parts = [
            f"{name} {gpu_report.duration(found.get('seconds'))}"
            for name, found in record["contenders"].items()
        ]
        print(f"{case.name}: {', '.join(parts)} ({time.monotonic() - began:.1f} s)", flush=True)
    run["seconds"] = time.monotonic() - start
    written = write(run, base, plot=True)
    print("\n" + gpu_report.markdown(run))
    print("wrote", *written, f"in {run['seconds']:.0f} s")
    return 1 if failed(run) else 0


def failed(run: dict[str, Any]) -> bool:
    """Whether a backend of ours was refused or failed, or nothing was timed."""
    wrong = [
        record["case"]
        for record in run["cases"]
        for name in (*OURS, "captured")
        if record["contenders"].get(name, {}).get("failed")
    ]
    return bool(wrong) or not run["cases"]


if __name__ == "__main__":
    sys.exit(main())

"""``python -m benchmarks.run``: run the suite; write JSON, a table of ratios and a plot.

python -m benchmarks.run                      everything, about 30 minutes on two cores
python -m benchmarks.run --quick              a few workloads, two to three minutes
python -m benchmarks.run --render FILE.json   only draw the table and the plot again
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol
from xml.etree import ElementTree

from kdkernels.registry import SPECS

from . import contenders
from .machine import busy, default_device, machine, slug
from .report import markdown
from .results import trim

HERE = Path(__file__).resolve().parent
OUTCOME = re.compile(r"\[([^\[\]]+)\]\s+(PASSED|FAILED|SKIPPED|ERROR).*\[\s*(\d+)%\]")


class Report(Protocol):
    def __call__(self, percent: int, case: str) -> None: ...


@contextmanager
def progress() -> Iterator[Report]:
    """A bar with ``rich`` on a terminal, else a line for every tenth part."""
    try:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    except ImportError:
        bar = None
    else:
        bar = Progress(
            BarColumn(30),
            TextColumn("{task.percentage:3.0f}%"),
            TimeElapsedColumn(),
            TextColumn("{task.description}"),
        )
    if bar is not None and sys.stdout.isatty():
        with bar:
            task = bar.add_task("starting", total=100)
            yield lambda percent, case: bar.update(task, completed=percent, description=case)
        return
    start, told = time.monotonic(), -1

    def line(percent: int, case: str) -> None:
        nonlocal told
        if percent // 10 > told:
            told = percent // 10
            print(f"{percent:3d}% after {time.monotonic() - start:4.0f} s: {case}", flush=True)

    yield line


def run_suite(options: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Run pytest in a process of its own; return its report and what failed."""
    data, outcomes = folder / "benchmark.json", folder / "outcomes.xml"
    command = [sys.executable, "-m", "pytest", str(HERE), "--benchmark-only", "--benchmark-quiet"]
    command += [f"--benchmark-json={data}", f"--junitxml={outcomes}", "--benchmark-disable-gc"]
    command += ["-v", "-p", "no:cacheprovider", "--color=no", f"--device={options.device}"]
    command += [f"--budget={options.budget}", "-o", "addopts="]  # never in parallel workers
    command += ["--quick"] * options.quick + ["--with-reference"] * options.with_reference
    command += ["-k", options.k] if options.k else []
    tail: list[str] = []
    # Inside a worker of pytest-xdist the variables of xdist would switch the timing off.
    process = subprocess.Popen(
        command,
        cwd=HERE.parent,
        env={k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    with process, progress() as report:
        for line in process.stdout:
            found = OUTCOME.search(line)
            if found:
                report(int(found[3]), found[1])
            tail = [*tail[-60:], line]
    if not data.exists() or not data.stat().st_size:
        raise SystemExit("".join(tail) + "\nThe suite timed nothing.")
    return json.loads(data.read_text()), failures(outcomes)


def failures(outcomes: Path) -> dict[str, str]:
    """Case -> first line of the message, for each case that was refused or failed."""
    found = {}
    for case in ElementTree.parse(outcomes).iter("testcase"):
        for kind in ("failure", "error"):
            node = case.find(kind)
            if node is not None:
                name = re.sub(r"^test_speed\[(.*)\]$", r"\1", case.get("name", ""))
                found[name] = re.sub(r"^[\w.]+: ", "", (node.get("message") or kind).split("\n")[0])
    return found


def skipped(device: str) -> dict[str, str]:
    """Contender -> why it is not timed; with the losses concerned where not all are."""
    reasons: dict[tuple[str, str], list[str]] = {}
    runners: dict[str, int] = {}
    for name in ("compile", *contenders.KERNELS):
        for spec in SPECS.values():
            if name != "compile" and name not in contenders.own(spec):
                continue
            runners[name] = runners.get(name, 0) + 1
            why = "; ".join(contenders.why_not(name, spec, device))
            if why:
                reasons.setdefault((name, why), []).append(spec.name)
    return {
        name if len(losses) == runners[name] else f"{name} ({', '.join(losses)})": why
        for (name, why), losses in reasons.items()
    }


def render(run: dict[str, Any], base: Path) -> list[Path]:
    """Write the table and the plot beside the JSON file."""
    table = base.with_suffix(".md")
    table.write_text(markdown(run), encoding="utf-8")
    written = [table]
    try:
        from .plot import draw, draw_features
    except ImportError as error:
        print(f"no plot: {error} (pip install matplotlib)")
        return written
    picture, features = base.with_suffix(".png"), base.with_name(f"{base.stem}-features.png")
    written += [picture] if draw(run, picture) else []
    return written + ([features] if draw_features(run, features) else [])


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--quick", action="store_true", help="a few workloads")
    parser.add_argument("--output", type=Path, default=HERE / "results", help="folder to write")
    parser.add_argument("--device", default=default_device(), help="cpu or cuda")
    parser.add_argument("--budget", type=float, help="seconds of timing for each case")
    parser.add_argument("--with-reference", action="store_true", help="time the reference too")
    parser.add_argument("-k", metavar="EXPRESSION", help="only cases that match, as in pytest")
    parser.add_argument("--render", type=Path, metavar="JSON", help="run nothing, draw this file")
    options = parser.parse_args(arguments)
    if options.budget is None:
        options.budget = 0.3 if options.quick else 0.4
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.render:
        run = json.loads(options.render.read_text(encoding="utf-8"))
        print("wrote", *render(run, options.render))
        return 0
    facts = machine(options.device)
    print(", ".join(f"{key} {value}" for key, value in facts.items() if value != ""))
    warning = busy()
    if warning:
        print(warning)
    with tempfile.TemporaryDirectory() as folder:
        report, refused = run_suite(options, Path(folder))
    run = trim(report, facts)
    run["refused"], run["skipped"] = refused, skipped(options.device)
    run["warning"] = warning
    options.output.mkdir(parents=True, exist_ok=True)
    partial = "-quick" if options.quick else "-part" if options.k else ""
    base = options.output / (slug(facts) + partial)
    data = base.with_suffix(".json")
    data.write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
    written = [data, *render(run, base)]
    print("\n" + markdown(run))
    print("wrote", *written)
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main())

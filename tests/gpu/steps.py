"""Steps of check.py: processes with limits, what their output says, and the report."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

PASSED, FAILED, SKIPPED, LATE = "passed", "FAILED", "skipped", "OUT OF TIME"
MOST_LOG = 3 << 20
"""Bytes of one log that are kept: its beginning and its end."""
GRACE = 5.0
"""Seconds between the signal that makes Python say where it is, and the end."""


@dataclass
class Outcome:
    """What a step gave."""

    name: str
    status: str
    seconds: float = 0.0
    limit: float = 0.0
    summary: str = ""
    counts: dict[str, int] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)


Judge = Callable[[str, int], Outcome]
"""From a step's output and exit status."""


@dataclass
class Step:
    """One command with its environment and limit; a helper's failure fails nothing."""

    name: str
    command: Sequence[str]
    limit: float
    judge: Judge
    environment: Mapping[str, str] = field(default_factory=dict)
    helper: bool = False


def judge_plain(text: str, status: int) -> Outcome:
    last = next((line for line in reversed(text.splitlines()) if line.strip()), "")
    return Outcome("", PASSED if status == 0 else FAILED, summary=last.strip()[:200])


COUNT = re.compile(r"(\d+) (passed|failed|errors?|skipped|xfailed|xpassed|warnings?|deselected)\b")


def judge_pytest(text: str, status: int) -> Outcome:
    """The counts of pytest's last line; no test that passed is a failure."""
    line = next((s for s in reversed(text.splitlines()) if re.search(r"\bin \d+[.\d]*s\b", s)), "")
    counts = {what.rstrip("s"): int(n) for n, what in COUNT.findall(line)}
    failures = re.findall(r"^(?:FAILED|ERROR) (.+)$", text, re.MULTILINE)
    spent = sum(int(n) for n in re.findall(r"SKIPPED \[(\d+)\].*the time budget is spent", text))
    good = status == 0 and counts.get("passed", 0) > 0 and not failures
    summary = line.strip("= ") or judge_plain(text, status).summary
    if spent:
        summary += f"; {spent} of the skipped for want of time"
    return Outcome("", PASSED if good else FAILED, 0, 0, summary, counts, failures)


UNSUPPORTED = re.compile(r"device not supported|not supported on this|unable to .*debugger", re.I)


def judge_sanitizer(text: str, status: int) -> Outcome:
    """compute-sanitizer's own count of errors; a machine that refuses it is skipped."""
    line = next((s for s in text.splitlines() if "SUMMARY:" in s), "")
    finished = re.search(r"sanitized: (\d+) steps ran", text)
    refused = UNSUPPORTED.search(text)
    if refused and not finished:
        return Outcome("", SKIPPED, summary=f"the sanitizer does not run here: {refused.group(0)}")
    number = re.search(r"(\d+) (?:error|hazard)", line)
    errors = int(number.group(1)) if number else -1
    good = status == 0 and errors == 0 and finished is not None
    summary = f"{finished.group(0) if finished else 'did not finish'}; {line.strip('= ')}"
    kinds = re.findall(r"^=+\s+((?:Invalid|Uninitialized|Error|Barrier|Misaligned).*)$", text, re.M)
    return Outcome("", PASSED if good else FAILED, summary=summary,
                   failures=list(dict.fromkeys(kinds))[:20])  # fmt: skip


def end(process: subprocess.Popen[bytes], log: Path) -> None:
    """Ask a process where it is (faulthandler writes it), then end it and what it started."""
    with log.open("ab") as text:
        text.write(b"\ncheck.py: the limit is reached\n")
    for number, patience in ((signal.SIGABRT, GRACE), (signal.SIGKILL, GRACE)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            continue
        if number == signal.SIGABRT:
            continue  # its children may live on


def run_group(
    group: Sequence[Step], folder: Path, left: float, environment: Mapping[str, str]
) -> list[Outcome]:
    """Run the steps side by side, each to its own limit or the end of the budget."""
    begun: list[tuple[Step, subprocess.Popen[bytes], Path, float]] = []
    for step in group:
        limit = min(step.limit, left)
        log = folder / f"{re.sub('[^a-z0-9]+', '-', step.name.lower())}.log"
        # The plugin budget.py skips what is left before the limit would end it.
        own = {"KDKERNELS_DEADLINE": str(time.time() + limit - 12), **step.environment}
        log.unlink(missing_ok=True)
        with log.open("ab") as output:  # to append: the end of a late process is told there too
            output.write(f"$ {' '.join(step.command)}\n".encode())
            output.flush()
            process = subprocess.Popen(
                list(step.command),
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**environment, **own},
                start_new_session=True,  # so that its children end with it
            )
        begun.append((step, process, log, limit))
    start = time.monotonic()
    finished: dict[str, Outcome] = {}
    while len(finished) < len(begun):
        for step, process, log, limit in begun:
            if step.name in finished:
                continue
            late = time.monotonic() - start > limit
            # A helper works for the others of its group and ends with them.
            alone = step.helper and all(s.helper or s.name in finished for s, *_ in begun)
            status = process.poll()
            if status is None and not late and not alone:
                continue
            if status is None:
                end(process, log)
            text = log.read_text(encoding="utf-8", errors="replace")
            outcome = step.judge(text, -1 if status is None else status)
            outcome.name, outcome.limit = step.name, limit
            outcome.seconds = time.monotonic() - start
            if status is None:
                outcome.status = SKIPPED if step.helper else LATE
            if step.helper and outcome.status == FAILED:
                outcome.status = SKIPPED
            finished[step.name] = outcome
            print(line(outcome), flush=True)
        time.sleep(0.1)
    return [finished[step.name] for step in group]


def line(outcome: Outcome) -> str:
    return f"{outcome.name:24s} {outcome.status:12s} {outcome.seconds:5.0f} s  {outcome.summary}"


def gpu_tests_passed(outcomes: Sequence[Outcome]) -> int:
    """Tests of the steps that count only tests on a GPU."""
    return sum(o.counts.get("passed", 0) for o in outcomes if o.name.startswith("GPU "))


def verdict(outcomes: Sequence[Outcome], rehearsal: bool) -> list[str]:
    """What is wrong; empty where all is well."""
    faults = [f"{o.name}: {o.status}, {o.summary}" for o in outcomes if o.status in (FAILED, LATE)]
    if not rehearsal and not gpu_tests_passed(outcomes):
        faults.append("no GPU test passed")
    return faults


def markdown(report: Mapping[str, Any]) -> str:
    """The short report."""
    lines = []
    if report["rehearsal"]:
        lines += ["**A REHEARSAL ON A CPU: nothing here says anything about a GPU.**", ""]
    lines.append(", ".join(f"{k} {v}" for k, v in report["machine"].items() if v) + ".")
    lines += ["", "| step | result | seconds | |", "|:--|:--|--:|:--|"]
    for step in report["steps"]:
        summary = step["summary"].replace("|", "\\|")
        lines.append(f"| {step['name']} | {step['status']} | {step['seconds']:.0f} | {summary} |")
    lines += ["", f"{report['gpu_tests_passed']} GPU tests passed; {report['seconds']:.0f} s."]
    lines += ["", "**Faults:**" if report["faults"] else "No faults.", ""]
    lines += [f"- {fault}" for fault in report["faults"]]
    for step in report["steps"]:
        if step["failures"]:
            lines += ["", f"**{step['name']}**, {len(step['failures'])} failures:", ""]
            lines += [f"- {failure[:300]}" for failure in step["failures"][:60]]
    return "\n".join(lines) + "\n"


def trimmed(text: str, most: int = MOST_LOG) -> str:
    if len(text) <= most:
        return text
    half = most // 2
    return f"{text[:half]}\n... {len(text) - most} characters left out ...\n{text[-half:]}"


def write(
    output: Path, logs: Path, outcomes: Sequence[Outcome], facts: Mapping[str, Any]
) -> dict[str, Any]:
    """check.json, check.md and check.log; after every group, so that a killed run leaves them."""
    rehearsal = bool(facts["rehearsal"])
    report = {
        **facts,
        "steps": [asdict(o) for o in outcomes],
        "gpu_tests_passed": 0 if rehearsal else gpu_tests_passed(outcomes),
        "faults": verdict(outcomes, rehearsal),
    }
    output.mkdir(parents=True, exist_ok=True)
    (output / "check.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (output / "check.md").write_text(markdown(report), encoding="utf-8")
    parts = []
    for log in sorted(logs.glob("*.log"), key=lambda path: path.stat().st_mtime):
        text = trimmed(log.read_text(encoding="utf-8", errors="replace"))
        parts.append(f"{'=' * 30} {log.stem} {'=' * 30}\n{text}\n")
    (output / "check.log").write_text("\n".join(parts), encoding="utf-8")
    return report

"""The table of ratios, in Markdown that can be included in another page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from kdkernels.registry import SPECS

from .results import Comparison, compare, select
from .shapes import BY_NAME

NONE = "–"


def duration(seconds: float | None) -> str:
    """Three significant digits, in microseconds or milliseconds."""
    if seconds is None:
        return NONE
    value, unit = (seconds * 1e6, "µs") if seconds < 1e-3 else (seconds * 1e3, "ms")
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f} {unit}"


def times(value: float | None) -> str:
    if value is None:
        return NONE
    return f"{value:.{0 if value >= 100 else 1 if value >= 1 else 2}f}x"


def memory(size: int | None) -> str:
    if size is None:
        return NONE
    if size < 5e3:
        return "< 0.01"
    return f"{size / 1e6:.{0 if size >= 1e8 else 1 if size >= 1e6 else 2}f}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]], left: int = 2) -> list[str]:
    """A Markdown table: the first ``left`` columns are words, the others numbers."""
    rule = [":--" if index < left else "--:" for index in range(len(header))]
    return ["| " + " | ".join(cells) + " |" for cells in (header, rule, *rows)]


def _place(group: Comparison) -> str:
    if group.workload in BY_NAME:
        return BY_NAME[group.workload].label
    return f"{group.workload} {'x'.join(map(str, group.shape))}"


def _title(group: Comparison) -> str:
    spec = SPECS.get(group.loss)
    return spec.title if spec else group.loss


def ratios(groups: Sequence[Comparison]) -> list[str]:
    header = ["workload", "loss", "kdkernels", "eager", "compile", "add"]
    header += ["vs eager", "vs compile", "over add", "memory, MB", "eager", "compile"]
    rows = [
        (
            _place(group),
            _title(group),
            duration(group.seconds("ours")),
            *(duration(group.seconds(name)) for name in ("eager", "compile", "floor")),
            f"**{times(group.speedup('eager'))}**",
            times(group.speedup("compile")),
            times(group.times_floor("ours")),
            *(memory(group.peak_bytes(name)) for name in ("ours", "eager", "compile")),
        )
        for group in groups
    ]
    return table(header, rows)


def halves(groups: Sequence[Comparison]) -> list[str]:
    """bfloat16 beside float32, where both were timed."""
    full = {(g.loss, g.workload): g for g in select(groups, dtype="float32", mode=_BOTH)}
    rows = []
    for half in select(groups, dtype="bfloat16", mode=_BOTH):
        wide = full.get((half.loss, half.workload))
        short, long = half.seconds("ours"), wide.seconds("ours") if wide else None
        if short and long:
            cells = (duration(long), duration(short), times(long / short))
            rows.append((_place(half), _title(half), *cells, times(half.times_floor("ours"))))
    header = ("workload", "loss", "float32", "bfloat16", "speed-up", "bfloat16 over its add")
    return table(header, rows) if rows else []


_BOTH = "forward_backward"


def markdown(run: dict[str, Any]) -> str:
    """The whole report of a run."""
    facts, groups = run["machine"], compare(run["results"])
    used = {group.ours["contender"] for group in groups if group.ours}
    lines = [
        f"{facts['name']}, {facts['device']}"
        + (f", {facts['threads']} threads, {facts['capability']}" * (facts["device"] == "cpu"))
        + f"; torch {facts['torch']}, triton {facts['triton']}, kdkernels {facts['kdkernels']}"
        + f" ({', '.join(sorted(used)) or 'no backend timed'}); {facts['date']}.",
        "",
        "Medians in one process. *vs*: how many times faster kdkernels is. *over add*: its time as"
        " a multiple of `torch.add(student, teacher)`, which moves the same bytes (for IE-KD one"
        " for each of its two gradients; none where the work is in pairs or triples of rows)."
        " *memory*: peak beside the inputs. *composed*: torch operations and other losses' kernels,"
        " none of their own.",
    ]
    if run.get("warning"):
        lines += ["", f"**{run['warning'][0].upper()}{run['warning'][1:]}.**"]
    for mode, caption in ((_BOTH, "Forward + backward"), ("forward", "Forward alone")):
        chosen = select(groups, dtype="float32", mode=mode)
        if chosen:
            lines += ["", f"**{caption}**, float32:", "", *ratios(chosen)]
    half = halves(groups)
    if half:
        lines += ["", "**bfloat16**, forward + backward:", "", *half]
    if run.get("refused"):
        lines += ["", "**Refused or failed, and not timed:**", ""]
        lines += [f"- `{name}`: {reason}" for name, reason in run["refused"].items()]
    if run.get("skipped"):
        lines += ["", "Not timed on this machine:", ""]
        lines += [f"- {name}: {reason}" for name, reason in run["skipped"].items()]
    return "\n".join(lines) + "\n"

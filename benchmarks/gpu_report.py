"""From the measurements of a GPU to ratios, targets and a page. Pure functions of the JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .report import duration, table

Run = dict[str, Any]
Record = Mapping[str, Any]
OURS = ("native", "triton")
MOST_LAUNCHES = 3
NONE = "–"


def taken(record: Record, name: str) -> float | None:
    """Median seconds of a contender; None where it was not timed."""
    found = record["contenders"].get(name, {})
    value = found.get("seconds")
    return float(value) if value else None


def faster(record: Record, rival: str, ours: str = "native") -> float | None:
    """How many times faster ``ours`` is than ``rival``."""
    mine, other = taken(record, ours), taken(record, rival)
    return other / mine if mine and other else None


def bandwidth(record: Record, name: str = "native") -> float | None:
    """Bytes a second: those that must move, over the time."""
    seconds = taken(record, name)
    return record["floor_bytes"] / seconds if seconds else None


def fraction(run: Run, record: Record, name: str = "native") -> float | None:
    """The part of the copy's bandwidth."""
    achieved, copy = bandwidth(record, name), run.get("copy_bytes_per_second")
    return achieved / copy if achieved and copy else None


class Target(NamedTuple):
    """A bound of the design on a measured number, at one case."""

    case: str
    what: str
    measure: Callable[[Run, Record], float | None]
    least: bool
    bound: float

    def keeps(self, value: float) -> bool:
        return value >= self.bound if self.least else value <= self.bound


def _of(name: str, key: str, factor: float = 1.0) -> Callable[[Run, Record], float | None]:
    def measure(run: Run, record: Record) -> float | None:
        value = record["contenders"].get(name, {}).get(key)
        return None if value is None else value * factor

    return measure


def _targets() -> list[Target]:
    """Section 7 of the design."""
    found = []
    for shape in ("256x100", "1024x1000"):
        for loss in ("kd", "dkd", "dist"):
            case = f"{loss} {shape} float32"
            for rival, bound in (("eager", 8.0), ("compile", 3.0), ("graphs", 1.5)):
                found.append(
                    Target(case, f"times {rival}", lambda _, r, x=rival: faster(r, x), True, bound)
                )
            found.append(Target(case, "host, µs", _of("native", "host_seconds", 1e6), False, 30.0))
    for loss in ("kd", "dkd"):
        case = f"{loss} 8192x128256 bfloat16"
        found.append(Target(case, "of the copy's bandwidth", fraction, True, 0.85))
        found.append(
            Target(case, "peak memory, gradients", _of("native", "peak_gradients"), False, 1.02)
        )
    found.append(
        Target("kd 8192x128256 bfloat16", "times liger", lambda _, r: faster(r, "liger"), True, 2.0)
    )
    found.append(
        Target("kd 4x1048576 float32", "times compile", lambda _, r: faster(r, "compile"), True, 10)
    )
    for dtype in ("float32", "bfloat16"):
        case = f"dist 2000000x150 {dtype}"
        found.append(Target(case, "of the copy's bandwidth", fraction, True, 0.80))
    return found


TARGETS = _targets()


def judge(run: Run) -> list[dict[str, Any]]:
    """Each target with what was measured: kept, missed, or (None) not measured."""
    records = {record["case"]: record for record in run["cases"]}
    targets = list(TARGETS)
    for name in records:
        launches = _of("native", "launches")
        targets.append(Target(name, "launches a step", launches, False, MOST_LAUNCHES))
    rows = []
    for target in targets:
        record = records.get(target.case)
        value = None if record is None else target.measure(run, record)
        rows.append(
            {
                "case": target.case,
                "what": target.what,
                "bound": f"{'>=' if target.least else '<='} {target.bound:g}",
                "value": value,
                # A rehearsal keeps and misses nothing.
                "kept": None if value is None or run.get("rehearsal") else target.keeps(value),
            }
        )
    return rows


def read_predictions(path: Path) -> list[dict[str, Any]]:
    """``[{loss, shape, dtype, traversal, bytes, microseconds}]``; none where there is no file."""
    if not path.exists():
        return []
    read = json.loads(path.read_text(encoding="utf-8"))
    return list(read["predictions"] if isinstance(read, dict) else read)


def _dims(shape: Any) -> tuple[int, ...]:
    parts = shape.lower().split("x") if isinstance(shape, str) else shape
    return tuple(int(part) for part in parts)


def compare(run: Run, predictions: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The kernels' time of each case beside what was predicted for it."""
    by_key = {(p["loss"], _dims(p["shape"]), p["dtype"].split(".")[-1]): p for p in predictions}
    rows = []
    for record in run["cases"]:
        found = by_key.get((record["loss"], tuple(record["shape"]), record["dtype"]))
        measured = record["contenders"].get("native", {}).get("kernel_microseconds")
        if found is None or not measured:
            continue
        rows.append(
            {
                "case": record["case"],
                "predicted_traversal": found.get("traversal", ""),
                "traversal": record["contenders"]["native"].get("traversal", ""),
                "predicted_microseconds": found["microseconds"],
                "microseconds": measured,
                "ratio": measured / found["microseconds"],
            }
        )
    return rows


def number(value: float | None, digits: int = 2) -> str:
    if value is None or not math.isfinite(value):
        return NONE
    return f"{value:.{digits}f}" if abs(value) < 100 else f"{value:.0f}"


def markdown(run: Run) -> str:
    """The page of a run."""
    facts, copy = run["machine"], run.get("copy_bytes_per_second")
    lines = [
        ", ".join(f"{key} {value}" for key, value in facts.items() if value not in ("", None))
        + ".",
        "",
        f"Copy on the device: {number(copy / 1e12 if copy else None)} TB/s, read and written bytes."
        " Medians of interleaved rounds; forward + backward. *of copy*: the bytes that must move"
        " (3 N C e; 5 for DIST) over the time, as a part of it. *kernels*: their time alone;"
        " *graph*: the native step replayed as a CUDA graph; *vs graphs*: torch.compile's."
        " Every result was checked against the float64 reference before it was timed.",
    ]
    if run.get("rehearsal"):
        lines[:0] = ["**A REHEARSAL ON A CPU: no number on this page is a measurement.**", ""]
    lines += ["", *_speeds(run)]
    lines += ["", "**Targets of the design:**", "", *_judged(run["targets"])]
    if run.get("predictions"):
        header = ("case", "traversal", "predicted", "kernels, µs", "predicted, µs", "ratio")
        rows = [
            (
                p["case"],
                p["traversal"],
                p["predicted_traversal"],
                *(number(p[key]) for key in ("microseconds", "predicted_microseconds", "ratio")),
            )
            for p in run["predictions"]
        ]
        lines += ["", "**Predictions, made before there was a GPU:**", "", *table(header, rows, 3)]
    missing = [
        f"- {record['case']}: {name}: {found['skipped']}"
        for record in run["cases"]
        for name, found in record["contenders"].items()
        if found.get("skipped")
    ]
    missing += [f"- {name}: {why}" for name, why in run.get("left_out", {}).items()]
    if missing:
        lines += ["", "Not timed:", "", *missing]
    return "\n".join(lines) + "\n"


def _speeds(run: Run) -> list[str]:
    header = ["case", "traversal", "native", "of copy", "kernels, µs", "launches", "host, µs"]
    header += [
        "peak, gradients",
        "graph",
        "triton",
        "of copy",
        "vs eager",
        "vs compile",
        "vs graphs",
    ]
    header += ["vs liger"]
    rows = []
    for record in run["cases"]:
        native = record["contenders"].get("native", {})
        host = native.get("host_seconds")
        rows.append(
            (
                record["case"],
                native.get("traversal", "") or NONE,
                duration(taken(record, "native")),
                number(fraction(run, record)),
                number(native.get("kernel_microseconds"), 1),
                str(native.get("launches") or NONE),
                number(host * 1e6 if host else None, 1),
                number(native.get("peak_gradients"), 3),
                duration(taken(record, "captured")),
                duration(taken(record, "triton")),
                number(fraction(run, record, "triton")),
                *(number(faster(record, r), 1) for r in ("eager", "compile", "graphs", "liger")),
            )
        )
    return table(header, rows)


def _judged(targets: Sequence[Mapping[str, Any]]) -> list[str]:
    words = {True: "kept", False: "**MISSED**", None: "not measured"}
    rows = [
        (t["case"], t["what"], number(t["value"], 3), t["bound"], words[t["kept"]])
        for t in targets
        if t["what"] != "launches a step" or t["kept"] is not True
    ]
    counts = {word: sum(t["kept"] is kept for t in targets) for kept, word in words.items()}
    summary = ", ".join(f"{count} {word.strip('*').lower()}" for word, count in counts.items())
    return [*table(("case", "what", "is", "target", ""), rows), "", f"{summary}."]


def draw(run: Run, path: Path) -> bool:
    """Bandwidth and speed-ups as bars; False where there is nothing to draw."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    records = [r for r in run["cases"] if any(taken(r, name) for name in OURS)]
    if not records:
        return False
    figure, axes = plt.subplots(1, 2, figsize=(13, 0.42 * len(records) + 2), sharey=True)
    places = list(range(len(records)))
    for offset, name, colour in ((-0.2, "native", "#1f77b4"), (0.2, "triton", "#ff7f0e")):
        values = [fraction(run, record, name) or 0.0 for record in records]
        axes[0].barh([p + offset for p in places], values, 0.38, label=name, color=colour)
    axes[0].set_xlabel("part of the copy's bandwidth (bytes that must move)")
    axes[0].axvline(1.0, color="grey", linewidth=0.8)
    for offset, name, colour in (
        (-0.25, "eager", "#7f7f7f"), (0.0, "compile", "#2ca02c"), (0.25, "graphs", "#9467bd"),
    ):  # fmt: skip
        values = [faster(record, name) or math.nan for record in records]
        axes[1].barh([p + offset for p in places], values, 0.23, label=name, color=colour)
    axes[1].set_xscale("log")
    axes[1].axvline(1.0, color="grey", linewidth=0.8)
    axes[1].set_xlabel("native: times faster than")
    axes[0].set_yticks(places, [record["case"] for record in records])
    axes[0].invert_yaxis()
    for axis in axes:
        axis.legend(loc="lower right", fontsize=8)
    title = f"{run['machine'].get('name', '')}, torch {run['machine'].get('torch', '')}"
    figure.suptitle(("REHEARSAL, not a measurement: " if run.get("rehearsal") else "") + title)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True

"""The figure: students against the strength of their teacher, gains, the time of the losses."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from recipes import RECIPES
from report import Results, spread

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.patches import Patch

COLOURS = ("#6b7280", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a3b00")
COLOUR = {method: COLOURS[i % len(COLOURS)] for i, method in enumerate(RECIPES)}


def colour(method: str) -> str:
    return COLOUR[method.partition(":")[0]]


def write(found: Sequence[Results], folder: Path, name: str = "curves.png") -> None:
    """Written whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{name}.partial.png"
    draw(found, partial)
    os.replace(partial, folder / name)


def draw(found: Sequence[Results], path: Path) -> None:
    """A row for each comparison."""
    figure, grid = plt.subplots(
        len(found),
        3,
        figsize=(16, 0.4 + 4.8 * len(found)),
        width_ratios=(1.2, 1.3, 1.0),
        layout="constrained",
        squeeze=False,
    )
    for axes, results in zip(grid, found, strict=True):
        if len(results.teachers) > 1:
            draw_strength(axes[0], results)
        else:
            _draw_curves(axes[0], results)
        draw_gains(axes[1], results)
        _draw_times(axes[2], results)
        for axis in axes:
            axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _title(results: Results) -> str:
    settings = results.settings
    return (
        f"{settings['dataset']}, {results.split} classes: students of {results.images:,} images\n"
        f"tested on {results.tested:,}; {len(settings['seeds'])} seeds"
    )


def draw_strength(axis: Any, results: Results, methods: Sequence[str] | None = None) -> None:
    """What a stronger teacher is worth: a line for each method that had several."""
    accuracy = {name: taught.teacher.final for name, taught in results.teachers.items()}
    for method, histories in results.plain.items():
        mean, deviation = spread([h.final for h in histories.values()])
        axis.axhline(mean, color=colour(method), linestyle="--", label=method)
        axis.axhspan(mean - deviation, mean + deviation, color=colour(method), alpha=0.12)
    common = [m for t in results.teachers.values() for m in t.students]
    for method in methods or dict.fromkeys(m for m in common if common.count(m) > 1):
        names = [t for t in accuracy if method in results.teachers[t].students]
        finals = [results.final(name, method) or [] for name in names]
        means, deviations = zip(*map(spread, finals), strict=True)
        x = [accuracy[name] for name in names]
        axis.errorbar(
            x, means, deviations, color=colour(method), marker="o", capsize=4, label=method
        )
        for where, values in zip(x, finals, strict=True):
            axis.scatter([where] * len(values), values, color=colour(method), s=14, alpha=0.4)
    for name, where in accuracy.items():
        axis.annotate(
            name, (where, 0.01), xycoords=("data", "axes fraction"), ha="center", color="#555555"
        )
    axis.set(
        title=_title(results), xlabel="accuracy of the teacher, %", ylabel="accuracy of students, %"
    )
    axis.grid(axis="y", alpha=0.25)
    axis.legend(frameon=False, loc="upper left")


def _draw_curves(axis: Any, results: Results) -> None:
    """Means only; the spread over seeds is in the panel beside."""
    lowest = 100.0
    options = {m: o for taught in results.teachers.values() for m, o in taught.options.items()}
    for _, method, histories in results.students():
        one = next(iter(histories.values()))
        first = options.get(method, {}).get("stage1", 0.0) * len(one.loss)
        curves = zip(*(h.accuracy for h in histories.values()), strict=True)
        # Before a method's first stage ends, nothing has trained its classifier.
        points = [
            (epoch, spread(values)[0])
            for epoch, values in zip(one.evaluated, curves, strict=True)
            if epoch > first
        ]
        axis.plot(
            [epoch for epoch, _ in points],
            [mean for _, mean in points],
            color=colour(method),
            marker="o" if len(points) == 1 else None,
            label=method,
            linewidth=1.8,
        )
        lowest = min(lowest, points[len(points) // 4][1])
    highest = 101.0
    for name, taught in results.teachers.items():
        axis.axhline(
            taught.teacher.final,
            color="black",
            linestyle=":",
            linewidth=1.3,
            label=f"{name} teacher",
        )
        highest = min(101.0, taught.teacher.final + 2)
    axis.set(
        title=_title(results),
        xlabel="epoch",
        ylabel="accuracy, %: mean over seeds",
        ylim=(max(0.0, lowest - 3), max(highest, lowest + 5)),
    )
    axis.grid(axis="y", alpha=0.25)
    axis.legend(frameon=False, loc="lower right", fontsize=9)


def draw_gains(axis: Any, results: Results) -> None:
    """Paired differences to plain training: each seed, mean and standard deviation."""
    base = next(iter(results.plain), None)
    places: list[str] = []
    # Of several teachers the middle one: what the others do is the panel beside.
    names = list(results.teachers)
    shown = names[len(names) // 2 :][:1]
    for teacher, method, _ in results.students():
        if teacher is not None and teacher not in shown:
            continue
        gains = results.gains(teacher, method, base) if base else None
        if gains is None:
            continue
        mean, deviation = spread(gains)
        place = len(places)
        places.append(method.replace(":", ":\n").replace(",", ",\n"))
        axis.scatter([place - 0.12] * len(gains), gains, color=colour(method), s=22, alpha=0.55)
        axis.errorbar(place + 0.12, mean, deviation, color=colour(method), marker="o", capsize=4)
        axis.annotate(
            f"{mean:+.1f}", (place + 0.12, mean), (6, 0), textcoords="offset points", va="center"
        )
    if not places:
        axis.set_axis_off()
        return
    axis.axhline(0.0, color=COLOURS[0], linestyle="--")
    axis.set_xticks(range(len(places)), places, fontsize=8)
    axis.set_xlim(-0.5, len(places) - 0.2)
    by = f", {shown[0]} teacher" if shown else ""
    axis.set(title=f"Gain over {base} by seed, mean ± sd{by}", ylabel="percentage points")
    axis.grid(axis="y", alpha=0.25)


def _draw_times(axis: Any, results: Results) -> None:
    timed = results.times
    if not timed:
        axis.set_axis_off()
        return
    for place, timing in enumerate(timed.values()):
        bars = ((-0.2, timing.reference, "#c4c8cf"), (0.2, timing.chosen, "#0072b2"))
        for offset, value, shade in bars:
            axis.bar(place + offset, value, 0.38, color=shade)
            axis.annotate(
                f"{value:.0f}",
                (place + offset, value),
                (0, 2),
                textcoords="offset points",
                ha="center",
            )
    one = next(iter(timed.values()))
    handles = [Patch(color=c) for c in ("#c4c8cf", "#0072b2")]
    axis.legend(handles, ["eager (reference)", f"kdkernels ({one.backend})"], frameon=False)
    axis.set_xticks(
        range(len(timed)), [m.replace(":", ":\n").replace(",", ",\n") for m in timed], fontsize=8
    )
    axis.set_yscale("log")
    axis.set_ylim(5, 4 * max(max(t.reference, t.chosen) for t in timed.values()))
    axis.set(
        title=f"Loss alone, {one.shape[0]} images, {one.shape[1]} classes",
        ylabel="forward + backward, microseconds",
    )

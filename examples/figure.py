"""The figure: students against the strength of their teacher, gains, the time of the losses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import plots
from plots import COLOURS, plt
from recipes import RECIPES
from report import Results
from tables import spread

COLOUR = {method: COLOURS[i % len(COLOURS)] for i, method in enumerate(RECIPES)}


def colour(method: str) -> str:
    return COLOUR[method.partition(":")[0]]


def write(found: Sequence[Results], folder: Path, name: str = "curves.png") -> None:
    plots.write(lambda path: draw(found, path), folder / name)


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
    plots.save(figure, path)


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
        if points:
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
    # Of several teachers the middle one: what the others do is the panel beside.
    names = list(results.teachers)
    shown = names[len(names) // 2 :][:1]
    found = [
        (method, gains)
        for teacher, method, _ in results.students()
        if (teacher is None or teacher in shown)
        and base
        and (gains := results.gains(teacher, method, base)) is not None
    ]
    by = f", {shown[0]} teacher" if shown else ""
    title = f"Gain over {base} by seed, mean ± sd{by}"
    plots.gains(axis, found, colour, title, "percentage points")


def _draw_times(axis: Any, results: Results) -> None:
    timed = results.times
    if not timed:
        axis.set_axis_off()
        return
    one = next(iter(timed.values()))
    pairs = {method: (timing.reference, timing.chosen) for method, timing in timed.items()}
    plots.pairs(axis, pairs, ("eager (reference)", f"kdkernels ({one.backend})"), "{:.0f}")
    axis.set_yscale("log")
    axis.set_ylim(5, 4 * max(map(max, pairs.values())))
    axis.set(
        title=f"Loss alone, {one.shape[0]} images, {one.shape[1]} classes",
        ylabel="forward + backward, microseconds",
    )

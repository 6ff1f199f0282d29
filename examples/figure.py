"""The figure: accuracy over epochs and at the end, and the time of the losses."""

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


def write(found: Sequence[Results], folder: Path) -> None:
    """curves.png, written whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / "curves.partial.png"
    draw(found, partial)
    os.replace(partial, folder / "curves.png")


def draw(found: Sequence[Results], path: Path) -> None:
    """A row for each comparison: over epochs, seed by seed, and the time of the losses."""
    figure, grid = plt.subplots(
        len(found),
        3,
        figsize=(16, 0.4 + 4.8 * len(found)),
        width_ratios=(1.3, 1.2, 1.2),
        layout="constrained",
        squeeze=False,
    )
    for axes, results in zip(grid, found, strict=True):
        _draw_curves(axes[0], results)
        _draw_final(axes[1], results)
        _draw_times(axes[2], results)
        taught, seen, tested = results.images
        axes[0].set_title(
            f"{results.task}\nteacher: {taught:,} images, students: {seen:,}, "
            f"tested on {tested:,}; {len(results.settings['seeds'])} seeds",
            fontsize=10,
        )
        for axis in axes:
            axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_curves(axis: Any, results: Results) -> None:
    """Means only; the spread over seeds is in the panel beside."""
    lowest = 100.0
    for method, histories in results.students.items():
        curves = [h.accuracy for h in histories.values()]
        # Before a method's first stage ends, nothing has trained its classifier.
        first = int(results.options[method].get("stage1", 0.0) * len(curves[0]))
        mean = [spread(values)[0] for values in zip(*curves, strict=True)][first:]
        axis.plot(
            range(first + 1, first + 1 + len(mean)),
            mean,
            color=COLOUR[method],
            label=RECIPES[method].title,
            linewidth=1.8,
        )
        lowest = min(lowest, mean[len(mean) // 4])
    teacher = results.teacher.accuracy[-1]
    axis.axhline(teacher, color="black", linestyle=":", linewidth=1.3, label="teacher")
    axis.set(
        xlabel="epoch",
        ylabel="accuracy, %: mean over seeds",
        ylim=(max(0.0, lowest - 3), min(101.0, teacher + 2)),
    )
    axis.grid(axis="y", alpha=0.25)
    axis.legend(frameon=False, loc="lower right", fontsize=9)


def _draw_final(axis: Any, results: Results) -> None:
    for place, method in enumerate(results.students):
        colour = COLOUR[method]
        values = results.final(method)
        mean, deviation = spread(values)
        axis.scatter([place - 0.12] * len(values), values, color=colour, s=22, alpha=0.55)
        axis.errorbar(
            place + 0.12, mean, deviation, color=colour, marker="o", capsize=4, linewidth=1.8
        )
        axis.annotate(
            f"{mean:.1f}", (place + 0.12, mean), (6, 0), textcoords="offset points", va="center"
        )
    axis.set_xticks(range(len(results.students)), list(results.students))
    axis.set_xlim(-0.5, len(results.students) - 0.25)
    axis.set(title="Final accuracy: each seed, mean ± sd", ylabel="accuracy, %")
    axis.grid(axis="y", alpha=0.25)


def _draw_times(axis: Any, results: Results) -> None:
    timed = {m: t for m, t in results.times.items() if t is not None}
    if not timed:
        axis.set_axis_off()
        return
    for place, timing in enumerate(timed.values()):
        bars = ((-0.2, timing.reference, "#c4c8cf"), (0.2, timing.chosen, "#0072b2"))
        for offset, value, colour in bars:
            axis.bar(place + offset, value, 0.38, color=colour)
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
    axis.set_xticks(range(len(timed)), list(timed))
    axis.set_yscale("log")
    axis.set_ylim(5, 4 * max(max(t.reference, t.chosen) for t in timed.values()))
    axis.set(
        title=f"Loss alone, {one.shape[0]} images, {one.shape[1]} classes",
        ylabel="forward + backward, microseconds",
    )

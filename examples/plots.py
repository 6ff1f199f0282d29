"""What the figures of the trainers are made of."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from tables import spread

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.patches import Patch

__all__ = ["COLOURS", "gains", "pairs", "plt", "save", "write"]
COLOURS = ("#6b7280", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a3b00")


def write(draw: Callable[[Path], None], path: Path) -> None:
    """Written whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial.png")
    draw(partial)
    os.replace(partial, path)


def save(figure: Any, path: Path) -> None:
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _lines(method: str) -> str:
    """The name of a variant on lines of its own, so that neighbours do not meet."""
    return method.replace(":", ":\n").replace(",", ",\n")


def gains(
    axis: Any,
    found: Sequence[tuple[str, Sequence[float]]],
    colour: Callable[[str], str],
    title: str,
    unit: str,
    form: str = "{:+.1f}",
) -> None:
    """Paired differences by method: each seed, mean and standard deviation."""
    if not found:
        axis.set_axis_off()
        return
    for place, (method, values) in enumerate(found):
        mean, deviation = spread(values)
        axis.scatter([place - 0.12] * len(values), values, color=colour(method), s=22, alpha=0.55)
        axis.errorbar(place + 0.12, mean, deviation, color=colour(method), marker="o", capsize=4)
        axis.annotate(
            form.format(mean),
            (place + 0.12, mean),
            (6, 0),
            textcoords="offset points",
            va="center",
        )
    axis.axhline(0.0, color=COLOURS[0], linestyle="--")
    axis.set_xticks(range(len(found)), [_lines(method) for method, _ in found], fontsize=8)
    axis.set_xlim(-0.5, len(found) - 0.2)
    axis.set(title=title, ylabel=unit)
    axis.grid(axis="y", alpha=0.25)


def pairs(
    axis: Any, found: Mapping[str, tuple[float, float]], names: tuple[str, str], form: str
) -> None:
    """Two bars for each method: eager PyTorch's, and this library's."""
    shades = ("#c4c8cf", "#0072b2")
    for place, values in enumerate(found.values()):
        for offset, value, shade in zip((-0.2, 0.2), values, shades, strict=True):
            axis.bar(place + offset, value, 0.38, color=shade)
            axis.annotate(
                form.format(value),
                (place + offset, value),
                (0, 2),
                textcoords="offset points",
                ha="center",
            )
    axis.legend([Patch(color=shade) for shade in shades], names, frameon=False)
    axis.set_xticks(range(len(found)), [_lines(method) for method in found], fontsize=8)

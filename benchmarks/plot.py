"""The figures: time and peak memory, a panel for each loss of logits, a row for each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from kdkernels.registry import SPECS

from .results import Comparison, compare, select
from .shapes import BY_NAME

# Colours that stay apart for colour-blind readers; shapes repeat the distinction, and sizes let a
# marker be seen behind another.
STYLES = {
    "eager": ("eager PyTorch", "#6b7280", "s", 8),
    "compile": ("torch.compile", "#d55e00", "D", 8),
    "ours": ("kdkernels", "#0072b2", "o", 6),
}
GRID = "#e5e7eb"


def draw(run: dict[str, Any], path: Path) -> bool:
    """Draw the losses of logits, forward + backward in float32; False if none was timed."""
    groups = [group for group in _groups(run) if not _of_features(group)]
    losses = list(dict.fromkeys(group.loss for group in groups))
    if not groups:
        return False
    places = list(dict.fromkeys(group.workload for group in groups))
    size = (4.2 * len(losses) + 2.2, 2 * (0.42 * len(places) + 1.0) + 1.0)
    figure = Figure(figsize=size, dpi=140)
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(losses), sharey=True, sharex="row", squeeze=False)
    for column, loss in enumerate(losses):
        own = {group.workload: group for group in groups if group.loss == loss}
        _panel(axes[0, column], own, places, "times_floor")
        _panel(axes[1, column], own, places, "gradients")
        spec = SPECS.get(loss)
        axes[0, column].set_title(spec.title if spec else loss, fontweight="bold", fontsize=12)
        axes[0, column].set_xlabel("time / torch.add(student, teacher)")
        axes[1, column].set_xlabel("peak memory / one gradient")
    for line, measure, room in ((0, "times_floor", 4.0), (1, "gradients", 1.2)):
        known = [v for group in groups for n in STYLES if (v := getattr(group, measure)(n))]
        axes[line, 0].set_xlim(0.8 * min(1.0, *known), room * max(1.0, *known))
    _finish(figure, axes[0, 0], run["machine"], 0.045)
    figure.savefig(path)
    return True


def draw_features(run: dict[str, Any], path: Path) -> bool:
    """Draw the losses of features and embeddings, which differ in shape: time over eager's."""
    groups = [group for group in _groups(run) if _of_features(group)]
    if not groups:
        return False
    own = {f"{SPECS[g.loss].title}: {_label(g.workload)}": g for g in groups}
    figure = Figure(figsize=(12.0, 0.42 * len(own) + 2.4), dpi=140)
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2, sharey=True, squeeze=False)
    panels = (
        ("times_eager", "time / eager PyTorch", 4.0),
        ("gradients", "peak memory / the gradients", 1.2),
    )
    for column, (measure, caption, room) in enumerate(panels):
        _panel(axes[0, column], own, list(own), measure)
        axes[0, column].set_xlabel(caption)
        known = [v for group in groups for n in STYLES if (v := getattr(group, measure)(n))]
        axes[0, column].set_xlim(0.8 * min(1.0, *known), room * max(1.0, *known))
    _finish(figure, axes[0, 0], run["machine"], 0.09)
    figure.savefig(path)
    return True


def _groups(run: dict[str, Any]) -> list[Comparison]:
    return select(compare(run["results"]), dtype="float32", mode="forward_backward")


def _of_features(group: Comparison) -> bool:
    return group.workload in BY_NAME and BY_NAME[group.workload].features and group.loss in SPECS


def _finish(figure: Figure, axes: Axes, facts: dict[str, Any], legend: float) -> None:
    """Title and legend; the legend takes a part of the height."""
    threads = f", {facts['threads']} threads" if facts["device"] == "cpu" else ""
    figure.suptitle(
        "Forward + backward, float32: left is better; the number is the speed-up over eager\n"
        f"{facts['name']}{threads}, torch {facts['torch']}, {facts['date']}",
        fontsize=11,
    )
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    order = [label for label, *_ in STYLES.values() if label in unique]
    figure.legend(
        [unique[label] for label in order], order, loc="lower center", ncols=3, frameon=False
    )
    figure.tight_layout(rect=(0, legend, 1, 1))


def _panel(axes: Axes, own: dict[str, Comparison], places: list[str], measure: str) -> None:
    for height, place in enumerate(places):
        group = own.get(place)
        if group is None:
            continue
        values = {name: getattr(group, measure)(name) for name in STYLES}
        known = [value for value in values.values() if value]
        if known:
            axes.plot([min(known), max(known)], [height] * 2, color="#cbd5e1", lw=2, zorder=1)
        for name, (label, colour, marker, size) in STYLES.items():
            if values[name]:
                axes.plot(
                    values[name], height, marker, color=colour, ms=size, label=label, zorder=3,
                    linestyle="none", markeredgecolor="white", markeredgewidth=0.8,
                )  # fmt: skip
        speedup = group.speedup("eager")
        if measure != "gradients" and speedup and values["eager"]:
            axes.annotate(
                f"{speedup:.0f}x" if speedup >= 10 else f"{speedup:.1f}x",
                (max(known), height), (8, 0), textcoords="offset points", va="center",
                fontsize=9, color=STYLES["ours"][1], fontweight="bold",
            )  # fmt: skip
    axes.axvline(1.0, color="#111827", lw=1, ls=(0, (4, 3)), zorder=2)
    axes.set_xscale("log")
    axes.set_ylim(len(places) - 0.4, -0.6)
    axes.set_yticks(range(len(places)), [_label(place) for place in places])
    axes.tick_params(which="both", length=0)
    axes.grid(axis="x", color=GRID, zorder=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    ticks = (1.0, 2.0, 5.0) if measure == "gradients" else (1.0,)
    axes.xaxis.set_major_locator(LogLocator(subs=ticks))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _label(place: str) -> str:
    return BY_NAME[place].label if place in BY_NAME else place

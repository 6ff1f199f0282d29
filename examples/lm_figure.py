"""The figure: validation loss by step, gains by seed, share of the loss in a step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import plots
from lm_methods import METHODS
from lm_report import Results
from plots import COLOURS, plt
from tables import spread

COLOUR = dict(zip(METHODS, COLOURS, strict=False))


def colour(method: str) -> str:
    return COLOUR[method.partition(":")[0]]


def write(results: Results, folder: Path) -> None:
    plots.write(lambda path: draw(results, path), folder / "lm_curves.png")


def draw(results: Results, path: Path) -> None:
    figure, axes = plt.subplots(
        1, 3, figsize=(16, 5.2), width_ratios=(1.2, 1.2, 1.1), layout="constrained"
    )
    _draw_curves(axes[0], results)
    gains = [(m, found) for m in results.students if (found := results.gains(m)) is not None]
    title = f"Gain over {results.base} by seed, mean ± sd"
    plots.gains(axes[1], gains, colour, title, "nats a token less", "{:+.3f}")
    _draw_shares(axes[2], results)
    plots.save(figure, path)


def _draw_curves(axis: Any, results: Results) -> None:
    """Mean and standard deviation over seeds."""
    for method, histories in results.students.items():
        one = next(iter(histories.values()))
        curves = zip(*(history.validation for history in histories.values()), strict=True)
        means, deviations = zip(*map(spread, curves), strict=True)
        axis.plot(one.step, means, color=colour(method), marker="o", markersize=3, label=method)
        low, high = (
            [mean + sign * d for mean, d in zip(means, deviations, strict=True)] for sign in (-1, 1)
        )
        axis.fill_between(one.step, low, high, color=colour(method), alpha=0.12, linewidth=0)
    if results.teacher is not None:
        axis.axhline(results.teacher.final, color="black", linestyle=":", label="teacher")
    settings = results.settings
    axis.set(
        title=f"{results.vocabulary} tokens; students of {results.seen:,} training tokens,\n"
        f"evaluated on {results.tokens[1]:,}; {len(settings['seeds'])} seeds",
        xlabel="training step",
        ylabel="validation loss, nats a token",
    )
    axis.grid(axis="y", alpha=0.25)
    axis.legend(frameon=False)


def _draw_shares(axis: Any, results: Results) -> None:
    pairs = {m: (100 * e, 100 * t.share) for m, t in results.times.items() if (e := t.eager_share)}
    if not pairs:
        axis.set_axis_off()
        return
    plots.pairs(axis, pairs, ("eager PyTorch", "kdkernels"), "{:.0f}")
    axis.set_ylim(0, 1.3 * max(map(max, pairs.values())))
    axis.set(
        title="Share of the loss in a training step",
        ylabel="loss, forward + backward, % of the step",
    )

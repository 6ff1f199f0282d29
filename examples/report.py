"""What the trainer reports: the table, the figure, the JSON file, and the time of a loss."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib
import torch
from engine import Distiller, History, Job
from models import Output
from recipes import RECIPES, Step

import kdkernels

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.patches import Patch

COLOURS = ("#6b7280", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


@dataclass(frozen=True)
class Timing:
    """Microseconds for forward + backward of the distillation term alone, on one batch."""

    backend: str
    chosen: float
    reference: float
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Results:
    """Everything that a comparison found; written to results.json as it is."""

    settings: dict[str, Any]
    processes: int
    device: str
    images: tuple[int, int, int]
    """Training images of the teacher, of a student, and images evaluated on."""
    sizes: tuple[int, int]
    """Parameters of teacher and student."""
    teacher: History
    students: dict[str, dict[int, History]]
    times: dict[str, Timing | None]
    options: dict[str, dict[str, float]]

    def final(self, method: str) -> list[float]:
        """Accuracy at the end of training (not the best epoch), a number a seed."""
        return [history.accuracy[-1] for history in self.students[method].values()]


def time_loss(job: Job) -> Timing | None:
    """Time a recipe's term on a real batch, with the backend in use and with plain PyTorch."""
    term, teacher = job.recipe.term, job.teacher
    if term is None or teacher is None:
        return None
    images, target = next(iter(job.data.epoch(job.batch, job.seed, 0)))
    distiller = Distiller(job).to(images.device).eval()
    teacher.eval()
    with torch.no_grad():
        student_out, teacher_out = distiller.student(images), teacher(images)
    leaves = Output(*(part.detach().requires_grad_() for part in student_out))

    def once(backend: str | None) -> None:
        for leaf in leaves:
            leaf.grad = None
        term(
            Step(leaves, teacher_out, target, 1.0, job.options, backend, distiller.extra)
        ).backward()

    synchronize = torch.cuda.synchronize if images.is_cuda else _nothing
    chosen, reference = _median_seconds(
        [lambda: once(job.backend), lambda: once("reference")], synchronize
    )
    used = job.backend or _best(job.recipe.name, images.device)
    return Timing(used, 1e6 * chosen, 1e6 * reference, tuple(student_out.logits.shape))


def _best(name: str, device: torch.device) -> str:
    """The backend that ``backend=None`` picks: the first with nothing against it."""
    requested = os.environ.get("KDKERNELS_BACKEND")
    reasons = kdkernels.available(device)[name]
    return requested or next(backend for backend, against in reasons.items() if not against)


def _nothing() -> None:
    pass


def _median_seconds(
    contenders: Sequence[Callable[[], None]],
    synchronize: Callable[[], None],
    rounds: int = 31,
    calls: int = 20,
) -> list[float]:
    """Median time of a call of each, taken in turns so that a busy machine slows all alike."""
    seconds: list[list[float]] = [[] for _ in contenders]
    for _ in range(rounds):
        for once, taken in zip(contenders, seconds, strict=True):
            synchronize()
            begin = time.perf_counter()
            for _ in range(calls):
                once()
            synchronize()
            taken.append((time.perf_counter() - begin) / calls)
    return [statistics.median(taken[1:]) for taken in seconds]  # the first round warms up


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (0 for a single value)."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def table(results: Results) -> str:
    """The comparison as a Markdown table with a line of context above."""
    taught, seen, tested = results.images
    seeds = len(results.settings["seeds"])
    split = "held-out training" if results.settings["validate"] else "test"
    lines = [
        f"{results.settings['dataset']}: teacher {results.settings['teacher']} "
        f"({results.sizes[0]:,} parameters, {taught:,} training images) "
        f"{results.teacher.accuracy[-1]:.2f} %; "
        f"student {results.settings['student']} "
        f"({results.sizes[1]:,} parameters, {seen:,} training images)",
        f"accuracy on {tested:,} {split} images after the last epoch, mean ± standard deviation "
        f"over {seeds} seed{'s'[: seeds != 1]}",
        "",
    ]
    head = ["method", "accuracy %", "gain over ce", "step ms", "loss µs", "eager µs", "speed-up"]
    rows = [_row(results, method) for method in results.students]
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    for row in (head, ["-" * width for width in widths], *rows):
        cells = (
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("| " + " | ".join(cells) + " |")
    timed = next((t for t in results.times.values() if t), None)
    if timed:
        lines += [
            "",
            f"loss: forward + backward of the distillation term alone on "
            f"{timed.shape[0]} x {timed.shape[1]} logits, backend {timed.backend} "
            f"({results.device}, threads: {torch.get_num_threads()}); "
            "eager: the same with backend=reference",
        ]
    return "\n".join(lines)


def _row(results: Results, method: str) -> list[str]:
    mean, deviation = spread(results.final(method))
    timing = results.times.get(method)
    cells = [method, f"{mean:.2f} ± {deviation:.2f}", "-"]
    if method != "ce" and "ce" in results.students:
        gains = [a - b for a, b in zip(results.final(method), results.final("ce"), strict=True)]
        gain, deviation = spread(gains)
        cells[2] = f"{gain:+.2f} ± {deviation:.2f}"
    seconds = [s for history in results.students[method].values() for s in history.seconds]
    cells.append(f"{1e3 * statistics.median(seconds):.2f}")
    if timing is None:
        return [*cells, "-", "-", "-"]
    ratio = timing.reference / timing.chosen
    return [*cells, f"{timing.chosen:.0f}", f"{timing.reference:.0f}", f"{ratio:.1f}x"]


def write(results: Results, folder: Path) -> None:
    """results.json and curves.png, each written whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    summary = {}
    for method in results.students:
        mean, deviation = spread(results.final(method))
        summary[method] = {"accuracy_mean": mean, "accuracy_sd": deviation}
    content = {
        "summary": summary,
        "torch": torch.__version__,
        "kdkernels": kdkernels.__version__,
        "python": platform.python_version(),
        **asdict(results),
    }
    partial = folder / "results.partial"
    partial.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(partial, folder / "results.json")
    partial = folder / "curves.partial.png"
    draw(results, partial)
    os.replace(partial, folder / "curves.png")


def draw(results: Results, path: Path) -> None:
    """Accuracy over epochs, its final value seed by seed, and the time of the losses."""
    methods = list(results.students)
    colours = {m: COLOURS[i % len(COLOURS)] for i, m in enumerate(methods)}
    figure, axes = plt.subplots(
        1, 3, figsize=(14, 4.6), width_ratios=(1.5, 1, 1), layout="constrained"
    )
    _draw_curves(axes[0], results, colours)
    _draw_final(axes[1], results, colours)
    _draw_times(axes[2], results)
    taught, seen, tested = results.images
    figure.suptitle(
        f"{results.settings['dataset']}: teacher trained on {taught:,} images, students on "
        f"{seen:,}, tested on {tested:,}; {len(results.settings['seeds'])} seeds",
        fontsize=12,
    )
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _draw_curves(axis: Any, results: Results, colours: dict[str, str]) -> None:
    lowest = 100.0
    for method, colour in colours.items():
        curves = [h.accuracy for h in results.students[method].values()]
        epochs = range(1, len(curves[0]) + 1)
        mean, deviation = zip(
            *(spread(values) for values in zip(*curves, strict=True)), strict=True
        )
        axis.plot(epochs, mean, color=colour, label=RECIPES[method].title, linewidth=1.8)
        low = [m - d for m, d in zip(mean, deviation, strict=True)]
        high = [min(100.0, m + d) for m, d in zip(mean, deviation, strict=True)]
        axis.fill_between(epochs, low, high, color=colour, alpha=0.13, linewidth=0)
        lowest = min(lowest, low[len(low) // 4])
    teacher = results.teacher.accuracy[-1]
    axis.axhline(teacher, color="black", linestyle=":", linewidth=1.3, label="teacher")
    axis.set(
        title="Accuracy during training (band: ± 1 sd)",
        xlabel="epoch",
        ylabel="accuracy, %",
        ylim=(max(0.0, lowest - 3), min(101.0, teacher + 2)),
    )
    axis.grid(axis="y", alpha=0.25)
    axis.legend(frameon=False, loc="lower right")


def _draw_final(axis: Any, results: Results, colours: dict[str, str]) -> None:
    for place, (method, colour) in enumerate(colours.items()):
        values = results.final(method)
        mean, deviation = spread(values)
        axis.scatter([place - 0.12] * len(values), values, color=colour, s=22, alpha=0.55)
        axis.errorbar(
            place + 0.12, mean, deviation, color=colour, marker="o", capsize=4, linewidth=1.8
        )
        axis.annotate(
            f"{mean:.1f}", (place + 0.12, mean), (7, 0), textcoords="offset points", va="center"
        )
    axis.set_xticks(range(len(colours)), list(colours))
    axis.set_xlim(-0.5, len(colours) - 0.25)
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
    axis.set_ylim(0, 1.25 * max(max(t.reference, t.chosen) for t in timed.values()))
    axis.set(
        title=f"Loss alone, {one.shape[0]} x {one.shape[1]} logits",
        ylabel="forward + backward, microseconds",
    )

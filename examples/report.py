"""What the trainer reports: the table, the JSON file, and the time of a loss; figure.py draws."""

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

import torch
from engine import Distiller, History, Job
from models import Output
from terms import Step
from torch import Tensor, nn

import kdkernels


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

    task: str
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


class Recorded(nn.Module):
    """Gives again what an extra module gave first: what is timed is the loss, not the encoders."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.given = module, None
        self.leaves: list[Tensor] = []

    def forward(self, *inputs: Any) -> Any:
        if self.given is None:
            self.given = self._cut(self.module(*inputs))
        return self.given

    def _cut(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            self.leaves.append(value.detach().requires_grad_(value.requires_grad))
            return self.leaves[-1]
        parts = [self._cut(part) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)


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
    extra = Recorded(distiller.extra) if distiller.extra is not None else None
    progress = job.options.get("stage1", 1.0)  # of two stages, the first

    def once(backend: str | None) -> None:
        for leaf in (*leaves, *(extra.leaves if extra else ())):
            leaf.grad = None
        step = Step(leaves, teacher_out, target, progress, job.options, backend, extra, images)
        term(step).backward()

    synchronize = torch.cuda.synchronize if images.is_cuda else _nothing
    chosen, reference = _median_seconds(
        [lambda: once(job.backend), lambda: once("reference")], synchronize
    )
    used = job.backend or _best(job.recipe.loss or job.recipe.name, images.device)
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
) -> list[float]:
    """Median time of a call of each, taken in turns so that a busy machine slows all alike."""
    seconds: list[list[float]] = [[] for _ in contenders]
    for turn in range(rounds):
        for once, taken in zip(contenders, seconds, strict=True):
            # As many calls as take about 4 ms, by the turn before.
            calls = min(20, max(1, round(4e-3 / taken[-1]))) if turn else 1
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
        f"{results.task}: teacher {results.settings['teacher']} "
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
            f"loss: forward + backward of the distillation term alone (refilled: of stage 1) for "
            f"{timed.shape[0]} images, {timed.shape[1]} classes, backend {timed.backend}",
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


def write(found: Sequence[Results], folder: Path) -> None:
    """results.json, written whole or not at all; a second comparison is under "disjoint"."""
    folder.mkdir(parents=True, exist_ok=True)
    results, *others = (_content(results) for results in found)
    content = {
        "torch": torch.__version__,
        "kdkernels": kdkernels.__version__,
        "python": platform.python_version(),
        **results,
        "disjoint": others[0] if others else None,
    }
    partial = folder / "results.partial"
    partial.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(partial, folder / "results.json")


def _content(results: Results) -> dict[str, Any]:
    summary = {}
    for method in results.students:
        mean, deviation = spread(results.final(method))
        summary[method] = {"accuracy_mean": mean, "accuracy_sd": deviation}
    return {"summary": summary, **asdict(results)}

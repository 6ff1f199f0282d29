"""What the trainer reports: the table, the JSON file, and the time of a loss; figure.py draws."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import timing
import torch
from engine import Distiller, History, Job, autocast
from models import Output
from tables import grid, paired, spread, versions, write_json
from terms import Step
from torch import Tensor, nn


@dataclass(frozen=True)
class Timing:
    """Microseconds for forward + backward of the distillation term alone, on one batch."""

    backend: str
    chosen: float
    reference: float
    shape: tuple[int, ...]


@dataclass
class Taught:
    """A teacher and what its students reached, by method and seed."""

    teacher: History
    parameters: int
    images: int
    students: dict[str, dict[int, History]] = field(default_factory=dict)
    options: dict[str, dict[str, float]] = field(default_factory=dict)
    induced: dict[str, dict[int, float]] = field(default_factory=dict)
    """REFILLED: accuracy of the classifier that the teacher's embedding and the centres make."""


@dataclass
class Results:
    """Everything that a comparison found; written to results.json as it is."""

    split: str
    settings: dict[str, Any]
    processes: int
    device: str
    images: int
    """Training images of a student."""
    tested: int
    parameters: int
    """Of a student."""
    plain: dict[str, dict[int, History]]
    """Students without a teacher."""
    teachers: dict[str, Taught] = field(default_factory=dict)
    times: dict[str, Timing] = field(default_factory=dict)
    steps: dict[str, float] = field(default_factory=dict)
    """Milliseconds of a training step by ``METHOD`` or ``METHOD@TEACHER``, taken in turns."""

    def students(self) -> Iterator[tuple[str | None, str, dict[int, History]]]:
        """Teacher, method and histories, in the order of the table."""
        for method, histories in self.plain.items():
            yield None, method, histories
        for name, taught in self.teachers.items():
            for method, histories in taught.students.items():
                yield name, method, histories

    def final(self, teacher: str | None, method: str) -> list[float] | None:
        """Accuracy at the end of training, a number a seed; None: not part of the comparison."""
        found = self.plain.get(method)
        if found is None and teacher is not None:
            found = self.teachers[teacher].students.get(method)
        return None if found is None else [history.final for history in found.values()]

    def gains(self, teacher: str | None, method: str, over: str) -> list[float] | None:
        """Paired differences: the same seed has the same initial weights, images and batches."""
        mine, other = self.final(teacher, method), self.final(teacher, over)
        if mine is None or other is None or method == over:
            return None
        return [a - b for a, b in zip(mine, other, strict=True)]


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
    with torch.no_grad(), autocast(images.device, job.amp):
        student_out, teacher_out = distiller.student(images), teacher(images)
    leaves = Output(*(part.detach().requires_grad_() for part in student_out))
    extra = Recorded(distiller.extra) if distiller.extra is not None else None
    progress = job.options.get("stage1", 1.0)  # of two stages, the first

    def once(backend: str | None) -> None:
        for leaf in (*leaves, *(extra.leaves if extra else ())):
            leaf.grad = None
        step = Step(leaves, teacher_out, target, progress, job.options, backend, extra, images)
        with autocast(images.device, job.amp):
            loss = term(step)
        loss.backward()

    chosen, reference = timing.median_seconds(
        [lambda: once(job.backend), lambda: once("reference")], images.device
    )
    used = job.backend or timing.best_backend(job.recipe.loss or job.recipe.name, images.device)
    return Timing(used, 1e6 * chosen, 1e6 * reference, tuple(student_out.logits.shape))


def time_steps(jobs: Mapping[str, Job]) -> dict[str, float]:
    """Milliseconds of a whole step: batch, teacher, student, loss, backward, update."""

    def prepared(job: Job) -> Callable[[], None]:
        images, target = next(iter(job.data.epoch(job.batch, job.seed, 0)))
        # One process measures: a loss of all ranks would wait for the others.
        distiller = Distiller(replace(job, global_batch=False)).to(images.device).train()
        trained = [p for p in distiller.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=0.0, momentum=0.9, nesterov=True)

        def once() -> None:
            output = None
            with autocast(images.device, job.amp):
                if job.teacher is not None:
                    job.teacher.eval()
                    with torch.no_grad():
                        output = job.teacher(images)
                loss = distiller(images, target, output, 1.0)
            optimizer.zero_grad()
            loss.backward()
            if job.options["clip"]:
                nn.utils.clip_grad_norm_(trained, job.options["clip"])
            optimizer.step()

        return once

    device = next(iter(jobs.values())).data.images.device
    seconds = timing.median_seconds([prepared(job) for job in jobs.values()], device)
    return {name: 1e3 * one for name, one in zip(jobs, seconds, strict=True)}


def table(results: Results) -> str:
    """The comparison as a Markdown table with lines of context around."""
    settings = results.settings
    seeds = len(settings["seeds"])
    split = "held-out training" if settings["validate"] else "test"
    lines = [
        f"{settings['dataset']}, {results.split} classes: students {settings['student']} "
        f"({results.parameters:,} parameters), {results.images:,} training images,",
        f"accuracy on {results.tested:,} {split} images after the last epoch, mean ± standard "
        f"deviation over {seeds} seed{'s'[: seeds != 1]};",
        "gains are paired by seed (in brackets: seeds that gained)",
        *(
            f"teacher {name}: {taught.parameters:,} parameters, {taught.images:,} images, "
            f"{taught.teacher.final:.2f} %"
            for name, taught in results.teachers.items()
            if results.split == "same"
        ),
        "",
    ]
    lines += grid(*rows(results))
    for name, taught in results.teachers.items():
        for method, found in taught.induced.items():
            mean, deviation = spread(list(found.values()))
            lines += [
                "",
                f"{method}: the classifier that the {name} teacher's embedding induces reaches "
                f"{mean:.2f} ± {deviation:.2f} %",
            ]
    timed = next(iter(results.times.values()), None)
    if timed:
        lines += [
            "",
            "step: one training step with everything in it, the methods in turns",
            f"loss: forward + backward of the distillation term alone (refilled: of its first "
            f"stage) for {timed.shape[0]} images, {timed.shape[1]} classes,",
            f"backend {timed.backend} ({results.device}, threads: {torch.get_num_threads()}); "
            "eager: the same with backend=reference",
        ]
    return "\n".join(lines)


def rows(results: Results) -> tuple[list[str], list[list[str]]]:
    """Head and body of the table; columns that would be empty are left out."""
    base = next(iter(results.plain), None)
    head = ["teacher", "method", "accuracy %", f"over {base or 'ce'}", "over kd", "step ms"]
    head += ["loss µs", "eager µs"]
    found = []
    for teacher, method, _ in results.students():
        step = results.steps.get(f"{method}@{teacher}" if teacher else method)
        timing = results.times.get(method)
        found.append(
            [
                teacher or "-",
                method,
                "{:.2f} ± {:.2f}".format(*spread(results.final(teacher, method) or [])),
                paired(results.gains(teacher, method, base) if base else None),
                paired(results.gains(teacher, method, "kd") if teacher else None),
                f"{step:.2f}" if step else "-",
                f"{timing.chosen:.0f}" if timing else "-",
                f"{timing.reference:.0f}" if timing else "-",
            ]
        )
    kept = [i for i in range(len(head)) if i < 3 or any(row[i] != "-" for row in found)]
    return [head[i] for i in kept], [[row[i] for i in kept] for row in found]


def accuracies(results: Results) -> dict[str, dict[str, dict[int, float]]]:
    """By teacher, method and seed; students without a teacher stand beside those of each."""
    plain = {m: {s: h.final for s, h in found.items()} for m, found in results.plain.items()}
    return {
        name: plain
        | {m: {s: h.final for s, h in found.items()} for m, found in taught.students.items()}
        for name, taught in results.teachers.items()
    } or {"-": plain}


def write(found: Sequence[Results], folder: Path) -> None:
    """results.json, whole or not at all: "accuracy" by split, teacher, method and seed, then all
    that each comparison recorded."""
    content = {
        **versions(),
        "accuracy": {results.split: accuracies(results) for results in found},
        "comparisons": [asdict(results) for results in found],
    }
    write_json(content, folder / "results.json")

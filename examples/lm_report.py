"""What the comparison of language models reports: table, JSON, times of a step and its loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import lm_engine
import lm_methods
import timing
import torch
from lm_data import batches
from lm_engine import History, Job
from tables import grid, paired, spread, versions, write_json
from world import World


@dataclass(frozen=True)
class Times:
    """Seconds: of a whole training step, and of its loss alone, forward and backward."""

    tokens: int
    """In a step."""
    step: float
    loss: float
    eager_step: float | None = None
    """With PyTorch's operations in place of the library's loss; None where there is none."""
    eager_loss: float | None = None

    @property
    def share(self) -> float:
        return self.loss / self.step

    @property
    def eager_share(self) -> float | None:
        if self.eager_loss is None or self.eager_step is None:
            return None
        return self.eager_loss / self.eager_step


@dataclass
class Results:
    """Everything that a comparison found."""

    settings: dict[str, Any]
    device: str
    characters: tuple[int, int]
    """Of the training and of the validation text."""
    tokens: tuple[int, int]
    vocabulary: int
    parameters: tuple[int, int]
    """Of teacher and student."""
    seen: int
    """Training tokens that a student has."""
    teacher: History | None = None
    students: dict[str, dict[int, History]] = field(default_factory=dict)
    """By method and seed."""
    options: dict[str, dict[str, float]] = field(default_factory=dict)
    times: dict[str, Times] = field(default_factory=dict)

    def final(self, method: str) -> list[float]:
        """Validation loss at the end, a number a seed."""
        return [history.final for history in self.students[method].values()]

    def gains(self, method: str) -> list[float] | None:
        """Nats less than plain training, paired: a seed has its weights, text and batches."""
        base = self.base
        if base is None or method == base:
            return None
        return [a - b for a, b in zip(self.final(base), self.final(method), strict=True)]

    @property
    def base(self) -> str | None:
        """The first method that has no teacher."""
        plain = (m for m in self.students if lm_methods.Method.parse(m).entry is None)
        return next(plain, None)


def time_steps(jobs: Mapping[str, Job]) -> dict[str, Times]:
    """Every method with the library's loss and with the eager one, in turns on a real batch."""
    contenders = {label: _contenders(job) for label, job in jobs.items()}
    device = next(iter(jobs.values())).stream.device
    seconds = iter(
        timing.median_seconds([one for some in contenders.values() for one in some], device)
    )
    return {
        label: Times(jobs[label].batch * jobs[label].context, *(next(seconds) for _ in some))
        for label, some in contenders.items()
    }


def _contenders(job: Job) -> list[Callable[[], object]]:
    """The step and the loss alone: the library's, then the eager one's; on this process alone."""
    job = replace(job, world=World(job.world.device))
    fixed = job.teacher is not None and job.teacher.fixed
    batch = next(batches(job.stream, job.context, job.batch, job.seed, 0, 1, fixed=fixed))
    inputs, labels, rows = batch
    optimizer = lm_engine.optimizer_of(job, lr=0.0)  # the weights stay
    job.model.train()
    with torch.no_grad():
        outputs = job.outputs(inputs)
        teacher = job.teacher(inputs, rows) if job.teacher else None
    student = outputs[0] if isinstance(outputs, tuple) else outputs
    student.requires_grad_()

    def step(loss_of: lm_engine.Loss) -> Callable[[], object]:
        distiller = lm_engine.Distiller(job, loss_of)
        return lambda: lm_engine.train_step(job, distiller, optimizer, *batch)

    def loss(loss_of: lm_engine.Loss) -> Callable[[], object]:
        def once() -> None:
            student.grad = job.model.tokens.weight.grad = None
            loss_of(job.method, outputs, teacher, labels, job.backend, None).backward()

        return once

    both = (lm_methods.total, lm_methods.eager)  # plain training is PyTorch's own
    return [make(f) for f in both[: 2 if job.teacher else 1] for make in (step, loss)]


def table(results: Results) -> str:
    """The comparison as a Markdown table with lines of context around."""
    settings, teacher = results.settings, results.teacher
    seeds = len(settings["seeds"])
    part = "held-out training" if settings["validate"] else "validation"
    text = settings["text"] or "pydoc_data.topics"
    lines = [
        f"{text}, {results.vocabulary} byte-pair tokens: students {settings['student']} "
        f"({results.parameters[1]:,} parameters), {results.seen:,} training tokens;",
        f"cross-entropy on {results.tokens[1]:,} {part} tokens at the end of training, nats a "
        "token,",
        f"mean ± standard deviation over {seeds} seed{'s'[: seeds != 1]}; gains are paired by seed "
        "(in brackets: seeds that gained)",
    ]
    if teacher is not None:
        lines.append(
            f"teacher {settings['teacher_size']} ({settings['teacher']}): "
            f"{results.parameters[0]:,} parameters, "
            f"{results.tokens[0]:,} training tokens, {teacher.final:.3f} nats"
        )
    lines += ["", *grid(*rows(results))]
    if results.times:
        lines += [
            "",
            "step: one training step with everything in it, the methods in turns; tokens/s: of it",
            "loss: forward + backward of cross-entropy and divergence alone, and its share of the "
            "step;",
            f"eager: likewise with PyTorch's operations ({results.device}, threads: "
            f"{torch.get_num_threads()})",
        ]
    return "\n".join(lines)


def rows(results: Results) -> tuple[list[str], list[list[str]]]:
    """Head and body of the table; columns that would be empty are left out."""
    head = ["method", "loss", f"gain over {results.base or 'ce'}", "tokens/s", "step ms"]
    head += ["loss ms (share)", "eager ms (share)"]
    body = []
    for method in results.students:
        row = [method, "{:.3f} ± {:.3f}".format(*spread(results.final(method)))]
        row.append(paired(results.gains(method), digits=3))
        times = results.times.get(method)
        if times is None:
            row += ["-"] * 4
        else:
            row += [f"{times.tokens / times.step:,.0f}", f"{1e3 * times.step:.1f}"]
            row.append(f"{1e3 * times.loss:.1f} ({times.share:.0%})")
            share = times.eager_share
            row.append(f"{1e3 * (times.eager_loss or 0):.1f} ({share:.0%})" if share else "-")
        body.append(row)
    kept = [i for i in range(len(head)) if i < 2 or any(row[i] != "-" for row in body)]
    return [head[i] for i in kept], [[row[i] for i in kept] for row in body]


def write(results: Results, folder: Path) -> None:
    """results.json: "validation" by method and seed, then all that the comparison recorded."""
    content = {
        **versions(),
        "validation": {
            method: {seed: history.final for seed, history in found.items()}
            for method, found in results.students.items()
        },
        "gains": {
            method: gains
            for method in results.students
            if (gains := results.gains(method)) is not None
        },
        "share_of_the_loss": {
            method: {"kdkernels": times.share, "eager": times.eager_share}
            for method, times in results.times.items()
        },
        "tokens_a_second": {m: times.tokens / times.step for m, times in results.times.items()},
        **asdict(results),
    }
    write_json(content, folder / "results.json")

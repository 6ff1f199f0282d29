"""Training of one language model: the loop, its checkpoints, and what torchrun needs."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import checkpoints
import lm_methods
import optimizing
import torch
import torch.nn.functional as F
from lm_data import IGNORED, batches
from lm_methods import Method
from lm_models import Decoder
from lm_teachers import Given, Teacher
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm
from world import World

Loss = Callable[[Method, Any, Given | None, Tensor, str | None, Tensor | None], Tensor]

CLIP = 1.0
"""Norm to which gradients are clipped."""
WARMUP = 0.1
"""Share of the steps over which the learning rate grows."""


@dataclass(frozen=True)
class Job:
    """One network to train: a teacher (no ``teacher`` of its own) or a student."""

    name: str
    """Of its checkpoint and of its line in the output."""
    method: Method
    seed: int
    model: Decoder
    stream: Tensor
    """The tokens to train on, one document after the other."""
    held: tuple[Tensor, Tensor]
    """Inputs and labels to evaluate on."""
    context: int
    steps: int
    batch: int
    lr: float
    weight_decay: float
    evaluate_every: int
    backend: str | None
    settings: Mapping[str, Any]
    """What the result depends on; a checkpoint made with other settings is refused."""
    teacher: Teacher | None = None
    world: World = World(torch.device("cpu"))  # noqa: RUF009 - frozen

    def outputs(self, inputs: Tensor) -> Any:
        """What the loss takes of the student: logits, or hidden states and the head's weight."""
        if self.teacher is not None and self.teacher.form == "head":
            return self.model.hidden(inputs), self.model.tokens.weight
        return self.model(inputs)


@dataclass
class History:
    """One entry for every ``evaluate_every`` steps, and one for the last."""

    step: list[int] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    """What training minimises, mean over the steps since the entry before."""
    validation: list[float] = field(default_factory=list)
    """Cross-entropy on the held-out text, nats a token."""
    seconds: list[float] = field(default_factory=list)
    """Of a training step."""

    @property
    def final(self) -> float:
        """Validation loss at the end of training, not at its best."""
        return self.validation[-1]


def optimizer_of(job: Job, lr: float) -> torch.optim.Optimizer:
    groups = optimizing.groups(job.model, job.weight_decay)
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)


class Distiller(nn.Module):
    """Network and loss in one forward, so that DDP sees every gradient."""

    def __init__(self, job: Job, loss_of: Loss = lm_methods.total) -> None:
        super().__init__()
        self.model, self.job, self.loss_of = job.model, job, loss_of

    def forward(
        self, inputs: Tensor, labels: Tensor, teacher: Given | None, items: Tensor | None
    ) -> Tensor:
        job = self.job
        return self.loss_of(job.method, job.outputs(inputs), teacher, labels, job.backend, items)


def train_step(
    job: Job,
    distiller: nn.Module,
    optimizer: torch.optim.Optimizer,
    inputs: Tensor,
    labels: Tensor,
    rows: Tensor,
) -> Tensor:
    """Everything that a step does. Every process has the whole batch's tokens and takes its share
    of the sequences. DDP averages over the processes: each divides by the batch's labels over their
    number, so that the step is that of one process."""
    world, items = job.world, None
    if world.size > 1:
        items = (labels != IGNORED).sum() / world.size
        inputs, labels, rows = (x[world.rank :: world.size] for x in (inputs, labels, rows))
    teacher = None if job.teacher is None else job.teacher(inputs, rows)
    loss: Tensor = distiller(inputs, labels, teacher, items)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(job.model.parameters(), CLIP)
    optimizer.step()
    return loss.detach()


def fit(job: Job, folder: Path) -> History:
    """Train ``job.model`` in place, or finish what an earlier call left under ``folder``."""
    device, path = job.stream.device, folder / f"{job.name.replace(':', '-')}.pt"
    job.model.to(device)
    optimizer = optimizer_of(job, job.lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: optimizing.cosine(step, job.steps, int(WARMUP * job.steps))
    )
    parts = {"model": job.model, "optimizer": optimizer, "schedule": schedule}
    history = History()
    distiller: nn.Module = Distiller(job)
    if job.world.size > 1:
        distiller = DistributedDataParallel(distiller)
    job.world.barrier()  # nobody reads while the main process still writes
    if path.exists():
        history = History(**checkpoints.restore(path, dict(job.settings), parts, device))
    start = history.step[-1] if history.step else 0
    bar = tqdm(
        total=job.steps,
        initial=start,
        desc=job.name,
        unit="step",
        disable=None if job.world.main else True,  # None: where the output is no terminal
        leave=False,
        dynamic_ncols=True,
        mininterval=0.5,
    )
    with bar:
        for first in range(start, job.steps, job.evaluate_every):
            last = min(first + job.evaluate_every, job.steps)
            loss, seconds = _train(job, distiller, optimizer, schedule, first, last, bar)
            history.step.append(last)
            history.loss.append(loss)
            history.seconds.append(seconds)
            history.validation.append(evaluate(job.model, job.held, job.world))
            bar.set_postfix(validation=f"{history.final:.3f}")
            if job.world.main:
                checkpoints.save(path, dict(job.settings), history, parts)
    job.world.barrier()
    job.model.eval()
    return history


def _train(
    job: Job,
    distiller: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    first: int,
    last: int,
    bar: tqdm[Any],
) -> tuple[float, float]:
    """Mean loss and seconds a step; the device is asked for numbers once, at the end."""
    job.model.train()
    if job.teacher is not None:
        job.teacher.model.eval()
    total = torch.zeros((), device=job.stream.device)
    begin = time.perf_counter()
    with torch.random.fork_rng():
        # Dropout starts anew with every part that a checkpoint ends: a resumed run draws the same.
        of = (job.name, first, job.world.rank) if job.world.rank else (job.name, first)
        torch.manual_seed(zlib.crc32(repr(of).encode()))
        how = (job.context, job.batch, job.seed, first, last)
        fixed = job.teacher is not None and job.teacher.fixed
        for batch in batches(job.stream, *how, fixed=fixed):
            total += train_step(job, distiller, optimizer, *batch)
            schedule.step()
            bar.update()
    mean = job.world.total(total).item() / (last - first) / job.world.size
    return mean, (time.perf_counter() - begin) / (last - first)


def evaluate(model: Decoder, held: tuple[Tensor, Tensor], world: World, batch: int = 32) -> float:
    """Cross-entropy of the held-out text, nats a token; the processes share its windows."""
    model.eval()
    total = torch.zeros((), device=held[0].device)
    own = [part[world.rank :: world.size] for part in held]
    with torch.inference_mode():
        for inputs, labels in zip(*(x.split(batch) for x in own), strict=True):
            total += F.cross_entropy(
                model(inputs).flatten(0, 1),
                labels.flatten(),
                ignore_index=IGNORED,
                reduction="sum",
            )
    return world.total(total).item() / int((held[1] != IGNORED).sum())

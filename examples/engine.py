"""Training of one network: the loop, its checkpoints, and what torchrun needs."""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import checkpoints
import optimizing
import torch
import torch.distributed as dist
import torch.nn.functional as F
from data import Data
from extras import Prepared
from models import Output, ResNet
from recipes import Recipe
from terms import Step
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm
from world import World


@dataclass(frozen=True)
class Job:
    """One network to train: a teacher (no ``teacher`` of its own) or a student."""

    name: str
    """Of its checkpoint and of its line in the output: different for every run of a comparison."""
    recipe: Recipe
    options: dict[str, float]
    seed: int
    model: ResNet
    data: Data
    epochs: int
    batch: int
    lr: float
    weight_decay: float
    amp: str | None
    backend: str | None
    settings: dict[str, Any]
    """What the result depends on; a checkpoint made with other settings is refused."""
    teacher: ResNet | None = None
    evaluate_every: int = 1
    global_batch: bool = False
    """Whether DIST's columns are those of all processes' images."""


@dataclass
class History:
    """Per epoch training loss and seconds a step; accuracy after the epochs that are evaluated."""

    loss: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    evaluated: list[int] = field(default_factory=list)
    """The epochs, from 1, that the accuracies belong to; the last one is always among them."""

    @property
    def final(self) -> float:
        """Accuracy at the end of training (not of the best epoch)."""
        return self.accuracy[-1]


class Distiller(nn.Module):
    """Student, extra modules and loss in one forward, so that DDP sees every gradient."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        self.student = job.model
        build = job.recipe.extra
        self.extra: nn.Module | None = None
        if build is not None and job.teacher is not None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(job.seed)
                self.extra = build(job.model, job.teacher)
        self.job = job

    def forward(
        self, images: Tensor, target: Tensor, teacher: Output | None, progress: float
    ) -> Tensor:
        job = self.job
        student: Output = self.student(images)
        # Times 0, not left out: DDP waits for the gradient of every parameter.
        weight = job.options["ce"] if progress > job.options.get("stage1", 0.0) else 0.0
        loss = weight * F.cross_entropy(student.logits, target)
        if job.recipe.term is not None and teacher is not None:
            step = Step(
                student, teacher, target, progress, job.options, job.backend, self.extra, images,
                dist.group.WORLD if job.global_batch else None,
            )  # fmt: skip
            loss = loss + job.recipe.term(step)
        return loss

    def prepare(self) -> None:
        """What the extra module learns before the training starts."""
        job = self.job
        if isinstance(self.extra, Prepared) and job.teacher is not None:
            self.extra.prepare(job.teacher, job.data, job.batch, job.seed, job.options)


def fit(
    job: Job, world: World, folder: Path, *, save_every: int = 10, quiet: bool = False
) -> History:
    """Train ``job.model`` in place, or finish what an earlier call left under ``folder``.

    ``quiet``: without a progress bar.
    """
    device, path = world.device, folder / f"{job.name.replace(':', '-')}.pt"
    job.model.to(device)
    distiller = Distiller(job).to(device)
    optimizer = torch.optim.SGD(
        optimizing.groups(distiller, job.weight_decay), lr=job.lr, momentum=0.9, nesterov=True
    )
    steps = job.data.steps(job.batch, world.size)
    schedule = _schedule(optimizer, job, steps)
    scaler = torch.amp.GradScaler(device.type, enabled=job.amp == "fp16")
    parts = {"model": distiller, "optimizer": optimizer, "schedule": schedule, "scaler": scaler}

    history = History()
    world.barrier()  # nobody reads while the main process still writes
    if path.exists():
        history = History(**checkpoints.restore(path, job.settings, parts, device))
    else:
        distiller.prepare()
    start = len(history.loss)
    if start == job.epochs:
        return history

    wrapped: nn.Module = distiller
    if world.size > 1:
        wrapped = DistributedDataParallel(distiller)
    bar = tqdm(
        total=job.epochs * steps,
        initial=start * steps,
        desc=job.name,
        unit="step",
        disable=None if world.main and not quiet else True,  # None: where the output is no terminal
        leave=False,
        dynamic_ncols=True,
        mininterval=0.5,
    )
    with bar:
        for epoch in range(start, job.epochs):
            loss, seconds = _train_epoch(
                job, world, wrapped, optimizer, schedule, scaler, epoch, bar
            )
            done = epoch + 1
            history.loss.append(loss)
            history.seconds.append(seconds)
            if done % job.evaluate_every == 0 or done == job.epochs:
                history.accuracy.append(evaluate(job.model, job.data, world))
                history.evaluated.append(done)
            bar.set_postfix(loss=f"{loss:.3f}")
            if world.main and (done % save_every == 0 or done == job.epochs):
                checkpoints.save(path, job.settings, history, parts)
    world.barrier()
    return history


def _train_epoch(
    job: Job,
    world: World,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    scaler: torch.amp.GradScaler,
    epoch: int,
    bar: tqdm[Any],
) -> tuple[float, float]:
    """Mean loss and seconds a step; the device is asked for numbers once, at the end."""
    model.train()
    if job.teacher is not None:
        job.teacher.eval()
    begin = time.perf_counter()
    total, steps = torch.zeros((), device=world.device), 0
    batches: Iterable[tuple[Tensor, Tensor]] = job.data.epoch(
        job.batch, job.seed, epoch, world.rank, world.size
    )
    for images, target in batches:
        teacher = None
        with autocast(world.device, job.amp):
            if job.teacher is not None and job.recipe.term is not None:
                with torch.no_grad():
                    teacher = job.teacher(images)
            loss = model(images, target, teacher, (epoch + 1) / job.epochs)
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        if job.options["clip"]:
            scaler.unscale_(optimizer)
            # Not the module's: what a preparation trained keeps its last gradients.
            trained = (p for group in optimizer.param_groups for p in group["params"])
            nn.utils.clip_grad_norm_(trained, job.options["clip"])
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
        total += loss.detach()
        steps += 1
        bar.update()
    mean = world.total(total).item() / steps / world.size
    return mean, (time.perf_counter() - begin) / steps


def evaluate(model: ResNet, data: Data, world: World, batch: int = 256) -> float:
    """Accuracy in percent on the evaluation split, which the processes share."""
    model.eval()
    if world.size > 1:  # batch-norm statistics: those of the main process
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
    images = data.test_images[world.rank :: world.size]
    targets = data.test_targets[world.rank :: world.size]
    right = torch.zeros((), dtype=torch.int64, device=world.device)
    with torch.inference_mode():
        for some, target in zip(images.split(batch), targets.split(batch), strict=True):
            right += (model(some).logits.argmax(1) == target).sum()
    return 100.0 * world.total(right).item() / len(data.test_targets)


def autocast(device: torch.device, amp: str | None) -> AbstractContextManager[Any]:
    if amp is None:
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16 if amp == "bf16" else torch.float16)


def _schedule(
    optimizer: torch.optim.Optimizer, job: Job, steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """A cosine to zero after a linear warm-up; one for each stage where a method has two."""
    total = job.epochs * steps
    first = int(job.options.get("stage1", 0.0) * job.epochs) * steps
    warmup = int(job.options["lr_warmup"] * total)

    def factor(step: int) -> float:
        begin, end = (0, first) if step < first else (first, total)
        return optimizing.cosine(step - begin, end - begin, warmup)

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)

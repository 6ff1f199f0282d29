"""Random inputs of a loss at a workload, in the order of its arguments."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from kdkernels.registry import LossSpec

from .shapes import Workload

Inputs = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]
"""The student's tensors, which get a gradient, and the constants that follow them."""


def _pair(shape: tuple[int, ...], generator: Generator) -> tuple[Tensor, Tensor]:
    """A teacher, and a student that has learnt some of it."""
    teacher = torch.randn(shape, generator=generator) * 3
    return 0.5 * teacher + torch.randn(shape, generator=generator), teacher


def _usual(spec: LossSpec, workload: Workload, generator: Generator) -> Inputs:
    """Student and teacher of one shape, and class indices if the loss or the workload has them."""
    shape = workload.shape
    student, teacher = _pair(shape, generator)
    if not spec.needs_target and workload.ignored is None:
        return (student,), (teacher,)
    rows = shape[:1] if workload.features else (shape[0], *shape[2:])
    target = torch.randint(workload.classes or shape[1], rows, generator=generator)
    if workload.ignored:
        order = torch.randperm(target.numel(), generator=generator)
        target.view(-1)[order[: round(workload.ignored * target.numel())]] = -100
    return (student,), (teacher, target)


def _factors(spec: LossSpec, workload: Workload, generator: Generator) -> Inputs:
    """IE-KD: a factor that inherits, one that explores, and the teacher's."""
    inheritance, teacher = _pair(workload.shape, generator)
    return (inheritance, torch.randn(workload.shape, generator=generator)), (teacher,)


def _classifier(spec: LossSpec, workload: Workload, generator: Generator) -> Inputs:
    """REFILLED's second stage: logits; the teacher's embeddings, class centres and targets."""
    samples, classes = workload.shape
    width = workload.width or classes
    student = torch.randn(samples, classes, generator=generator) * 3
    teacher = torch.randn(samples, width, generator=generator) * 3
    centers = F.normalize(torch.randn(classes, width, generator=generator))
    return (student,), (teacher, centers, torch.randint(classes, (samples,), generator=generator))


def _sampled(spec: LossSpec, workload: Workload, generator: Generator) -> Inputs:
    """Logits; a sampled class of each row and the teacher's log-probability of it."""
    shape = workload.shape
    student, teacher = _pair(shape, generator)
    ids = torch.randint(shape[1], (shape[0], *shape[2:]), generator=generator)
    logprob = teacher.log_softmax(1).gather(1, ids.unsqueeze(1)).squeeze(1)
    return (student,), (ids, logprob)


def _sparse(spec: LossSpec, workload: Workload, generator: Generator) -> Inputs:
    """Logits; the teacher's 64 likeliest classes of each row and their log-probabilities."""
    shape = workload.shape
    student, teacher = _pair(shape, generator)
    logprob, ids = teacher.log_softmax(1).movedim(1, -1).topk(min(64, shape[1] - 1))
    return (student,), (ids, logprob)


_SPECIAL: dict[str, Callable[[LossSpec, Workload, Generator], Inputs]] = {
    "iekd": _factors,
    "local_classifier": _classifier,
    "sampled_kl": _sampled,
    "topk_kd": _sparse,
}


def make(spec: LossSpec, workload: Workload) -> Inputs:
    """The same float32 tensors on the CPU each time."""
    generator = torch.Generator().manual_seed(0)
    return _SPECIAL.get(spec.name, _usual)(spec, workload, generator)

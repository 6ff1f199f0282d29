"""The losses of the methods, as ``recipes.py`` names them: here the library is called."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch.nn.functional as F
from models import Output
from torch import Tensor, nn

from kdkernels.functional import (
    aekt_loss,
    dist_loss,
    dkd_loss,
    iekd_loss,
    kd_loss,
    local_classifier_loss,
    tuple_matching_loss,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Step:
    """What a distillation term may look at in one training step."""

    student: Output
    teacher: Output
    target: Tensor
    progress: float
    """Share of the run that is done at the end of this epoch, in (0, 1]."""
    options: Mapping[str, float]
    backend: str | None
    extra: nn.Module | None
    images: Tensor | None = None
    group: ProcessGroup | None = None
    """Whose ranks' images together are the batch; None: this process's."""


def kd(step: Step) -> Tensor:
    o = step.options
    return kd_loss(
        step.student.logits,
        step.teacher.logits,
        o["temperature"],
        standardize=bool(o["standardize"]),
        loss_weight=o["weight"],
        backend=step.backend,
    )


def _ramp(step: Step) -> float:
    """DKD's linear warm-up of the loss's weight."""
    warmup = step.options["warmup"]
    return min(1.0, step.progress / warmup) if warmup else 1.0


def dkd(step: Step) -> Tensor:
    o = step.options
    return dkd_loss(
        step.student.logits,
        step.teacher.logits,
        step.target,
        o["alpha"],
        o["beta"],
        o["temperature"],
        loss_weight=o["weight"] * _ramp(step),
        backend=step.backend,
    )


def aekt(step: Step) -> Tensor:
    """Reconstructed from the abstract; the paper's exact formula was not available."""
    o = step.options
    return aekt_loss(
        step.student.distilled,
        step.teacher.logits,
        step.target,
        o["alpha"],
        o["beta"],
        o["temperature"],
        o["kappa"],
        o["ratio_max"],
        loss_weight=o["weight"] * _ramp(step),
        backend=step.backend,
    )


def dist(step: Step) -> Tensor:
    o = step.options
    return dist_loss(
        step.student.logits,
        step.teacher.logits,
        o["beta"],
        o["gamma"],
        o["tau"],
        loss_weight=o["weight"] * _ramp(step),
        process_group=step.group,
        backend=step.backend,
    )


def iekd(step: Step) -> Tensor:
    assert step.extra is not None
    o = step.options
    inheritance, exploration, factor = step.extra(step.student.features, step.teacher.features)
    loss = iekd_loss(
        inheritance,
        exploration,
        factor,
        o["inheritance"],
        o["exploration"],
        backend=step.backend,
    )
    if o["kd"]:
        loss = loss + kd_loss(
            step.student.logits,
            step.teacher.logits,
            o["temperature"],
            loss_weight=o["kd"],
            backend=step.backend,
        )
    return loss


def iedml(step: Step) -> Tensor:
    """Both students' mutual losses and the peer's cross-entropy; the teacher is not used."""
    assert step.extra is not None
    o = step.options
    logits, mine, theirs = step.extra(step.images, step.student.features)
    loss = o["ce"] * F.cross_entropy(logits, step.target)
    for own, other in ((mine, theirs), (theirs, mine)):
        loss = loss + own.reconstruction
        loss = loss + iekd_loss(
            own.inheritance,
            own.exploration,
            other.factor,
            o["inheritance"],
            o["exploration"],
            backend=step.backend,
        )
    for own, other in ((step.student.logits, logits), (logits, step.student.logits)):
        loss = loss + kd_loss(
            own, other.detach(), 1.0, loss_weight=o["weight"], backend=step.backend
        )
    return loss


def refilled(step: Step) -> Tensor:
    assert step.extra is not None
    o = step.options
    if step.progress <= o["stage1"]:
        return tuple_matching_loss(
            step.student.embedding,
            step.teacher.embedding,
            step.target,
            o["tuple_temperature"],
            o["margin"],
            loss_weight=o["tuple_weight"],
            backend=step.backend,
        )
    return local_classifier_loss(
        step.student.logits,
        step.teacher.embedding,
        step.extra(),
        step.target,
        o["temperature"],
        loss_weight=o["weight"],
        backend=step.backend,
    )

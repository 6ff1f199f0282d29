"""Modules that a method needs beside the student: encoders, centres, a peer.

Parameters train with the student unless they ask for no gradient; all are dropped in the end.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import NamedTuple

import torch
from data import Data
from models import Output, ResNet
from torch import Tensor, nn

from kdkernels.losses import ClassCenters
from kdkernels.nn import FactorAutoEncoder, FactorEncoder, reconstruction_loss, split_channels


class Prepared(nn.Module):
    """An extra module that learns something from the frozen teacher before the training starts."""

    def prepare(
        self, teacher: ResNet, data: Data, batch: int, seed: int, options: Mapping[str, float]
    ) -> None:
        """A function of its arguments alone, so that a resumed run finds the same."""
        raise NotImplementedError


class Factors(Prepared):
    """IE-KD: the teacher's factor auto-encoder, frozen, and an encoder for each student half."""

    def __init__(self, student: ResNet, teacher: ResNet) -> None:
        super().__init__()
        factor, half = teacher.width // 2, student.width // 2
        self.teacher = FactorAutoEncoder(teacher.width, factor).requires_grad_(False)
        self.inheritance = FactorEncoder(half, factor)
        self.exploration = FactorEncoder(student.width - half, factor)

    def train(self, mode: bool = True) -> Factors:
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        inherited, explored = split_channels(student)
        factor = self.teacher.encoder(teacher).detach()
        return self.inheritance(inherited), self.exploration(explored), factor

    def prepare(
        self, teacher: ResNet, data: Data, batch: int, seed: int, options: Mapping[str, float]
    ) -> None:
        coder = self.teacher.requires_grad_(True).train()
        optimizer = torch.optim.SGD(
            coder.parameters(), options["coder_lr"], 0.9, weight_decay=5e-4, nesterov=True
        )
        teacher.eval()
        for epoch in range(int(options["coder_epochs"])):
            for images, _ in data.epoch(batch, seed, epoch):
                with torch.no_grad():
                    features = teacher(images).features
                optimizer.zero_grad()
                reconstruction_loss(features, coder(features)[1]).backward()
                optimizer.step()
        coder.requires_grad_(False).eval()


class Centers(Prepared):
    """REFILLED: where the teacher's embedding puts the student's classes, of all its images."""

    def __init__(self, student: ResNet, teacher: ResNet) -> None:
        super().__init__()
        self.register_buffer("centers", torch.zeros(student.classes, teacher.width))

    def forward(self) -> Tensor:
        return self.get_buffer("centers")

    def prepare(
        self, teacher: ResNet, data: Data, batch: int, seed: int, options: Mapping[str, float]
    ) -> None:
        centers = self()
        found = ClassCenters(*centers.shape, device=centers.device)
        teacher.eval()
        with torch.no_grad():
            for images, target in zip(
                data.images.split(1024), data.targets.split(1024), strict=True
            ):
                found.update(teacher(images).embedding, target)
        centers.copy_(found.centers())

    def accuracy(self, teacher: ResNet, data: Data) -> float:
        """Of the classifier that these centres induce: what the local classifier can teach."""
        teacher.eval()
        right = 0
        with torch.inference_mode():
            for images, target in zip(
                data.test_images.split(256), data.test_targets.split(256), strict=True
            ):
                scores = teacher(images).embedding @ self().T
                right += int((scores.argmax(1) == target).sum())
        return 100.0 * right / len(data.test_targets)


class View(NamedTuple):
    """What one of two mutual students shows: its halves' factors, and its factor for the other."""

    inheritance: Tensor
    exploration: Tensor
    factor: Tensor
    """Detached: the other learns from it, it does not learn from the other through it."""
    reconstruction: Tensor


class Viewer(nn.Module):
    """The factor auto-encoder and the two encoders of one of two mutual students."""

    def __init__(self, width: int) -> None:
        super().__init__()
        factor, half = width // 2, width // 2
        self.coder = FactorAutoEncoder(width, factor)
        self.inheritance = FactorEncoder(half, factor)
        self.exploration = FactorEncoder(width - half, factor)

    def forward(self, features: Tensor) -> View:
        inherited, explored = split_channels(features)
        constant = features.detach()  # the auto-encoder describes the network, it does not bend it
        factor, rebuilt = self.coder(constant)
        return View(
            self.inheritance(inherited),
            self.exploration(explored),
            factor.detach(),
            reconstruction_loss(constant, rebuilt),
        )


class Peer(nn.Module):
    """IE-DML: a second student of other initial weights, and the encoders of both."""

    def __init__(self, student: ResNet, teacher: ResNet) -> None:
        super().__init__()
        # The views first: at the same place of the random stream the peer would be the student.
        self.views = nn.ModuleList(Viewer(student.width) for _ in range(2))
        self.peer = copy.deepcopy(student)
        for module in self.peer.modules():
            reset = getattr(module, "reset_parameters", None)
            if reset is not None:
                reset()

    def forward(self, images: Tensor, features: Tensor) -> tuple[Tensor, View, View]:
        """The peer's logits, and what the student and the peer show."""
        output: Output = self.peer(images)
        return output.logits, self.views[0](features), self.views[1](output.features)

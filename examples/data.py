"""Data held as tensors on the training device, with augmentation in batches.

The data sets fit in memory, so an epoch is a permutation and some indexing: no worker processes,
and every batch is a function of (seed, epoch, process) alone, which makes resuming exact.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Data:
    """A training and an evaluation split, standardised, on one device."""

    images: Tensor
    targets: Tensor
    test_images: Tensor
    test_targets: Tensor
    classes: int
    shift: int
    """Random shifts by up to this many pixels."""
    flip: bool
    """Random mirroring (wrong for digits)."""
    stride: int = 1
    """Of the network's first convolution; 2 halves images that are larger than they need be."""

    @property
    def channels(self) -> int:
        return self.images.shape[1]

    def to(self, device: torch.device) -> Data:
        return replace(
            self,
            images=self.images.to(device),
            targets=self.targets.to(device),
            test_images=self.test_images.to(device),
            test_targets=self.test_targets.to(device),
        )

    def stamp(self) -> int:
        """A checksum of all images and labels: a checkpoint belongs to them."""
        found = 0
        for tensor in (self.images, self.targets, self.test_images, self.test_targets):
            found = zlib.crc32(tensor.cpu().contiguous().numpy().data, found)
        return found

    def subset(self, count: int | None, seed: int) -> Data:
        """A balanced part of the training split, ``count`` images of it, drawn by ``seed``."""
        if count is None or count >= len(self.targets):
            return self
        order = torch.randperm(len(self.targets), generator=generator("subset", seed))
        targets = self.targets.cpu()[order]
        rank = torch.empty_like(targets)  # position of an image among those of its class
        for label in range(self.classes):
            where = (targets == label).nonzero().flatten()
            rank[where] = torch.arange(len(where))
        keep = order[rank.argsort(stable=True)[:count]].to(self.targets.device)
        return replace(self, images=self.images[keep], targets=self.targets[keep])

    def validation(self, fraction: float = 0.4, most: int = 10000) -> Data:
        """Evaluate on a fixed part of the training split, which is then not trained on."""
        order = torch.randperm(len(self.targets), generator=generator("validation"))
        held, kept = order.tensor_split([min(most, int(len(order) * fraction))])
        held, kept = held.to(self.targets.device), kept.to(self.targets.device)
        return replace(
            self,
            images=self.images[kept],
            targets=self.targets[kept],
            test_images=self.images[held],
            test_targets=self.targets[held],
        )

    def only(self, labels: Sequence[int]) -> Data:
        """The images of some classes, which are numbered from 0 in this order."""
        number = torch.full((self.classes,), -1, device=self.targets.device)
        number[list(labels)] = torch.arange(len(labels), device=number.device)
        train, test = number[self.targets] >= 0, number[self.test_targets] >= 0
        return replace(
            self,
            images=self.images[train],
            targets=number[self.targets[train]],
            test_images=self.test_images[test],
            test_targets=number[self.test_targets[test]],
            classes=len(labels),
        )

    def steps(self, batch: int, world: int) -> int:
        """Batches in an epoch; ``batch`` counts the images of all processes together."""
        return max(1, len(self.targets) // world // max(1, batch // world))

    def epoch(
        self, batch: int, seed: int, epoch: int, rank: int = 0, world: int = 1
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Augmented batches of this process: the processes share one permutation."""
        order = torch.randperm(len(self.targets), generator=generator("order", seed, epoch))
        mine = order[: len(order) // world * world][rank::world].to(self.targets.device)
        dice = generator("augment", seed, epoch, rank)
        size = max(1, batch // world)
        for step in range(self.steps(batch, world)):
            rows = mine[step * size : (step + 1) * size]
            yield self._augment(self.images[rows], dice), self.targets[rows]

    def _augment(self, images: Tensor, dice: torch.Generator) -> Tensor:
        count, _, height, width = images.shape
        device = images.device
        if self.shift:
            pad = self.shift
            moves = torch.randint(2 * pad + 1, (2, count, 1), generator=dice).to(device)
            rows = moves[0] + torch.arange(height, device=device)
            columns = moves[1] + torch.arange(width, device=device)
            padded = torch.nn.functional.pad(images, [pad] * 4, mode="replicate")
            which = torch.arange(count, device=device)[:, None, None]
            picked = padded[which, :, rows[:, :, None], columns[:, None, :]]
            images = picked.permute(0, 3, 1, 2).contiguous()
        if self.flip:
            mirror = (torch.rand(count, 1, 1, 1, generator=dice) < 0.5).to(device)
            images = torch.where(mirror, images.flip(3), images)
        return images


def generator(*keys: object) -> torch.Generator:
    """A random generator that depends on nothing but ``keys``."""
    return torch.Generator().manual_seed(zlib.crc32(repr(keys).encode()))

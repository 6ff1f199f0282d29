#!/usr/bin/env python
"""DIST between dense predictions, of the pixels that have a label.

    python examples/segmentation.py

A scene is 20 x 20 pixels, on which three of scikit-learn's handwritten digits lie. A pixel of ink
has the class of its digit, one of paper is background, and one in between is neither: it is
ignored, as the borders of objects are in segmentation's data sets. Whoever passes ``labels``
leaves it out of DIST too, of its rows and of its columns. The student sees 40 scenes, the teacher
1000; the score is the mean intersection over union of the eleven classes.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence

import small
import torch
import torch.nn.functional as F
from data import generator
from loaders import digits
from torch import Tensor, nn
from tqdm import tqdm

from kdkernels.functional import dist_loss

METHODS = ("ce", "dist, all pixels", "dist, counted pixels")
SIDE, IGNORED, PAPER = 20, 255, 10


def scenes(images: Tensor, digit: Tensor, count: int, *keys: object) -> tuple[Tensor, Tensor]:
    """Images (count, 1, H, W) and labels (count, H, W): real ink at random places."""
    dice = generator("scenes", *keys)
    paper = images.min()
    canvas = paper.expand(count, 1, SIDE, SIDE).clone()
    labels = torch.full((count, SIDE, SIDE), PAPER)
    for scene in range(count):
        for k in torch.randint(len(digit), (3,), generator=dice).tolist():
            y, x = torch.randint(SIDE - 8, (2,), generator=dice).tolist()
            place = (scene, slice(y, y + 8), slice(x, x + 8))
            ink = images[k, 0] - paper
            given = torch.where(ink > 0.5 * ink.max(), digit[k], IGNORED)
            canvas[:, 0][place] = canvas[:, 0][place].maximum(images[k, 0])
            labels[place] = torch.where(ink > 0.1 * ink.max(), given, labels[place])
    return canvas, labels


def network(width: int) -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, dilation in ((1, 1), (width, 1), (width, 2), (width, 2)):
        layers += [nn.Conv2d(inputs, width, 3, padding=dilation, dilation=dilation)]
        layers += [nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(width, 11, 1))


@functools.cache
def taught(steps: int) -> nn.Module:
    data = digits()
    net = small.seeded(lambda: network(32), "teacher")
    seen = scenes(data.images, data.targets, 1000, "teacher")
    loss = lambda x, y: F.cross_entropy(net(x), y, ignore_index=IGNORED)  # noqa: E731
    small.fit(net, loss, *seen, steps=steps, seed=0, batch=10, lr=0.02)
    return net.requires_grad_(False)


def overlap(net: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Mean intersection over union, in percent."""
    with torch.inference_mode():
        counted = labels != IGNORED
        found, true = net(images).argmax(1)[counted], labels[counted]
    hit = torch.bincount(true[found == true], minlength=11)
    union = torch.bincount(found, minlength=11) + torch.bincount(true, minlength=11) - hit
    return 100.0 * (hit / union.clamp(min=1)).mean().item()


def run(method: str, seed: int, steps: int, bar: tqdm[None]) -> float:
    data, teacher = digits(), taught(steps)
    student = small.seeded(lambda: network(12), "student", seed)

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        s = student(images)
        hard = F.cross_entropy(s, labels, ignore_index=IGNORED)
        if method == "ce":
            return hard
        counted = labels if method == "dist, counted pixels" else None
        return hard + dist_loss(s, teacher(images), labels=counted, ignore_index=IGNORED)

    seen = scenes(data.images, data.targets, 40, "student", seed)
    small.fit(student, loss, *seen, steps=steps, seed=seed, bar=bar, batch=10, lr=0.02)
    return overlap(student, *scenes(data.test_images, data.test_targets, 100, "test"))


def main(argv: Sequence[str] | None = None) -> dict[str, list[float]]:
    return small.compare("segmentation", METHODS, run, "mean IoU, %", argv, steps=300, seeds=3)


if __name__ == "__main__":
    main(sys.argv[1:])

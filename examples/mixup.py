#!/usr/bin/env python
"""DKD on mixed images (mixup: Zhang et al., ICLR 2018; 1710.09412), whose targets are two labels.

    python examples/mixup.py

DKD sets the target class apart, and a mixed image has two. Cross-entropy of the mixed label is the
weighted pair of cross-entropies, and so is DKD of targets that are probabilities. A perceptron sees
60 of scikit-learn's handwritten digits, its teacher 1000; the score is the student's accuracy on
797 other digits.
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

from kdkernels.functional import dkd_loss, kd_loss

METHODS = ("ce", "kd", "dkd, larger share", "dkd, pair")


def perceptron(width: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))


@functools.cache
def taught(steps: int) -> nn.Module:
    """The teacher, which every student has."""
    data = digits()
    net = small.seeded(lambda: perceptron(256), "teacher")

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(net(images), labels)

    small.fit(net, loss, data.images, data.targets, steps=steps, seed=0)
    return net.requires_grad_(False)


def run(method: str, seed: int, steps: int, bar: tqdm[None]) -> float:
    data, teacher = digits().subset(60, seed), taught(steps)
    student = small.seeded(lambda: perceptron(32), "student", seed)
    dice = generator("mixup", seed)

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        count = len(labels)
        share = torch.rand(count, generator=dice)
        order = torch.randperm(count, generator=dice)
        by_image = share[:, None, None, None]
        mixed = by_image * images + (1 - by_image) * images[order]
        both = F.one_hot(labels, 10), F.one_hot(labels[order], 10)
        target = share[:, None] * both[0] + (1 - share[:, None]) * both[1]
        s = student(mixed)
        total = F.cross_entropy(s, target)
        if method == "ce":
            return total
        with torch.no_grad():
            t = teacher(mixed)
        if method == "kd":
            return total + kd_loss(s, t, 4.0)
        larger = torch.where(share > 0.5, labels, labels[order])
        if method == "dkd, larger share":
            return total + dkd_loss(s, t, larger, beta=1.0)
        return total + dkd_loss(s, t, target, beta=1.0)

    small.fit(student, loss, data.images, data.targets, steps=steps, seed=seed, bar=bar)
    with torch.inference_mode():
        right = student(data.test_images).argmax(1) == data.test_targets
    return 100.0 * right.float().mean().item()


def main(argv: Sequence[str] | None = None) -> dict[str, list[float]]:
    return small.compare("mixup", METHODS, run, "accuracy, %", argv, steps=300)


if __name__ == "__main__":
    main(sys.argv[1:])

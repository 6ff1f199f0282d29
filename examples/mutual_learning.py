#!/usr/bin/env python
"""Deep Mutual Learning (Zhang et al., CVPR 2018; 1706.00384): two students teach each other.

    python examples/mutual_learning.py

The paper takes the other student's prediction as a constant, in two losses. With
``teacher_grad=True`` one loss moves both students, which is the derivative of what they minimise
together. 30 of scikit-learn's handwritten digits are labelled, and two perceptrons have to agree
on 1000; the score is their mean accuracy on 797 others.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import small
import torch
import torch.nn.functional as F
from data import generator
from loaders import digits
from torch import Tensor, nn
from tqdm import tqdm

from kdkernels.functional import jsd_loss, kd_loss, mixed_kl_loss


def as_published(a: Tensor, b: Tensor) -> Tensor:
    """KL to either student from the other one, a constant."""
    return kd_loss(a, b.detach(), 1.0) + kd_loss(b, a.detach(), 1.0)


def symmetric(a: Tensor, b: Tensor) -> Tensor:
    """The same value in one call, and the whole of its gradient by both."""
    return mixed_kl_loss(a, b, loss_weight=2.0, teacher_grad=True)


def jensen_shannon(a: Tensor, b: Tensor) -> Tensor:
    """Bounded, and of the size of the others where the students nearly agree."""
    return jsd_loss(a, b, loss_weight=8.0, teacher_grad=True)


MUTUAL: dict[str, Callable[[Tensor, Tensor], Tensor] | None] = {
    "apart": None,
    "dml": as_published,
    "one graph": symmetric,
    "one graph, jsd": jensen_shannon,
}


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def run(method: str, seed: int, steps: int, bar: tqdm[None]) -> float:
    data, dice = digits().subset(30, seed), generator("unlabelled", seed)
    every = digits().images
    nets = nn.ModuleList(small.seeded(perceptron, "student", seed, i) for i in range(2))
    mutual = MUTUAL[method]

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        others = every[torch.randint(len(every), (150,), generator=dice)]
        a, b = (net(torch.cat([images, others])) for net in nets)
        count = len(labels)
        alone = F.cross_entropy(a[:count], labels) + F.cross_entropy(b[:count], labels)
        return alone if mutual is None else alone + mutual(a, b)

    small.fit(nets, loss, data.images, data.targets, steps=steps, seed=seed, bar=bar)
    with torch.inference_mode():
        right = [(net(data.test_images).argmax(1) == data.test_targets).float() for net in nets]
    return 100.0 * torch.cat(right).mean().item()


def main(argv: Sequence[str] | None = None) -> dict[str, list[float]]:
    return small.compare("mutual_learning", [*MUTUAL], run, "accuracy, %", argv, steps=300)


if __name__ == "__main__":
    main(sys.argv[1:])

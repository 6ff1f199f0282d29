#!/usr/bin/env python
"""KD and DIST of sigmoids: for images that have several labels.

    python examples/multi_label.py

A scene is that of ``segmentation.py``, 20 x 20 pixels on which three of scikit-learn's handwritten
digits lie. The question is which digits are there, so that a softmax over the ten would be wrong:
each has a sigmoid of its own. The student sees 150 scenes, the teacher 2000; the score is the mean
average precision of the ten digits on 500 others.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence

import segmentation
import small
import torch
import torch.nn.functional as F
from loaders import digits
from sklearn.metrics import average_precision_score
from torch import Tensor, nn
from tqdm import tqdm

from kdkernels.functional import sigmoid_dist_loss, sigmoid_kd_loss

METHODS = ("bce", "sigmoid kd", "sigmoid dist")


def scenes(images: Tensor, digit: Tensor, count: int, *keys: object) -> tuple[Tensor, Tensor]:
    """Images (count, 1, H, W), and which digits are there: (count, 10) of 0 and 1."""
    canvas, pixels = segmentation.scenes(images, digit, count, *keys)
    return canvas, (pixels.flatten(1).unsqueeze(2) == torch.arange(10)).any(1).float()


def network(width: int) -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, outputs in ((1, width), (width, width), (width, 2 * width), (2 * width, 2 * width)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if inputs == outputs else []
    return nn.Sequential(*layers, nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(2 * width, 10))


@functools.cache
def taught(steps: int) -> nn.Module:
    data = digits()
    net = small.seeded(lambda: network(32), "teacher")
    seen = scenes(data.images, data.targets, 2000, "teacher")
    loss = lambda x, y: F.binary_cross_entropy_with_logits(net(x), y)  # noqa: E731
    small.fit(net, loss, *seen, steps=steps, seed=0)
    return net.requires_grad_(False)


def precision(net: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Mean average precision, in percent."""
    with torch.inference_mode():
        found = net(images).sigmoid()
    return 100.0 * float(average_precision_score(labels.numpy(), found.numpy()))


def run(method: str, seed: int, steps: int, bar: tqdm[None]) -> float:
    data, teacher = digits(), taught(steps)
    student = small.seeded(lambda: network(8), "student", seed)

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        s = student(images)
        hard = F.binary_cross_entropy_with_logits(s, labels)
        if method == "bce":
            return hard
        t = teacher(images)
        if method == "sigmoid kd":  # the mean over the classes, as that of the labels
            return hard + sigmoid_kd_loss(s, t, temperature=2.0, loss_weight=0.1)
        return hard + sigmoid_dist_loss(s, t)

    seen = scenes(data.images, data.targets, 150, "student", seed)
    small.fit(student, loss, *seen, steps=steps, seed=seed, bar=bar)
    return precision(student, *scenes(data.test_images, data.test_targets, 500, "test"))


def main(argv: Sequence[str] | None = None) -> dict[str, list[float]]:
    return small.compare("multi_label", METHODS, run, "mean average precision, %", argv, steps=300)


if __name__ == "__main__":
    main(sys.argv[1:])

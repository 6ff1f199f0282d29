"""One small residual network in several sizes, used for both teachers and students.

``forward`` returns everything a distillation method may ask for: the logits, the last feature map,
its pooled embedding, and the logits to distil where a method keeps them apart from the others.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from data import Data
from torch import Tensor, nn

from kdkernels.nn import TaskSerialization


class Output(NamedTuple):
    """What a network gives: logits (B, K), last feature map (B, C, h, w), embedding (B, C).

    ``logits`` classify: cross-entropy and inference take them. ``distilled`` (B, K) is the same
    tensor, unless the network has a serial head.
    """

    logits: Tensor
    features: Tensor
    embedding: Tensor
    distilled: Tensor


class Size(NamedTuple):
    """Width of the first stage (it doubles at every later one) and residual blocks a stage."""

    width: int
    blocks: int


def size(text: str) -> Size:
    """``"16x2"``: 16 channels in the first stage, 2 blocks a stage."""
    width, _, blocks = text.partition("x")
    if not (width.isdecimal() and blocks.isdecimal() and int(width) and int(blocks)):
        raise ValueError(f"size must be WIDTHxBLOCKS, such as 16x2, got {text}")
    return Size(int(width), int(blocks))


class Block(nn.Module):
    """Two 3x3 convolutions with a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """Three stages; the resolution halves and the width doubles from one to the next."""

    def __init__(self, size: Size, channels: int, classes: int, stride: int = 1) -> None:
        super().__init__()
        widths = [size.width * factor for factor in (1, 2, 4)]
        self.stem = nn.Sequential(
            nn.Conv2d(channels, widths[0], 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(widths[0]),
            nn.ReLU(),
        )
        blocks: list[nn.Module] = []
        inputs = widths[0]
        for stage, width in enumerate(widths):
            for block in range(size.blocks):
                blocks.append(Block(inputs, width, 2 if stage > 0 and block == 0 else 1))
                inputs = width
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(inputs, classes)
        self.serial: nn.Module = nn.Identity()
        self.classes = classes
        self.width = inputs
        """Channels of ``features`` and ``embedding``; extra modules are built from it."""

    def forward(self, images: Tensor) -> Output:
        if images.is_cpu and self.width % 32:
            # Images of one channel may look as if their channels were last. So laid out, and with
            # channels that are no multiple of 8, oneDNN's backward pass writes outside of its
            # memory on CPUs with AVX2 and without AVX-512 (torch 2.13).
            images = images.clone(memory_format=torch.contiguous_format)
        features = self.blocks(self.stem(images))
        embedding = features.mean((2, 3))
        distilled = self.head(embedding)
        return Output(self.serial(distilled), features, embedding, distilled)


def build(text: str, data: Data, seed: int, *, serial: bool = False) -> ResNet:
    """A network whose initial function depends on ``seed`` alone; ``serial`` adds AEKT's head."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ResNet(size(text), data.channels, data.classes, data.stride)
        if serial:
            model.serial = TaskSerialization(data.classes)
        return model


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())

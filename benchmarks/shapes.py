"""The named workloads: the shapes at which people distil, in one table."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Workload:
    """A shape with a name. ``quick`` and ``half`` say in which shorter runs it takes part."""

    name: str
    title: str
    shape: tuple[int, ...]
    quick: bool = False
    half: bool = False

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def size(self) -> str:
        return "x".join(map(str, self.shape))

    @property
    def label(self) -> str:
        return f"{self.title} {self.size}"


WORKLOADS = (
    Workload("cifar100_b64", "CIFAR-100", (64, 100), quick=True),
    Workload("cifar100", "CIFAR-100", (256, 100)),
    Workload("imagenet", "ImageNet", (256, 1000), quick=True),
    Workload("imagenet_b1024", "ImageNet", (1024, 1000), half=True),
    Workload("imagenet21k", "ImageNet-21k", (256, 21841)),
    Workload("llm_32k", "LLM", (256, 32000), quick=True, half=True),
    Workload("llm_128k", "LLM", (128, 128256)),
    Workload("segmentation", "Segmentation", (8, 150, 64, 64)),
)
BY_NAME = {workload.name: workload for workload in WORKLOADS}
MODES = ("forward", "forward_backward")

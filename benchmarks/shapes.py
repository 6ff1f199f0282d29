"""The named workloads: the shapes at which people distil, in one table."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from kdkernels.registry import LossSpec


@dataclass(frozen=True)
class Workload:
    """A shape of the student's tensors with a name, and the losses that are timed at it.

    ``quick`` and ``half`` say in which shorter runs it takes part. Without ``features`` it is one
    of logits, for all losses of logits. With it, it is for the embedding losses that ``losses``
    names, or, naming none, for all of its rank that no other workload names.
    ``classes`` is the number of classes where that is not dim 1, ``width`` the width of the
    teacher's embeddings where that is not the student's. ``floor`` says that reading and writing
    tensors of this shape is what a perfect kernel would have to do, and not pairs or triples of
    rows. ``ignored`` is the share of rows whose label is -100; without it the losses that can do
    without labels get none. ``forward`` says that it is timed without gradients too.
    """

    name: str
    title: str
    shape: tuple[int, ...]
    quick: bool = False
    half: bool = False
    features: bool = False
    losses: tuple[str, ...] = ()
    classes: int | None = None
    width: int | None = None
    floor: bool = True
    ignored: float | None = None
    forward: bool = True

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def size(self) -> str:
        size = "x".join(map(str, self.shape))
        if self.ignored is not None:
            size += f", {self.ignored:.0%} ignored"
        return f"{size}, {self.classes} classes" if self.classes else size

    @property
    def label(self) -> str:
        return f"{self.title} {self.size}"


TOKENS = ("reverse_kl", "mixed_kl", "skew_kl", "jsd", "tv")
"""Losses of the large workloads of tokens: one for each rule and path of the kernels."""

WORKLOADS = (
    Workload("cifar100_b64", "CIFAR-100", (64, 100), quick=True),
    Workload("cifar100", "CIFAR-100", (256, 100)),
    Workload("imagenet", "ImageNet", (256, 1000), quick=True),
    Workload("imagenet_b1024", "ImageNet", (1024, 1000), half=True),
    Workload("imagenet21k", "ImageNet-21k", (256, 21841)),
    Workload("llm_32k", "LLM", (256, 32000), quick=True, half=True),
    Workload("llm_128k", "LLM", (128, 128256)),
    *(
        Workload(
            f"tokens_{name}", "Tokens", (rows, classes), half=True, losses=TOKENS, forward=False,
        )
        for name, rows, classes in (("32k", 1024, 32000), ("128k", 512, 128256))
    ),
    *(
        Workload(
            f"tokens_{name}_masked", "Tokens", (rows, classes), half=True, losses=TOKENS,
            ignored=0.5, forward=False,
        )
        for name, rows, classes in (("32k", 1024, 32000), ("128k", 512, 128256))
    ),
    Workload("segmentation", "Segmentation", (8, 150, 64, 64)),
    Workload(
        "segmentation_masked", "Segmentation", (8, 150, 64, 64), losses=("kd", "dkd", "dist"),
        ignored=1 / 3, forward=False,
    ),
    Workload("retinanet", "RetinaNet", (4, 720, 50, 50), losses=("sigmoid_kd", "sigmoid_dist")),
    Workload("factors", "Factors", (128, 64, 8, 8), True, features=True, losses=("iekd",)),
    *(
        Workload(
            f"tuples_{classes}", "Tuples", (256, 128), quick=classes == 100, features=True,
            losses=("tuple_matching",), classes=classes, floor=False,
        )
        for classes in (10, 100)
    ),
    Workload(
        "local_classes", "Local classes", (256, 100), features=True, losses=("local_classifier",),
        width=128, floor=False,
    ),
    Workload("embeddings", "Embeddings", (128, 512), features=True, floor=False),
    Workload("features", "Features", (64, 128, 16, 16), features=True),
)  # fmt: skip
BY_NAME = {workload.name: workload for workload in WORKLOADS}
MODES = ("forward", "forward_backward")

_NAMED = {name for workload in WORKLOADS for name in workload.losses}


def suits(workload: Workload, spec: LossSpec) -> bool:
    """Whether a loss is timed at a workload; each loss of the registry is at one at least."""
    of_logits = spec.family != "embedding"
    if of_logits or not workload.features:
        named = not workload.losses or spec.name in workload.losses
        return of_logits and not workload.features and named
    assert spec.inputs is not None
    if workload.losses or spec.name in _NAMED:
        return spec.name in workload.losses
    sample = spec.inputs(torch.Generator().manual_seed(0), torch.float32)
    return sample[0].dim() == len(workload.shape)

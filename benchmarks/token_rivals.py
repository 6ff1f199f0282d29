"""What losses of tokens are compared with beside eager and compile: themselves, with a mask, with
the cross-entropy of the labels in the same pass, and with that beside them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels.registry import LossSpec

from .problem import Problem, with_labels
from .shapes import BY_NAME, Workload

HARD_WEIGHT = 0.5
TEMPERATURES = (1.0, 2.0, 4.0, 3.0)
"""At the first three the exponentials of the cross-entropy are powers of the loss's own."""

PAIRS = {
    "masked": ("masked", "ours"),
    "beside": ("beside", "hard_1"),
    **{f"hard_{t:g}": (f"hard_{t:g}", f"alone_{t:g}") for t in TEMPERATURES},
}
"""Rival of a target -> the two times whose quotient it bounds."""

Bodies = dict[str, tuple[Callable[..., Tensor], Problem]]


def masked(workload: Workload) -> Workload:
    """The same shape with some of its rows ignored."""
    return BY_NAME[f"{workload.name}_masked"]


def bodies(
    spec: LossSpec,
    workload: Workload,
    dtype: torch.dtype,
    device: str,
    ours: Callable[..., Tensor],
    names: set[str],
) -> Bodies:
    """The functions of the named times, made of the loss ``ours``, each with its tensors."""
    found: Bodies = {}
    if "masked" in names:
        found["masked"] = with_labels(spec, ours), Problem(spec, masked(workload), dtype, device)
    options = {f"hard_{t:g}": (t, HARD_WEIGHT) for t in TEMPERATURES}
    options |= {f"alone_{t:g}": (t, 0.0) for t in TEMPERATURES}
    labelled = [name for name in names if name in options or name == "beside"]
    if not labelled:
        return found
    problem = Problem(spec, dataclasses.replace(workload, ignored=0.0), dtype, device)

    def beside(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        loss: Tensor = ours(student, teacher, labels)
        return loss + HARD_WEIGHT * F.cross_entropy(student, labels)

    for name in labelled:
        if name == "beside":
            found[name] = beside, problem
            continue
        temperature, weight = options[name]
        function = functools.partial(ours, temperature=temperature, hard_weight=weight)
        found[name] = function, problem
    return found

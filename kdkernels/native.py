"""Lazy handle on the compiled extension ``kdkernels._C``: what it offers, or why it is absent.

Nothing is ever compiled here. The extension is built when the package is installed on a machine
with a C++ compiler; without it the package is pure Python and ``reason()`` says so.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

BUILD_COMMAND = "pip install --no-build-isolation --force-reinstall --no-deps kdkernels"


@functools.cache
def _load() -> tuple[ModuleType | None, str]:
    if os.environ.get("KDKERNELS_DISABLE_NATIVE"):
        return None, "KDKERNELS_DISABLE_NATIVE is set"
    try:
        from kdkernels import _C
    except ImportError as error:
        return None, f"the extension kdkernels._C did not load ({error}); build it: {BUILD_COMMAND}"
    return _C, ""


def extension() -> ModuleType | None:
    """The pybind11 module, or None."""
    return _load()[0]


def reason() -> str:
    """Why the extension is absent; empty where it is loaded."""
    return _load()[1]


def has_rule(device_type: str, family: str, rule: str) -> bool:
    """Whether compiled code runs this rule for tensors of this device."""
    module = extension()
    return module is not None and device_type == "cpu" and rule in module.rules(family)


def scale_(gradient: Tensor, upstream: Tensor) -> Tensor:
    """Scale a private gradient in place; reading the factor on the host is free on the CPU."""
    factor = upstream.item()
    return gradient if factor == 1.0 else gradient.mul_(factor)


def eager_forward(family: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """The forward kernel of a family with the least host time."""
    return getattr(torch.ops.kdkernels, family).default

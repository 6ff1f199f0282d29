"""The kernels of each backend, by family; a backend registers its own and nobody imports upward.

``kernels`` loads a backend's module when its kernels are first asked for.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor


class Kernels(NamedTuple):
    """A family's kernels on one backend.

    ``forward(*students, *constants, call, *needs)`` gives the loss, a gradient for each student and
    the family's other outputs,
    ``backward(upstream, *students, *constants, call, *needs)`` the gradients alone (``needs`` only
    where there are several students), ``scale_`` multiplies a private gradient in place by a 0-d
    tensor.
    """

    forward: Callable[..., tuple[Tensor | None, ...]]
    backward: Callable[..., Any]
    scale_: Callable[[Tensor, Tensor], Tensor]


_MODULES = {"native": "kdkernels.native", "triton": "kdkernels.triton"}
_registered: dict[tuple[str, str], Kernels] = {}


def register(backend: str, family: str, kernels: Kernels) -> None:
    """Offer a family's kernels; called by a backend's module when it is imported."""
    _registered[backend, family] = kernels


def kernels(backend: str, family: str) -> Kernels:
    """The kernels of a family on a backend; imports the backend."""
    found = _registered.get((backend, family))
    if found is None:
        importlib.import_module(_MODULES[backend])
        found = _registered[backend, family]
    return found

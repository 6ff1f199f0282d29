"""Triton kernels: NVIDIA, AMD and Intel GPUs, and the CPU under ``TRITON_INTERPRET=1``.

A family of losses is a traversal (``rowwise.py`` for ``divergence`` and ``decoupled``,
``crosswise.py`` for ``correlation``, ``embedding_factors.py`` and ``embedding_tuples.py`` for the
losses of ``embedding``); a loss is a rule, in a file of the loss's name that defines ``FAMILY``.
Such a file is found by itself: adding a loss edits nothing here.

Nothing is imported or queried before the first call.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch import Tensor

from .. import _backends


@functools.cache
def _rule_modules() -> dict[str, ModuleType]:
    modules = {
        info.name: importlib.import_module(f"{__name__}.{info.name}")
        for info in pkgutil.iter_modules(__path__)
    }
    return {name: module for name, module in modules.items() if hasattr(module, "FAMILY")}


def rule_module(name: str) -> ModuleType:
    """The file that holds a loss's rule."""
    return _rule_modules()[name]


@functools.cache
def rules(family: str) -> frozenset[str]:
    """The losses of a family for which a Triton rule exists."""
    families = {name: module.FAMILY for name, module in _rule_modules().items()}
    return frozenset(name for name in families if families[name] == family)


def _resolved(module: str, function: str) -> Callable[..., Any]:
    """A traversal's host function, imported when it is first called, whose tensors are no lazily
    negated views: a kernel would read what lies below them."""

    def run(*args: Any) -> Any:
        host = importlib.import_module(f"{__name__}.{module}")
        plain = (x.resolve_neg() if isinstance(x, Tensor) else x for x in args)
        return getattr(host, function)(*plain)

    return run


def scale_(gradient: Tensor, upstream: Tensor) -> Tensor:
    """Multiply a gradient in place by a 0-d tensor that is read on the device."""
    from . import scale

    return scale.scale_(gradient, upstream)


for _family, _module in (
    ("row", "rowwise"),
    ("correlation", "crosswise"),
    ("iekd", "embedding_factors"),
    ("tuple_matching", "embedding_tuples"),
    ("topk", "topk"),
):
    _backends.register(
        "triton",
        _family,
        _backends.Kernels(_resolved(_module, "forward"), _resolved(_module, "backward"), scale_),
    )

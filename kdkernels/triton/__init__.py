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
from types import ModuleType
from typing import Any

from torch import Tensor


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


def row(student: Tensor, teacher: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """A row loss and, if asked, its gradient: the operator ``kdkernels::triton_row``."""
    from . import rowwise

    return rowwise.forward(student.resolve_neg(), teacher.resolve_neg(), *args)


def row_backward(upstream: Tensor, student: Tensor, teacher: Tensor, *args: Any) -> Tensor:
    """The gradient of a row loss, recomputed: ``kdkernels::triton_row_backward``."""
    from . import rowwise

    resolved = (upstream.resolve_neg(), student.resolve_neg(), teacher.resolve_neg())
    return rowwise.backward(*resolved, *args)


def correlation(student: Tensor, teacher: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """A correlation loss and, if asked, its gradient: ``kdkernels::triton_correlation``."""
    from . import crosswise

    return crosswise.forward(student.resolve_neg(), teacher.resolve_neg(), *args)


def correlation_backward(upstream: Tensor, student: Tensor, teacher: Tensor, *args: Any) -> Tensor:
    """The gradient of a correlation loss: ``kdkernels::triton_correlation_backward``."""
    from . import crosswise

    resolved = (upstream.resolve_neg(), student.resolve_neg(), teacher.resolve_neg())
    return crosswise.backward(*resolved, *args)


def factors(inh: Tensor, exp: Tensor, teacher: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """IE-KD and, if asked, its gradients: the operator ``kdkernels::triton_iekd``."""
    from . import embedding_factors

    resolved = (inh.resolve_neg(), exp.resolve_neg(), teacher.resolve_neg())
    return embedding_factors.forward(*resolved, *args)


def factors_backward(
    upstream: Tensor, inh: Tensor, exp: Tensor, teacher: Tensor, *args: Any
) -> tuple[Tensor, Tensor]:
    """The gradients of IE-KD, recomputed: ``kdkernels::triton_iekd_backward``."""
    from . import embedding_factors

    resolved = (inh.resolve_neg(), exp.resolve_neg(), teacher.resolve_neg())
    return embedding_factors.backward(upstream.resolve_neg(), *resolved, *args)


def tuples(student: Tensor, teacher: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """REFILLED's tuples and, if asked, the gradient: ``kdkernels::triton_tuple_matching``."""
    from . import embedding_tuples

    return embedding_tuples.forward(student.resolve_neg(), teacher.resolve_neg(), *args)


def scale_(gradient: Tensor, upstream: Tensor) -> Tensor:
    """Multiply a gradient in place by a 0-d tensor that is read on the device."""
    from . import scale

    return scale.scale_(gradient, upstream)

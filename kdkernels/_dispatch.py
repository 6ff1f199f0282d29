"""Which backend runs a call: one predicate feeds the choice, the error texts and the test skips.

``why_not`` lists the reasons why a backend cannot run a loss on some inputs (empty: it can).
Without a request the first backend of ``native``, ``triton``, ``reference`` with no reason is
taken. A request (``backend=``, ``kdkernels.use_backend`` or ``KDKERNELS_BACKEND``) never falls
back: it runs or raises with the reasons.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from . import _checks, _remedies, _tracing, native
from .registry import SPECS, LossSpec

BACKENDS = ("native", "triton", "reference")

_requested: str | None = os.environ.get("KDKERNELS_BACKEND") or None
"""The process-wide request; ``use_backend`` sets it for a block."""


@contextmanager
def use_backend(backend: str | None) -> Iterator[None]:
    """Request a backend for every call in a ``with`` block (process-wide, not per thread).

    Overrides ``KDKERNELS_BACKEND``; an explicit ``backend=`` argument wins over both.
    """
    global _requested
    if backend is not None:
        known(backend)
    before = _requested
    _requested = backend
    try:
        yield
    finally:
        _requested = before


def why_not(spec: LossSpec, backend: str, student: Tensor) -> list[str]:
    """The reasons why ``backend`` cannot run ``spec`` on tensors like ``student``."""
    return list(_why_not(spec, backend, student.device.type))


TRANSFORMED = "torch.func transforms and forward-mode derivatives run through the reference alone"


def choose(spec: LossSpec, student: Tensor, backend: str | None) -> str:
    """The backend that runs this call; raises if the requested one cannot."""
    requested = _requested if backend is None else known(backend)
    if _tracing.transformed():
        if requested not in (None, "reference"):
            raise _unable(spec, requested, TRANSFORMED)
        return "reference"
    if requested is None and _tracing.recorded():
        return "reference"  # a recording of torch operations, which every reader of it knows
    return _choose(spec.name, requested, "cpu" if student.is_cpu else student.device.type)


def beside_cuda(spec: LossSpec, student: Tensor, backend: str | None) -> str:
    """What runs a call that compiled CUDA kernels would have to run and cannot."""
    requested = _requested if backend is None else backend
    if requested is not None:
        lacks = "give neither hard_weight nor return_parts" if spec.by_row else "ignore no rows"
        reasons = f"compiled CUDA kernels {lacks}"
        raise _unable(spec, requested, reasons)
    return "reference" if why_not(spec, "triton", student) else "triton"


def choose_beside_cuda(spec: LossSpec, student: Tensor, backend: str | None) -> str:
    """As ``choose``, of a call that compiled CUDA kernels do not run."""
    chosen = choose(spec, student, backend)
    if chosen == "native" and not student.is_cpu:
        return beside_cuda(spec, student, backend)
    return chosen


_choices: dict[tuple[str, str | None, str], str] = {}


def _choose(name: str, requested: str | None, device_type: str) -> str:
    key = (name, requested, device_type)
    chosen = _choices.get(key)
    if chosen is None:
        chosen = _choices[key] = _first_able(SPECS[name], requested, device_type)
    return chosen


# What torch.compiler.assume_constant_result does, without its import of the compiler and of Triton.
_choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _first_able(spec: LossSpec, requested: str | None, device_type: str) -> str:
    if requested is not None:
        reasons = _why_not(spec, known(requested), device_type)
        if reasons:
            raise _unable(spec, requested, "; ".join(reasons))
        return requested
    able = (b for b in BACKENDS if not _why_not(spec, b, device_type))
    return next(able)  # the reference runs everywhere


def _unable(spec: LossSpec, requested: str, reasons: str) -> ValueError:
    return _checks.fail("backend", f"able to run {spec.name}", f"{requested!r}: {reasons}")


def known(backend: str) -> str:
    """A backend's name, checked."""
    if not isinstance(backend, str) or backend not in BACKENDS:
        raise _checks.fail("backend", "'native', 'triton', 'reference' or None", repr(backend))
    return backend


@functools.cache
def _why_not(spec: LossSpec, backend: str, device_type: str) -> tuple[str, ...]:
    if backend not in spec.backends:
        return (f"{spec.name} has no {backend} kernels",)
    if backend == "native":
        return _native_reasons(spec, device_type)
    if backend == "triton":
        return _triton_reasons(spec, device_type)
    return ()


def _native_reasons(spec: LossSpec, device_type: str) -> tuple[str, ...]:
    if native.extension(device_type) is None:
        return (native.reason(device_type),)
    if not native.has_rule(device_type, spec.rule_family, spec.rule):
        return (f"the installed extension was built without the rule {spec.rule}",)
    return ()


def _triton_reasons(spec: LossSpec, device_type: str) -> tuple[str, ...]:
    if importlib.util.find_spec("triton") is None:
        return (f"the package triton is not installed ({_remedies.triton()})",)
    if device_type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return ("Triton runs CPU tensors only under TRITON_INTERPRET=1",)
    if device_type not in ("cpu", "cuda", "xpu"):
        return (f"Triton runs on cuda and xpu tensors, these are on {device_type}",)
    from . import triton as kernels

    if spec.rule not in kernels.rules(spec.rule_family):
        return (f"there is no Triton rule {spec.rule}",)
    return ()


def clear_cache() -> None:
    """Forget earlier choices (after the environment changed)."""
    _choices.clear()
    _why_not.cache_clear()


def available(device: str | torch.device = "cpu") -> dict[str, dict[str, list[str]]]:
    """For each loss and backend, the reasons why it does not run on ``device``."""
    kind = torch.device(device).type
    return {
        name: {backend: list(_why_not(spec, backend, kind)) for backend in BACKENDS}
        for name, spec in SPECS.items()
    }

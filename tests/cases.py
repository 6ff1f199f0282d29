"""What the tests run over: every loss of the registry, on every backend that can run here.

A loss added to the registry is picked up by all tests; a backend that cannot run is skipped with
the reasons of ``kdkernels._dispatch.why_not``. CUDA variants exist where a CUDA device does.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import cuda_emulator
import pytest
import torch
from inputs import make
from torch import Tensor

from kdkernels import _dispatch
from kdkernels.registry import SPECS, LossSpec

DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
LOGIT_FAMILIES = ("divergence", "decoupled", "correlation")
"""Families of losses that take a pair of logits."""

LOSSES = [spec for spec in SPECS.values() if spec.family in LOGIT_FAMILIES]
ROW_LOSSES = [spec for spec in LOSSES if spec.by_row]
KERNELS = ("native", "triton")
NOT_ON_CUDA = cuda_emulator.build_facts().without_kernels()
"""Rules that say that CUDA does not compile them: nothing to emulate."""

LOSS_IDS: Callable[[LossSpec], str] = lambda spec: spec.name  # noqa: E731


@dataclass(frozen=True)
class Case:
    """One loss on one backend and device."""

    spec: LossSpec
    backend: str
    device: str
    emulated: bool = False
    """The CUDA kernels instead of the CPU's, on CPU tensors, run by tests/cuda_emulator.py."""

    @property
    def interpreted(self) -> bool:
        """Triton on the CPU: milliseconds a program, so only tiny shapes."""
        return self.backend == "triton" and self.device == "cpu"

    def pick(self, usual: Any, tiny: Any) -> Any:
        """``usual``, or ``tiny`` where kernels are interpreted."""
        return tiny if self.interpreted else usual

    def __call__(
        self, student: Tensor, teacher: Tensor, index: Tensor | None = None, /, **options: Any
    ) -> Tensor:
        with cuda_emulator.instead_of_native() if self.emulated else contextlib.nullcontext():
            return call(self.spec, student, teacher, index, backend=self.backend, **options)


def call(
    spec: LossSpec, student: Tensor, teacher: Tensor, index: Tensor | None = None, /, **options: Any
) -> Tensor:
    """The loss; ``index`` is its target where it needs one (one that takes one has an option).

    The option is ``target`` here, whatever the loss calls it.
    """
    if spec.needs_target:
        options.setdefault("target", index)
    if spec.takes_target and "target" in options:
        options[spec.target_name] = options.pop("target")
    return spec.function(student, teacher, **options)


def value_and_grad(
    function: Callable[..., Tensor],
    student: Tensor,
    *args: Any,
    upstream: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """A loss and its gradient; without ``upstream``, ones (or distinct weights for rows)."""
    student = student.detach().requires_grad_()
    loss = function(student, *args, **options)
    if upstream is None:
        upstream = row_weights(loss)
    (gradient,) = torch.autograd.grad(loss, student, upstream.to(loss.dtype))
    return loss.detach(), gradient


def row_weights(loss: Tensor) -> Tensor:
    """An upstream gradient of the loss's shape: 1 for a scalar, else different for every row."""
    if loss.dim() == 0:
        return torch.ones_like(loss)
    weights = torch.arange(1, loss.numel() + 1, dtype=loss.dtype, device=loss.device)
    return (weights / 4 - 1).reshape(loss.shape)


def params(specs: Iterable[LossSpec], backends: Iterable[str], emulated: bool = False) -> list[Any]:
    made = []
    for spec in specs:
        for backend in backends:
            for device in DEVICES:
                reasons = _dispatch.why_not(spec, backend, torch.empty(0, device=device))
                marks = [pytest.mark.skip(reason="; ".join(reasons))] if reasons else []
                if device != "cpu":
                    marks.append(pytest.mark.gpu)
                name = f"{spec.name}-{backend}" + ("" if device == "cpu" else f"-{device}")
                made.append(pytest.param(Case(spec, backend, device), id=name, marks=marks))
            if emulated and backend == "native" and spec.rule not in NOT_ON_CUDA:
                made.append(_emulated(spec))
    return made


def _emulated(spec: LossSpec) -> Any:
    lacks = [] if cuda_emulator.compiler() else ["the emulator needs a C++ compiler"]
    lacks += _dispatch.why_not(spec, "native", torch.empty(0))  # its checks run before the kernels
    marks = [pytest.mark.skip(reason="; ".join(lacks))] if lacks else []
    case = Case(spec, "native", "cpu", emulated=True)
    return pytest.param(case, id=f"{spec.name}-emulated", marks=marks)


def each(
    specs: Iterable[LossSpec] = LOSSES,
    *,
    kernels: bool = False,
    emulated: bool = False,
    keep: Callable[..., bool] = lambda case, *values: True,
    **axes: Iterable[Any] | Mapping[str, Any],
) -> pytest.MarkDecorator:
    """Parametrise ``case`` and every axis (values, or id -> value).

    ``kernels=True`` leaves the reference out, where it would judge itself. ``emulated`` adds the
    CUDA kernels on the emulated device. ``keep`` thins the grid where the interpreter is slow.
    """
    cases = params(specs, KERNELS if kernels else (*KERNELS, "reference"), emulated)
    named = [
        axis if isinstance(axis, Mapping) else {str(v): v for v in axis} for axis in axes.values()
    ]
    grid = [
        pytest.param(
            *param.values,
            *(value for _, value in point),
            id="-".join((param.id, *(name for name, _ in point))),
            marks=param.marks,
        )
        for param in cases
        for point in itertools.product(*(axis.items() for axis in named))
        if keep(*param.values, *(value for _, value in point))
    ]
    return pytest.mark.parametrize(("case", *axes), grid)


def each_sample(
    specs: Iterable[LossSpec] = LOSSES, *, kernels: bool = False, emulated: bool = False
) -> Any:
    """Parametrise ``case, options`` over the registry's samples."""
    grid = [
        pytest.param(*p.values, dict(sample), id=f"{p.id}-sample{i}", marks=p.marks)
        for p in params(specs, KERNELS if kernels else (*KERNELS, "reference"), emulated)
        for i, sample in enumerate(p.values[0].spec.samples)
    ]
    return pytest.mark.parametrize(("case", "options"), grid)


each_emulated = functools.partial(each, emulated=True)
each_sample_emulated = functools.partial(each_sample, emulated=True)


def temperature_name(spec: LossSpec) -> str | None:
    """The name of the loss's temperature parameter."""
    names = inspect.signature(spec.function).parameters
    return next((name for name in ("temperature", "tau") if name in names), None)


def at_temperature(spec: LossSpec, value: float) -> dict[str, float]:
    """Options that set the temperature."""
    name = temperature_name(spec)
    return {} if name is None else {name: value}


def reductions(spec: LossSpec) -> tuple[str, ...]:
    return ("mean", "sum", "none") if spec.by_row else ("mean", "sum")


def option_names(spec: LossSpec) -> dict[str, inspect.Parameter]:
    """The public parameters that are not tensors."""
    parameters = inspect.signature(spec.function).parameters
    tensors = ("target", "labels", "token_weight", "num_items_in_batch")  # by default none
    return {n: p for n, p in parameters.items() if p.default is not p.empty and n not in tensors}


def named_inputs(spec: LossSpec, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Small tensors for any loss, by the names of its arguments."""
    if spec.inputs is not None:
        tensors = spec.inputs(torch.Generator().manual_seed(0), dtype)
    else:
        student, teacher, target = make("gaussian", 6, 9, dtype=dtype)
        tensors = (student, teacher, target) if spec.takes_target else (student, teacher)
    parameters = inspect.signature(spec.function).parameters
    options = option_names(spec)
    other = {"labels", "target"} - {spec.target_name}  # another name of the same
    other |= {"token_weight", "num_items_in_batch"}  # test_row_keywords.py
    names = [name for name in parameters if name not in options and name not in other]
    return dict(zip(names, tensors, strict=True))


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal shape, dtype and bits (NaN equals NaN, 0 does not equal -0)."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.contiguous().view(integers), b.contiguous().view(integers))

"""What the tests run over: every loss of the registry, on every backend that can run here.

A loss added to the registry is picked up by all tests; a backend that cannot run is skipped with
the reasons of ``kdkernels._dispatch.why_not``. CUDA variants exist where a CUDA device does.

What a test asks of a loss is either the loss's own (its mathematics: input families, samples,
temperatures) or a fact of the traversal that its family shares on a backend (layouts, dtypes of
storage, sizes, integer types of targets). Own axes run on every loss. ``shared`` axes are dealt to
the losses of a family in turn, so that every point runs on every backend with some loss of each
family, and a new loss adds one test where the full product would add all points. ``ONE_A_FAMILY``
is for facts that hold for an operator as a whole.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import inspect
import itertools
from collections.abc import Callable, Collection, Iterable, Mapping
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
LOGIT_FAMILIES = ("divergence", "decoupled", "binary", "correlation")
"""Families of losses that take a pair of logits."""

LOSSES = [spec for spec in SPECS.values() if spec.family in LOGIT_FAMILIES]
ROW_LOSSES = [spec for spec in LOSSES if spec.by_row]
SOFTMAX = [spec for spec in LOSSES if spec.activation == "softmax"]
"""Losses that see a row's logits but for a constant."""
SOFTMAX_ROWS = [spec for spec in ROW_LOSSES if spec in SOFTMAX]
"""Those to which the cross-entropy and the entropy of the softmax belong."""
ONE_A_FAMILY = [SPECS[name] for name in ("kd", "dkd", "sigmoid_kd", "dist")]
"""A loss of each family, which stands for all in what their operator does."""
assert {spec.family for spec in LOSSES} == {spec.family for spec in ONE_A_FAMILY}

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

    @property
    def masks(self) -> bool:
        """Whether it takes labels: compiled CUDA kernels that couple the rows ignore none."""
        compiled = self.emulated or (self.backend == "native" and self.device != "cpu")
        return self.spec.takes_target and (self.spec.by_row or not compiled)

    def pick(self, usual: Any, tiny: Any) -> Any:
        """``usual``, or ``tiny`` where kernels are interpreted."""
        return tiny if self.interpreted else usual

    def __call__(
        self, student: Tensor, teacher: Tensor, index: Tensor | None = None, /, **options: Any
    ) -> Tensor:
        with cuda_emulator.instead_of_native() if self.emulated else contextlib.nullcontext():
            return call(self.spec, student, teacher, index, backend=self.backend, **options)


def alone_if_interpreted(case: Case, *values: Any) -> bool:
    """For a fact of a traversal, and for a law that the reference obeys too.

    Every loss on compiled kernels, interpreted one of a family: the others' rules are compared with
    the reference (``test_losses.py``) and held to the contract of rules (``test_rules.py``).
    """
    return not case.interpreted or case.spec in ONE_A_FAMILY


def once_if_interpreted(case: Case, sample: int, dtype: torch.dtype) -> bool:
    """For ``each_sample`` of several dtypes: the first in float32 where kernels are interpreted."""
    return not case.interpreted or (sample == 0 and dtype == torch.float32)


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
    shared: Collection[str] = (),
    **axes: Iterable[Any] | Mapping[str, Any],
) -> pytest.MarkDecorator:
    """Parametrise ``case`` and every axis (values, or id -> value).

    ``kernels=True`` leaves the reference out, where it would judge itself. ``emulated`` adds the
    CUDA kernels on the emulated device. ``keep`` thins the grid where the interpreter is slow.
    ``shared`` names the axes that are dealt to the losses of a family instead of multiplied.
    """
    cases = params(specs, KERNELS if kernels else (*KERNELS, "reference"), emulated)
    named = {
        name: list((axis if isinstance(axis, Mapping) else {str(v): v for v in axis}).items())
        for name, axis in axes.items()
    }
    grid = {
        (i, point): param
        for i, param in enumerate(cases)
        for point in itertools.product(*map(range, map(len, named.values())))
        if keep(*param.values, *_values(named, point))
    }
    if shared:
        assert set(shared) <= set(axes)
        dealt = [name in shared for name in named]
        grid = {key: grid[key] for key in sorted(_deal(grid, dealt))}
    made = [
        pytest.param(
            *param.values,
            *_values(named, point),
            id="-".join(
                (param.id, *(axis[k][0] for axis, k in zip(named.values(), point, strict=True)))
            ),
            marks=param.marks,
        )
        for (_, point), param in grid.items()
    ]
    return pytest.mark.parametrize(("case", *axes), made)


Point = tuple[int, ...]


def _values(axes: Mapping[str, list[tuple[str, Any]]], point: Point) -> list[Any]:
    return [axis[k][1] for axis, k in zip(axes.values(), point, strict=True)]


def _deal(grid: Mapping[tuple[int, Point], Any], shared: list[bool]) -> set[tuple[int, Point]]:
    """Part of a grid in which each family has, on each backend, every point of all axes, and each
    loss every point of the axes that are not shared.

    Every turn goes to the loss, and then every loss that had none gets the point, with the fewest
    turns so far.
    """
    groups: dict[Any, dict[Point, list[int]]] = {}
    for (i, point), param in grid.items():
        case = param.values[0]
        where = (case.spec.family, case.backend, case.device, case.emulated)
        group = (where, _part(point, shared, False))
        groups.setdefault(group, {}).setdefault(point, []).append(i)
    kept: set[tuple[int, Point]] = set()
    turns: collections.Counter[Any] = collections.Counter()

    def take(i: int, point: Point) -> None:
        kept.add((i, point))
        turns.update([(group, i), i, (i, _part(point, shared, True))])

    for group, points in groups.items():
        for point, takers in points.items():
            take(min(takers, key=lambda i: (turns[group, i], turns[i], i)), point)
        losses = {i for takers in points.values() for i in takers}
        for i in sorted(i for i in losses if not turns[group, i]):
            mine = [point for point, takers in points.items() if i in takers]
            take(i, min(mine, key=lambda point: (turns[i, _part(point, shared, True)], point)))
    return kept


def _part(point: Point, shared: list[bool], wanted: bool) -> Point:
    return tuple(k for k, dealt in zip(point, shared, strict=True) if dealt == wanted)


def each_sample(
    specs: Iterable[LossSpec] = LOSSES,
    *,
    kernels: bool = False,
    emulated: bool = False,
    keep: Callable[..., bool] = lambda case, sample, *values: True,
    **axes: Iterable[Any],
) -> Any:
    """Parametrise ``case, options`` over the registry's samples, and every axis.

    ``keep`` is asked with the number of the sample.
    """
    grid = [
        pytest.param(
            *p.values,
            dict(sample),
            *point,
            id="-".join((p.id, f"sample{i}", *map(str, point))),
            marks=p.marks,
        )
        for p in params(specs, KERNELS if kernels else (*KERNELS, "reference"), emulated)
        for i, sample in enumerate(p.values[0].spec.samples)
        for point in itertools.product(*axes.values())
        if keep(*p.values, i, *point)
    ]
    return pytest.mark.parametrize(("case", "options", *axes), grid)


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


def passes(spec: LossSpec) -> tuple[str, ...]:
    """One reduction for each way to the gradient: stored by the forward pass, or computed by the
    backward pass with an upstream number a row.

    For the rest: a sum is a mean times a number, which ``test_contract.py`` checks on every case.
    """
    return ("mean", "none") if spec.by_row else ("mean",)


FLAGS = ("return_parts", "return_mass")
"""Options that change what is returned."""


def option_names(spec: LossSpec) -> dict[str, inspect.Parameter]:
    """The public parameters that are not tensors, and do not change what is returned."""
    parameters = inspect.signature(spec.function).parameters
    others = ("target", "labels", "token_weight", "num_items_in_batch", "log_rest", *FLAGS)
    return {n: p for n, p in parameters.items() if p.default is not p.empty and n not in others}


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
    # test_row_keywords.py, test_topk.py
    other |= {"token_weight", "num_items_in_batch", "log_rest", *FLAGS}
    names = [name for name in parameters if name not in options and name not in other]
    return dict(zip(names, tensors, strict=True))


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal shape, dtype and bits (NaN equals NaN, 0 does not equal -0)."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.contiguous().view(integers), b.contiguous().view(integers))

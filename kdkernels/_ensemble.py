"""Several teachers: the logits of their averaged probabilities, which stand for one teacher's."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from . import _checks
from ._dtensor import all_or_none_sharded
from ._dtypes import working_dtype
from ._shapes import ClassesAt
from ._tracing import plain, traced, transformed
from .registry import LossSpec

BLOCK = 1 << 19
"""Elements of a block: 2 MiB in float32, which stay in the cache from one teacher to the next."""


@dataclasses.dataclass(frozen=True, eq=False)
class EnsembleTeacher:
    """Logits of several teachers and their weights, wherever a loss takes ``teacher_logits``.

    The teacher's probabilities are the weighted mean of the teachers' softened ones, at the loss's
    temperature T:

    .. math:: p = \\sum_m w_m \\operatorname{softmax}(t_m / T) \\Big/ \\sum_m w_m

    (the sigmoids, where the loss is of sigmoids), which is not the softmax of averaged logits. A
    list of logits does the same with equal weights.

    Args:
        logits: one tensor a teacher, each of the shape and on the device of the student's logits,
            each with its own dtype and strides; constants.
        weights: a number >= 0 a teacher, or a tensor of them, (M,) for M teachers or (M, ...) with
            one number for each teacher and row; a constant, whose values nothing checks. Only
            ratios count. A teacher whose weight is the number 0 is not read. None: equal.

    Raises:
        TypeError, ValueError: ``name must be <expected>, got <got>``; what depends on the student
            where the loss is called.
    """

    logits: Sequence[Tensor]
    weights: Sequence[float] | Tensor | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.logits, (list, tuple)) or not self.logits:
            got = type(self.logits).__name__ if self.logits is not None else None
            raise _checks.fail_type("teacher_logits", "Tensors, at least one", got)
        count, weights = len(self.logits), self.weights
        if isinstance(weights, Tensor):
            _checks.tensor("weights", weights)
            _checks.dtype("weights", weights)
            _checks.constant("weights", weights)
            if not weights.dim() or weights.shape[0] != count:
                expected = f"one for each of the {count} teachers"
                raise _checks.fail("weights", expected, f"shape {tuple(weights.shape)}")
        elif weights is not None:
            if not isinstance(weights, (list, tuple)) or len(weights) != count:
                expected = f"{count} numbers, one a teacher, or a Tensor"
                raise _checks.fail_type("weights", expected, weights)
            given = tuple(_checks.non_negative("weights", w) for w in weights)
            if not sum(given):
                raise _checks.fail("weights", "more than 0 in sum", given)
            object.__setattr__(self, "weights", given)


TeacherLogits: TypeAlias = Tensor | Sequence[Tensor] | EnsembleTeacher
"""What losses of a pair of logits take as the teacher's."""


def single(
    spec: LossSpec,
    teacher: Any,
    student: Tensor,
    temperature: float | Tensor,
    class_dim: int | None,
    standardize: bool = False,
    tp_group: Any = None,
    teacher_grad: bool = False,
) -> Tensor:
    """The logits whose softmax at T is the mean of several teachers': T log p, written once; or
    whose sigmoid is, T log p / (1 - p).

    ``class_dim`` is that of the student where it was named.
    """
    if not isinstance(teacher, EnsembleTeacher):
        if not isinstance(teacher, (list, tuple)):
            _checks.tensor("teacher_logits", teacher)
        teacher = EnsembleTeacher(teacher)
    if tp_group is not None:  # a rank does not know the sums over all classes
        raise _checks.fail("teacher_logits", "one Tensor where tp_group is given", "several")
    if _checks.flag("teacher_grad", teacher_grad):
        raise _checks.fail("teacher_grad", "False where there are several teachers", True)
    if standardize is not False:
        raise _checks.fail("standardize", "False where there are several teachers", standardize)
    members = list(teacher.logits)
    found = 0
    for x in members:
        if class_dim is None:
            found = _checks.logits(student, x, spec.least_classes)
        else:
            shape = ClassesAt(class_dim, student, x)
            _checks.logits(shape.logits(student), shape.logits(x), spec.least_classes)
            found = shape.dim
        _checks.allocated("teacher_logits", x)
    named = {
        "student_logits": student,
        **{f"teacher_logits[{i}]": x for i, x in enumerate(members)},
    }
    named |= {  # plain numbers are those of all ranks
        name: x
        for name, x, dims in (("weights", teacher.weights, 1), ("temperature", temperature, 0))
        if isinstance(x, Tensor) and (x.dim() > dims or not plain(x))
    }
    all_or_none_sharded(named)
    rows = student.shape[:found] + student.shape[found + 1 :]
    kind = working_dtype(student, *members)
    weights = _logarithms(teacher.weights, members, rows, found, kind)
    heat: Any
    if isinstance(temperature, Tensor):
        _checks.row_temperature(temperature, student, found)
        if temperature.requires_grad and torch.is_grad_enabled():
            expected = "a constant where there are several teachers"
            raise _checks.fail("temperature", expected, "a tensor that requires grad")
        heat = temperature.unsqueeze(found) if temperature.dim() else temperature
    else:
        heat = _checks.temperature(temperature)
    mean = _mean if spec.activation == "softmax" else _mean_of_sigmoids
    with torch.no_grad():
        if traced(*members) or transformed():
            return mean(members, weights, heat, found, kind)
        out = torch.empty(student.shape, dtype=kind, device=student.device)
        over, at = _blocks(student.shape, found)
        for begin, size in at:
            parts = [x.narrow(over, begin, size) for x in (*members, out)]
            cut = [_narrow(x, over, begin, size) for x in (*weights, heat)]
            parts[-1].copy_(mean(parts[:-1], cut[:-1], cut[-1], found, kind))
    return out


def _logarithms(
    weights: Any, members: list[Tensor], rows: torch.Size, class_dim: int, kind: torch.dtype
) -> list[Any]:
    """The logarithm of each weight; drops members whose weight is the number 0.

    A sum of weights other than 1 shifts a row's logits, which no loss sees.
    """
    if isinstance(weights, Tensor):
        if weights.dim() > 1 and weights.shape[1:] != rows:
            expected = f"of shape ({len(members)},) or {(len(members), *rows)}"
            raise _checks.fail("weights", expected, tuple(weights.shape))
        logs = weights.to(kind).log()
        return [x.unsqueeze(class_dim) if x.dim() else x for x in logs]
    if weights is None:
        return [0.0] * len(members)
    largest = max(weights)
    members[:] = [x for x, w in zip(members, weights, strict=True) if w]
    return [math.log(w) - math.log(largest) for w in weights if w]


def _narrow(x: Any, over: int, begin: int, size: int) -> Any:
    return x.narrow(over, begin, size) if isinstance(x, Tensor) and x.dim() else x


def _blocks(shape: torch.Size, class_dim: int) -> tuple[int, Iterator[tuple[int, int]]]:
    """The longest dimension of the rows and its parts, of some rows each."""
    over = max((d for d in range(len(shape)) if d != class_dim), key=lambda d: shape[d], default=-1)
    if over < 0:  # one row
        return 0, iter([(0, shape[0])])
    length = shape[over]
    step = max(BLOCK * length // max(shape.numel(), 1), 1)
    return over, ((begin, min(step, length - begin)) for begin in range(0, length, step))


def _mean(
    members: list[Tensor], weights: list[Any], heat: Any, class_dim: int, kind: torch.dtype
) -> Tensor:
    """T log sum_m w_m softmax(t_m / T): no probability underflows."""
    total: Tensor | None = None
    for x, weight in zip(members, weights, strict=True):
        logs = torch.log_softmax(x.to(kind) / heat, class_dim) + weight
        total = logs if total is None else torch.logaddexp(total, logs)
    assert total is not None  # EnsembleTeacher has at least one
    return total * heat


def _mean_of_sigmoids(
    members: list[Tensor], weights: list[Any], heat: Any, class_dim: int, kind: torch.dtype
) -> Tensor:
    """T (log sum_m w_m sigmoid(t_m / T) - log sum_m w_m sigmoid(-t_m / T))."""
    sums: list[Tensor] = []
    for sign in (1, -1):
        logs = [
            torch.nn.functional.logsigmoid(sign * x.to(kind) / heat) + weight
            for x, weight in zip(members, weights, strict=True)
        ]
        sums.append(functools.reduce(torch.logaddexp, logs))
    return (sums[0] - sums[1]) * heat

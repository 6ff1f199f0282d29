"""The public path of the embedding losses: checks, and autograd around their kernels."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from . import _checks, _dispatch
from ._autograd import apply_composed, apply_several, call_operator
from ._backends import Kernels
from ._calls import ComposedCall, FactorCall, TupleCall
from ._dispatch import choose
from ._dtypes import INTEGERS, working_dtype
from ._tracing import keepable, readable, traced, transformed
from .reference._rows import weighted
from .reference.refilled import distances, unseen
from .registry import LossSpec


def tensor(name: str, value: Any, ranks: dict[int, str]) -> Tensor:
    """Check a floating-point tensor of one of the ranks, given with their shapes in words."""
    _checks.tensor(name, value)
    _checks.dtype(name, value)
    if value.dim() not in ranks:
        raise _checks.fail(name, " or ".join(ranks.values()), f"shape {tuple(value.shape)}")
    if 0 in value.shape[1:]:
        raise _checks.fail(name, "of at least one element a sample", f"shape {tuple(value.shape)}")
    _checks.allocated(name, value)
    return value


VECTORS = {2: "(B, D)", 4: "(B, C, H, W)"}
MAPS = {3: "(B, N, D)", 4: "(B, C, H, W)"}


def embeddings(name: str, value: Any) -> Tensor:
    """Check a batch of vectors, such as (B, C, 1, 1) of a pooling layer; returns them as (B, D)."""
    return tensor(name, value, VECTORS).flatten(1)


def maps(name: str, value: Any) -> Tensor:
    """Check maps of features; returns tokens (B, N, D) as maps (B, D, N, 1) of N positions."""
    value = tensor(name, value, MAPS)
    return value.mT.unsqueeze(3) if value.dim() == 3 else value


def shape_of_maps(rank: int, samples: Any, channels: Any, *positions: Any) -> str:
    """The shape that ``maps`` were given with, in words."""
    order = (samples, *positions, channels) if rank == 3 else (samples, channels, *positions)
    return "(" + ", ".join(map(str, order)) + ")"


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Keep autocast out of a loss: its products and resizings are in the dtype they are given."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def beside(name: str, value: Tensor, student: Tensor) -> None:
    """Check that a tensor is on the student's device."""
    if value.device != student.device:
        raise _checks.fail(name, f"on the student's device {student.device}", value.device)


def like(name: str, value: Tensor, student: Tensor) -> None:
    """Check shape and device against the student's."""
    if value.shape != student.shape:
        raise _checks.fail(
            name, f"of the student's shape {tuple(student.shape)}", tuple(value.shape)
        )
    beside(name, value, student)


def labels(value: Any, samples: int, device: torch.device) -> Tensor:
    """Check one class index a sample; returns them as contiguous int64."""
    _checks.tensor("target", value, "a Tensor of class indices")
    _checks.allocated("target", value)
    if value.shape != (samples,):
        raise _checks.fail("target", f"of shape {(samples,)}", tuple(value.shape))
    if value.dtype not in INTEGERS:
        raise _checks.fail_type("target", "integer class indices", value.dtype)
    if value.device != device:
        raise _checks.fail("target", f"on the student's device {device}", value.device)
    return value.to(torch.int64).contiguous()


def in_range(target: Tensor, classes: int, ignored: int = _checks.NO_INDEX) -> None:
    """Check the values of CPU targets; on a GPU this would synchronise."""
    if not readable(target):
        return
    bad = ((target < 0) | (target >= classes)) & (target != ignored)
    if bad.any():
        raise _checks.fail("target", f"in [0, {classes})", int(target[bad][0]))


def promote(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Bring all to the working dtype: float64 if any is, else float32."""
    dtype = working_dtype(*tensors)
    return tuple(tensor.to(dtype) for tensor in tensors)


def composed(
    spec: LossSpec,
    student: Tensor,
    teacher: Tensor,
    *,
    reduction: str,
    loss_weight: float,
    backend: str | None,
    **options: Any,
) -> Tensor:
    """Evaluate a loss without kernels of its own, in the working dtype.

    Its reference, unless there is a faster composition that can run and nobody asks for the
    reference by name: ``torch.compile`` fuses the reference better than a written gradient, and on
    a GPU the blocks would be launches.
    """
    choose(spec, student, backend)  # raises where a backend is asked for that is not there
    student, teacher = promote(student, teacher)
    with full_precision(student.device):
        return _composed(spec, student, teacher, reduction, loss_weight, backend, options)


def _composed(
    spec: LossSpec,
    student: Tensor,
    teacher: Tensor,
    reduction: str,
    loss_weight: float,
    backend: str | None,
    options: dict[str, Any],
) -> Tensor:
    written = spec.composed
    if (
        written is not None
        and student.device.type == "cpu"
        and not traced(student, teacher)
        and (backend or _dispatch._requested) is None
        and not transformed()
    ):
        code = _checks.batch_reduction(reduction)
        call = ComposedCall(functools.partial(written, **options), loss_weight, code)
        return apply_composed(student, _WRITTEN, call, teacher)
    teacher = keepable(teacher)
    name = "sum" if reduction == "sum" else "mean"
    loss = spec.reference(student, teacher, reduction=name, **options)
    return weighted(loss, loss_weight).to(student.dtype)


def _written(student: Tensor, teacher: Tensor, call: ComposedCall, need: bool) -> Any:
    with torch.no_grad():
        return call.evaluate(student, teacher, call.scale, call.reduction, need)


def _recomputed(upstream: Tensor, student: Tensor, teacher: Tensor, call: ComposedCall) -> Tensor:
    return _scale_written_(_written(student, teacher, call, True)[1], upstream)


def _scale_written_(gradient: Tensor, upstream: Tensor) -> Tensor:
    with torch.no_grad():
        return gradient if upstream == 1 else gradient.mul_(upstream)


_WRITTEN = Kernels(_written, _recomputed, _scale_written_)


def factors(backend: str, inh: Tensor, exp: Tensor, teacher: Tensor, call: FactorCall) -> Tensor:
    """IE-KD's kernel on (B, ...) factors.

    Any strides; a factor whose samples do not flatten to one stride is copied.
    """
    three: tuple[Tensor, ...] = (inh, exp, teacher)
    if inh.dim() == 4 and not inh.is_contiguous():
        # The order of a sample's elements does not matter, as long as it is the same for all.
        last = torch.channels_last
        if all(x.is_contiguous(memory_format=last) for x in three):
            three = tuple(x.permute(0, 2, 3, 1) for x in three)
    inh, exp, teacher = (x.flatten(1) for x in three)
    return apply_several(backend, "iekd", (inh, exp), call, teacher)


def tuples(
    backend: str, student: Tensor, teacher: Tensor, target: Tensor, call: TupleCall
) -> Tensor:
    """REFILLED's tuples: distances by torch in float64, everything about tuples in the kernel."""
    dtype = working_dtype(student, teacher)
    with full_precision(student.device):
        d_student = distances(student).to(dtype)
        with torch.no_grad():
            d_teacher = distances(teacher).to(dtype)
    need_gradient = d_student.requires_grad and torch.is_grad_enabled()
    constants = d_teacher, target
    needs = (need_gradient,)
    loss = call_operator(backend, "tuple_matching", (d_student,), constants, call, needs)[0]
    return loss + unseen(d_student)

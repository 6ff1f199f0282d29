"""The public path of the embedding losses: checks, and autograd around their kernels."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _checks, _dispatch, _ops_embedding, native
from ._autograd import Kernels, _apply_fused, _apply_once
from ._dispatch import choose
from ._ops import operator_name, traced
from .reference.refilled import distances
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
    if value.dtype not in _checks.INTEGERS:
        raise _checks.fail_type("target", "integer class indices", value.dtype)
    if value.device != device:
        raise _checks.fail("target", f"on the student's device {device}", value.device)
    return value.to(torch.int64).contiguous()


def in_range(target: Tensor, classes: int) -> None:
    """Check the values of CPU targets; on a GPU this would synchronise."""
    if target.device.type != "cpu" or traced(target):
        return
    bad = (target < 0) | (target >= classes)
    if bad.any():
        raise _checks.fail("target", f"in [0, {classes})", int(target[bad][0]))


def promote(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Bring all to the working dtype: float64 if any is, else float32."""
    dtype = _ops_embedding.working_dtype(*tensors)
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
    written = spec.composed
    if (
        written is not None
        and student.device.type == "cpu"
        and not traced(student, teacher)
        and (backend or _dispatch._requested) is None
        and not torch._C._are_functorch_transforms_active()
    ):
        code = _checks.batch_reduction(reduction)
        evaluate = functools.partial(written, **options)
        if student.requires_grad and torch.is_grad_enabled():
            kernels = Kernels(evaluate, _recomputed, _scale_written_)
            return _apply_fused(student, teacher, kernels, (loss_weight, code))
        with torch.no_grad():
            return evaluate(student, teacher, loss_weight, code, False)[0]
    name = "sum" if reduction == "sum" else "mean"
    loss = spec.reference(student, teacher, reduction=name, **options)
    return (loss_weight * loss).to(student.dtype)


def _recomputed(*args: Any) -> Tensor:
    raise AssertionError("the working dtypes store the gradient")


def _scale_written_(gradient: Tensor, upstream: Tensor) -> Tensor:
    with torch.no_grad():
        return gradient if upstream == 1 else gradient.mul_(upstream)


def _operator(backend: str, name: str) -> Callable[..., Any]:
    return getattr(torch.ops.kdkernels, operator_name(backend, name)).default


def _scale_(backend: str) -> Callable[[Tensor, Tensor], Tensor]:
    if backend == "native":
        return native.scale_
    from . import triton

    return triton.scale_


class _Factors(torch.autograd.Function):
    """IE-KD in eager mode; see ``_autograd._Fused``, whose scheme this is with two gradients."""

    @staticmethod
    def forward(
        ctx: Any, inh: Tensor, exp: Tensor, teacher: Tensor, backend: str, args: Any
    ) -> Tensor:
        needs = ctx.needs_input_grad[:2]
        ctx.stored = stored = _stores(inh, exp)
        wanted = needs if stored else (False, False)
        loss, *gradients = _operator(backend, "iekd")(inh, exp, teacher, *args, *wanted)
        ctx.gradients = gradients if stored else None
        ctx.backend = backend
        ctx.args = args
        ctx.save_for_backward(inh, exp, teacher)
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[:2]
        if ctx.stored:
            gradients, ctx.gradients = ctx.gradients, None
            if gradients is None:
                operator = _operator(ctx.backend, "iekd")
                gradients = operator(*ctx.saved_tensors, *ctx.args, *needs)[1:]
            scale_ = _scale_(ctx.backend)
            gradients = [scale_(g, upstream) if g.numel() else g for g in gradients]
        else:
            operator = _operator(ctx.backend, "iekd_backward")
            gradients = operator(upstream, *ctx.saved_tensors, *ctx.args, *needs)
        if torch.is_grad_enabled():  # create_graph=True must not be silent
            saved = ctx.saved_tensors
            gradients = [
                _apply_once(g, upstream, x) for g, x in zip(gradients, saved, strict=False)
            ]
        return (
            *(g if need else None for g, need in zip(gradients, needs, strict=True)),
            None,
            None,
            None,
        )


_apply_factors: Callable[..., Tensor] = _Factors.apply


def _stores(inh: Tensor, exp: Tensor) -> bool:
    """Whether the gradients are computed in the forward pass (see ``_ops.stores_gradient``)."""
    return torch.float16 not in (inh.dtype, exp.dtype)


def factors(backend: str, inh: Tensor, exp: Tensor, teacher: Tensor, *args: Any) -> Tensor:
    """IE-KD's kernel on (B, ...) factors; ``args`` are the numbers of its schema.

    Any strides; a factor whose samples do not flatten to one stride is copied.
    """
    three: tuple[Tensor, ...] = (inh, exp, teacher)
    if inh.dim() == 4 and not inh.is_contiguous():
        # The order of a sample's elements does not matter, as long as it is the same for all.
        last = torch.channels_last
        if all(x.is_contiguous(memory_format=last) for x in three):
            three = tuple(x.permute(0, 2, 3, 1) for x in three)
    inh, exp, teacher = (x.flatten(1) for x in three)
    needs = inh.requires_grad, exp.requires_grad
    if not torch.is_grad_enabled() or not any(needs):
        return _operator(backend, "iekd")(inh, exp, teacher, *args, False, False)[0]
    if traced(inh, exp, teacher):
        wanted = needs if _stores(inh, exp) else (False, False)
        return _operator(backend, "iekd")(inh, exp, teacher, *args, *wanted)[0]
    return _apply_factors(inh, exp, teacher, backend, args)


def tuples(
    backend: str,
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    margin: float,
    temperature: float,
    scale: float,
    reduction: int,
) -> Tensor:
    """REFILLED's tuples: distances by torch in float64, everything about tuples in the kernel."""
    dtype = _ops_embedding.working_dtype(student, teacher)
    d_student = distances(student).to(dtype)
    with torch.no_grad():
        d_teacher = distances(teacher).to(dtype)
    need_gradient = d_student.requires_grad and torch.is_grad_enabled()
    return _operator(backend, "tuple_matching")(
        d_student, d_teacher, target, margin, temperature, scale, reduction, need_gradient
    )[0]

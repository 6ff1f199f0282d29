"""The operators: schemas once, with fake kernels and autograd, whoever implements them.

A family (``_calls``) has a forward operator, which returns the loss and a gradient for each
student, and a backward operator, which recomputes; each exists twice, ``kdkernels::row`` (compiled
code, registered by the extension for its devices) and ``kdkernels::triton_row``. Whoever traces
(``torch.compile``, ``torch.library.opcheck``) sees these operators; the eager path of ``_autograd``
calls the same kernels with less host time.

The schemas stand here and not in C++ because a pure-Python installation needs them too, and because
they must not exist twice; the extension only adds implementations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from . import _backends, _checks
from ._calls import FAMILIES, Family
from ._dtypes import working_dtype

library = torch.library.Library("kdkernels", "DEF")
TAGS = (torch.Tag.pt2_compliant_tag,)
_SECOND = "kdkernels losses cannot be differentiated twice, but by backend='reference'"


def operator_name(backend: str, family: str) -> str:
    """``row`` for compiled code, ``triton_row`` for Triton."""
    return family if backend == "native" else f"{backend}_{family}"


def operator(backend: str, family: str, suffix: str = "") -> Any:
    """The operator of a family, or with ``_backward`` the one that recomputes."""
    return getattr(torch.ops.kdkernels, operator_name(backend, family) + suffix).default


def no_double_backward(ctx: Any, *grads: Any) -> Any:
    raise RuntimeError(_SECOND)


class _Once(torch.autograd.Function):
    """Passes a gradient through and raises if it is differentiated."""

    generate_vmap_rule = True

    @staticmethod
    def forward(gradient: Tensor, upstream: Tensor, student: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        pass

    backward = staticmethod(no_double_backward)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise RuntimeError(_SECOND)


once: Callable[[Tensor, Tensor, Tensor], Tensor] = _Once.apply  # typed: torch leaves it untyped


_NOT_STRIDED = ("SparseCPU", "SparseCUDA", "SparseCsrCPU", "SparseCsrCUDA", "MkldnnCPU",
                "NestedTensorCPU", "NestedTensorCUDA")  # fmt: skip


def guard(name: str, names: Sequence[str]) -> None:
    """Refuse dual tensors and tensors without strides in direct calls of an operator.

    The losses check their tensors and send dual ones to the reference. An operator that has no
    formula for forward mode drops tangents silently where no input requires grad.
    """
    operator = getattr(torch.ops.kdkernels, name).default

    def without_tangents(keyset: Any, *args: Any) -> Any:
        if forward_ad._current_level >= 0:
            for name, x in zip(names, args, strict=False):
                if x is not None and forward_ad.unpack_dual(x).tangent is not None:
                    raise _checks.fail(name, "without a forward-mode tangent", "a dual tensor")
        return operator.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args)

    def strided(*args: Any) -> Any:
        for name, x in zip(names, args, strict=False):
            if x is not None:
                _checks.tensor(name, x)
        raise AssertionError("a tensor without strides")

    library.impl(name, without_tangents, "ADInplaceOrView", with_keyset=True)
    for key in _NOT_STRIDED:
        library.impl(name, strided, key)


def _fake_loss(family: Family, args: tuple[Any, ...]) -> Tensor:
    tensors = args[: family.tensors]
    students = len(family.students)
    floats = tensors[: students + 1]  # the teacher follows the students
    call = family.call(*args[family.tensors : family.tensors + len(family.call._fields)])
    shape: list[Any] = []
    if call.reduction == 0:
        shape = list(tensors[0].shape)
        del shape[call.class_dim]
    return tensors[0].new_empty(shape, dtype=working_dtype(*floats))


def _fake_outputs(family: Family, args: tuple[Any, ...], loss: Tensor) -> list[Tensor]:
    if not family.outputs:
        return []
    student, call = (
        args[0],
        family.call(*args[family.tensors : family.tensors + len(family.call._fields)]),
    )
    shape: list[Any] = [0]
    if call.parts:
        shape = [3, *student.shape]
        del shape[1 + call.class_dim]
    return [loss.new_empty(shape)]


def _gradients(students: tuple[Tensor, ...], needs: tuple[bool, ...]) -> list[Tensor]:
    return [
        torch.empty_like(x) if wanted else x.new_empty([0])
        for x, wanted in zip(students, needs, strict=True)
    ]


def _define(backend: str, family: Family) -> None:
    count = len(family.students)
    name = operator_name(backend, family.name)
    fields = family.tensors + len(family.call._fields)
    names = [x.rstrip("?") for x in (*family.students, *family.constants)]

    def fake_forward(*args: Any) -> tuple[Tensor, ...]:
        loss = _fake_loss(family, args)
        gradients = _gradients(args[:count], args[fields:])
        return (loss, *gradients, *_fake_outputs(family, args, loss))

    def fake_backward(upstream: Tensor, *args: Any) -> Any:
        if count == 1:
            return torch.empty_like(args[0])
        return tuple(_gradients(args[:count], args[fields:]))

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.stored = any(inputs[fields:]) or not family.recomputes
        call = family.call(*inputs[family.tensors : fields])
        ctx.call = call._replace(symbolic=None)
        if ctx.stored:
            ctx.save_for_backward(*output[1 : 1 + count], *inputs[:count])
        else:
            ctx.save_for_backward(*inputs[: family.tensors], call.symbolic)

    def differentiate(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Any, ...]:
        nothing = (None,) * (fields + len(family.needs) - count)
        if upstream is None:
            return (*(None,) * count, *nothing)
        needs = tuple(ctx.needs_input_grad[:count])
        if ctx.stored:
            kept = ctx.saved_tensors  # once: checkpoints give them no second time
            gradients, students = kept[:count], kept[count:]
            by_row = ctx.call.reduction == 0
            factor = upstream.unsqueeze(ctx.call.class_dim) if by_row else upstream
            # Plain operations, which a compiler fuses with their neighbours, in the gradient's
            # memory. An operator could leave out a factor of 1, but only out of place: a copy.
            made = [(g * factor).to(g.dtype) for g in gradients]
        else:
            *tensors, symbolic = ctx.saved_tensors
            students = tensors[:count]
            call = ctx.call._replace(symbolic=symbolic)
            several = needs if count > 1 else ()
            recompute = operator(backend, family.name, "_backward")
            given = recompute(upstream, *tensors, *call, *several)
            made = list(given) if count > 1 else [given]
        if torch.is_grad_enabled():  # create_graph=True: to differentiate again must not be silent
            made = [once(g, upstream, x) for g, x in zip(made, students, strict=True)]
        return (*(g if need else None for g, need in zip(made, needs, strict=True)), *nothing)

    library.define(name + family.forward_schema(), tags=TAGS)
    torch.library.register_fake(f"kdkernels::{name}", fake_forward, lib=library)
    torch.library.register_autograd(
        f"kdkernels::{name}", differentiate, setup_context=setup_context, lib=library
    )
    guard(name, names)
    if not family.recomputes:
        return
    library.define(f"{name}_backward{family.backward_schema()}", tags=TAGS)
    torch.library.register_fake(f"kdkernels::{name}_backward", fake_backward, lib=library)
    torch.library.register_autograd(f"kdkernels::{name}_backward", no_double_backward, lib=library)
    guard(f"{name}_backward", ["upstream", *names])


def _implement_triton(family: Family) -> None:
    """Triton's kernels as implementations, found when they are first called."""
    fields = family.tensors + len(family.call._fields)

    def forward(*args: Any) -> Any:
        kernels = _backends.kernels("triton", family.name)
        call = family.call(*args[family.tensors : fields])
        loss, *others = kernels.forward(*args[: family.tensors], call, *args[fields:])
        # What is None has the dtype of its student, or of the loss.
        like = [*args[: len(family.students)], *(loss for _ in family.outputs)]
        return (
            loss,
            *(
                x.new_empty([0]) if made is None else made
                for made, x in zip(others, like, strict=True)
            ),
        )

    def backward(upstream: Tensor, *args: Any) -> Any:
        kernels = _backends.kernels("triton", family.name)
        call = family.call(*args[family.tensors : fields])
        return kernels.backward(upstream, *args[: family.tensors], call, *args[fields:])

    name = operator_name("triton", family.name)
    for key in ("CPU", "CUDA", "XPU"):
        library.impl(name, forward, key)
        if family.recomputes:
            library.impl(f"{name}_backward", backward, key)


for _family in FAMILIES.values():
    for _backend in ("native", "triton"):
        _define(_backend, _family)
    _implement_triton(_family)

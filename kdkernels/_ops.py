"""The operators: schemas once, with fake kernels and autograd, whoever implements them.

Each family has two operators, a forward that returns ``(loss, gradient)`` and a backward that
recomputes; each exists twice, ``kdkernels::row`` (compiled code, registered by the extension for
its devices) and ``kdkernels::triton_row``. ``torch.compile`` and ``torch.library.opcheck`` see
these operators; the eager path of ``_autograd`` calls the same kernels with less host time.

The schemas stand here and not in C++ because a pure-Python installation needs them too, and because
they must not exist twice; the extension only adds implementations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_PLAIN_TYPES = (Tensor, torch.nn.Parameter)


def traced(*tensors: Tensor) -> bool:
    """Whether someone looks on who must see operators: the compiler, a mode that records or fakes,
    a subclass of Tensor. Addresses and values are hidden from them, or not there at all."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return True
    for tensor in tensors:  # noqa: SIM110 - `any` would take twice the time, on every call
        if type(tensor) not in _PLAIN_TYPES:
            return True
    return False


_ROW = (
    "Tensor student, Tensor teacher, Tensor? target, str rule, float[] options, float temperature,"
    " float scale, bool standardize, int ignore_index, int class_dim, int reduction"
)
_CORRELATION = (
    "Tensor student, Tensor teacher, str rule, float inter, float intra, float tau, float eps,"
    " int class_dim, int reduction"
)
FAMILIES = {"row": _ROW, "correlation": _CORRELATION}


def operator_name(backend: str, family: str) -> str:
    """``row`` for compiled code, ``triton_row`` for Triton."""
    return family if backend == "native" else f"{backend}_{family}"


_library = torch.library.Library("kdkernels", "DEF")


def stores_gradient(student: Tensor, reduction: int) -> bool:
    """Whether the forward pass computes the gradient and the backward pass only scales it.

    float16 recomputes instead, because a gradient stored before the loss scale is applied would
    underflow; so does ``reduction='none'``, because the upstream gradient differs by row.
    """
    return reduction != 0 and student.dtype != torch.float16


def loss_dtype(student: Tensor, teacher: Tensor) -> torch.dtype:
    """float64 if either input is, else float32."""
    if student.dtype == torch.float64 or teacher.dtype == torch.float64:
        return torch.float64
    return torch.float32


def _fake_forward(student: Tensor, teacher: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    class_dim, reduction, need_gradient = args[-3:]
    shape = list(student.shape)
    del shape[class_dim]
    loss = student.new_empty(shape if reduction == 0 else [], dtype=loss_dtype(student, teacher))
    gradient = torch.empty_like(student) if need_gradient else student.new_empty([0])
    return loss, gradient


def _fake_backward(upstream: Tensor, student: Tensor, *args: Any) -> Tensor:
    return torch.empty_like(student)


def no_double_backward(ctx: Any, *grads: Any) -> Any:
    raise RuntimeError("kdkernels losses cannot be differentiated twice")


def _define(forward: str, schema: str) -> None:
    backward = f"{forward}_backward"
    _library.define(
        f"{forward}({schema}, bool need_gradient) -> (Tensor loss, Tensor gradient)",
        tags=(torch.Tag.pt2_compliant_tag,),
    )
    _library.define(
        f"{backward}(Tensor upstream, {schema}) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,)
    )
    torch.library.register_fake(f"kdkernels::{forward}", _fake_forward, lib=_library)
    torch.library.register_fake(f"kdkernels::{backward}", _fake_backward, lib=_library)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        student, teacher, *rest = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.need_gradient = rest[-1]
        tensors = [student, teacher, output[1]]
        ctx.rest = rest[:-1]
        if isinstance(rest[0], Tensor):
            tensors.append(rest[0])
            ctx.rest = (None, *rest[1:-1])
        ctx.save_for_backward(*tensors)

    def differentiate(ctx: Any, upstream: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
        nothing = (None,) * (len(ctx.rest) + 2)
        if upstream is None:
            return (None, *nothing)
        student, teacher, gradient, *target = ctx.saved_tensors
        if ctx.need_gradient:
            return (torch.ops.kdkernels.scale(gradient, upstream), *nothing)
        rest = (target[0], *ctx.rest[1:]) if target else ctx.rest
        op = getattr(torch.ops.kdkernels, backward)
        return (op(upstream, student, teacher, *rest), *nothing)

    torch.library.register_autograd(
        f"kdkernels::{forward}", differentiate, setup_context=setup_context, lib=_library
    )
    torch.library.register_autograd(f"kdkernels::{backward}", no_double_backward, lib=_library)


def _define_scale() -> None:
    _library.define(
        "scale(Tensor gradient, Tensor upstream) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,)
    )

    def scale(gradient: Tensor, upstream: Tensor) -> Tensor:
        return (gradient * upstream).to(gradient.dtype)

    _library.impl("scale", scale, "CompositeExplicitAutograd")
    torch.library.register_autograd("kdkernels::scale", no_double_backward, lib=_library)


def _triton(name: str) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        from . import triton as kernels

        return getattr(kernels, name)(*args)

    return call


for _family, _schema in FAMILIES.items():
    for _backend in ("native", "triton"):
        _define(operator_name(_backend, _family), _schema)
    for _suffix in ("", "_backward"):
        for _key in ("CPU", "CUDA", "XPU"):
            _library.impl(f"triton_{_family}{_suffix}", _triton(_family + _suffix), _key)
_define_scale()

"""The operators of the embedding losses: schemas, fake kernels and autograd (see ``_ops``).

``kdkernels::iekd`` returns the loss and the gradients of the two student factors, each an empty
tensor where it is not wanted; ``kdkernels::tuple_matching`` the loss and its gradient by the
student's distances, which is kept because it is small beside the embeddings' network. Each exists
twice, under these names for compiled code and as ``kdkernels::triton_...``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._autograd import _apply_once
from ._ops import _library, _triton, no_double_backward, operator_name

_IEKD = (
    "Tensor inheritance, Tensor exploration, Tensor teacher, float inheritance_weight,"
    " float exploration_weight, bool cosine, int reduction, bool need_inheritance,"
    " bool need_exploration"
)
_TUPLES = (
    "Tensor student, Tensor teacher, Tensor target, float margin, float temperature, float scale,"
    " int reduction, bool need_gradient"
)
_TAGS = (torch.Tag.pt2_compliant_tag,)


def working_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any is, else float32."""
    wide = any(tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if wide else torch.float32


def _gradient(like: Tensor, wanted: bool) -> Tensor:
    return torch.empty_like(like) if wanted else like.new_empty([0])


def _fake_iekd(inh: Tensor, exp: Tensor, teacher: Tensor, *args: Any) -> tuple[Tensor, ...]:
    loss = teacher.new_empty([], dtype=working_dtype(inh, exp, teacher))
    return loss, _gradient(inh, args[-2]), _gradient(exp, args[-1])


def _fake_iekd_backward(_: Tensor, inh: Tensor, exp: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return _gradient(inh, args[-2]), _gradient(exp, args[-1])


def _fake_tuples(student: Tensor, teacher: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return student.new_empty([]), _gradient(student, args[-1])


def _iekd_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(output[1], output[2])
    ctx.set_materialize_grads(False)
    ctx.args = inputs[3:7]
    ctx.stored = inputs[7] or inputs[8]
    ctx.save_for_backward(*(output[1:] if ctx.stored else inputs[:3]))


def _iekd_differentiate(ctx: Any, backward: str, upstream: Tensor | None) -> tuple[Any, ...]:
    nothing = (None,) * 7
    needs = ctx.needs_input_grad[:2]
    if upstream is None:
        return (None, None, *nothing)
    if ctx.stored:
        gradients = (torch.ops.kdkernels.scale(g, upstream) for g in ctx.saved_tensors)
    else:
        operator = getattr(torch.ops.kdkernels, backward)
        gradients = operator(upstream, *ctx.saved_tensors, *ctx.args, *needs)
    return (*(g if need else None for g, need in zip(gradients, needs, strict=True)), *nothing)


def _tuples_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], inputs[0])


def _tuples_differentiate(ctx: Any, upstream: Tensor | None, _: Any) -> tuple[Any, ...]:
    nothing = (None,) * 7
    if upstream is None:
        return (None, *nothing)
    gradient, student = ctx.saved_tensors
    gradient = torch.ops.kdkernels.scale(gradient, upstream)
    if torch.is_grad_enabled():  # create_graph=True: a second differentiation must not be silent
        gradient = _apply_once(gradient, upstream, student)
    return (gradient, *nothing)


def _define(backend: str) -> None:
    iekd, backward, tuples = (
        operator_name(backend, name) for name in ("iekd", "iekd_backward", "tuple_matching")
    )

    def differentiate(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Any, ...]:
        return _iekd_differentiate(ctx, backward, upstream)

    gradients = "Tensor inheritance_gradient, Tensor exploration_gradient"
    _library.define(f"{iekd}({_IEKD}) -> (Tensor loss, {gradients})", tags=_TAGS)
    _library.define(f"{backward}(Tensor upstream, {_IEKD}) -> (Tensor, Tensor)", tags=_TAGS)
    _library.define(f"{tuples}({_TUPLES}) -> (Tensor loss, Tensor gradient)", tags=_TAGS)
    fakes: dict[str, Callable[..., Any]] = {
        iekd: _fake_iekd,
        backward: _fake_iekd_backward,
        tuples: _fake_tuples,
    }
    for name, fake in fakes.items():
        torch.library.register_fake(f"kdkernels::{name}", fake, lib=_library)
    for name, derivative, context in (
        (iekd, differentiate, _iekd_context),
        (tuples, _tuples_differentiate, _tuples_context),
    ):
        torch.library.register_autograd(
            f"kdkernels::{name}", derivative, setup_context=context, lib=_library
        )
    torch.library.register_autograd(f"kdkernels::{backward}", no_double_backward, lib=_library)


for _backend in ("native", "triton"):
    _define(_backend)
# Not under the losses' names, which are those of their rules' modules.
for _name, _function in (
    ("iekd", "factors"),
    ("iekd_backward", "factors_backward"),
    ("tuple_matching", "tuples"),
):
    for _key in ("CPU", "CUDA", "XPU"):
        _library.impl(f"triton_{_name}", _triton(_function), _key)

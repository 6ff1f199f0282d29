"""The operators of rows of logits against K ids; ``_ops`` has those of the other families.

``topk`` gives each row's small logits and numbers (``reference/topk.py``), ``topk_gradient`` the
gradient by the logits, ``topk_gradient_into`` the same in a tensor that may be the logits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _backends
from ._calls import TOPK, TopKCall
from ._ops import TAGS, guard, library, no_double_backward, once, operator, operator_name

NUMBERS = 6
HARD, ENTROPY = 2, 3
"""Rows of the numbers, of which the first has a gradient."""
_MADE = "Tensor small, Tensor of_rows, Tensor small_upstream, Tensor? hard_upstream"
_NAMES = ("student", *(name.rstrip("?") for name in TOPK.constants))
_COUNT = len(_NAMES)


def dtype_of(student: Tensor, call: TopKCall) -> torch.dtype:
    """The dtype of what a row gives."""
    wide = call.wide or student.dtype == torch.float64
    return torch.float64 if wide else torch.float32


def _fake(student: Tensor, ids: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    dtype = dtype_of(student, TopKCall(*rest[_COUNT - 2 :]))
    rows, k = ids.shape
    return student.new_empty((rows, k + 1), dtype=dtype), student.new_empty(
        (NUMBERS, rows), dtype=dtype
    )


def _fake_gradient(
    small: Tensor, of_rows: Tensor, g: Tensor, hard: Any, student: Tensor, *rest: Any
) -> Tensor:
    return torch.empty_like(student)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    call = TopKCall(*inputs[_COUNT:])
    ctx.call = call._replace(symbolic=None)
    ctx.save_for_backward(*output, *inputs[:_COUNT], call.symbolic)


def _define(backend: str) -> None:
    name = operator_name(backend, TOPK.name)

    def differentiate(ctx: Any, g: Tensor | None, of_rows: Tensor | None) -> tuple[Any, ...]:
        small, numbers, *tensors, symbolic = ctx.saved_tensors
        nothing = (None,) * (_COUNT - 1 + len(TopKCall._fields))
        call = ctx.call._replace(symbolic=symbolic)
        hard = of_rows[HARD].contiguous() if call.hard and of_rows is not None else None
        if g is None and hard is None:
            return (None, *nothing)
        g = torch.zeros_like(small) if g is None else g.contiguous()
        made = operator(backend, TOPK.name, "_gradient")(small, numbers, g, hard, *tensors, *call)
        if torch.is_grad_enabled():
            made = once(made, g, tensors[0])
        return (made, *nothing)

    arguments = TOPK.arguments()
    library.define(f"{name}({arguments}) -> (Tensor small, Tensor of_rows)", tags=TAGS)
    torch.library.register_fake(f"kdkernels::{name}", _fake, lib=library)
    torch.library.register_autograd(
        f"kdkernels::{name}", differentiate, setup_context=_setup, lib=library
    )
    guard(name, _NAMES)
    library.define(f"{name}_gradient({_MADE}, {arguments}) -> Tensor", tags=TAGS)
    torch.library.register_fake(f"kdkernels::{name}_gradient", _fake_gradient, lib=library)
    torch.library.register_autograd(f"kdkernels::{name}_gradient", no_double_backward, lib=library)
    guard(f"{name}_gradient", ["small", "of_rows", "small_upstream", "hard_upstream", *_NAMES])
    library.define(f"{name}_gradient_into(Tensor(a!) into, {_MADE}, {arguments}) -> ()", tags=TAGS)


def _implement_triton() -> None:
    """Triton's kernels as implementations, found when they are first called."""

    def forward(*args: Any) -> Any:
        kernels = _backends.kernels("triton", TOPK.name)
        return kernels.forward(*args[:_COUNT], TopKCall(*args[_COUNT:]))

    def into(gradient: Tensor, *args: Any) -> None:
        kernels = _backends.kernels("triton", TOPK.name)
        made, call = args[: 4 + _COUNT], TopKCall(*args[4 + _COUNT :])
        kernels.backward(gradient, *made, call)

    def gradient(*args: Any) -> Tensor:
        made = torch.empty_like(args[4])
        into(made, *args)
        return made

    name = operator_name("triton", TOPK.name)
    for key in ("CPU", "CUDA", "XPU"):
        library.impl(name, forward, key)
        library.impl(f"{name}_gradient", gradient, key)
        library.impl(f"{name}_gradient_into", into, key)


for _backend in ("native", "triton"):
    _define(_backend)
_implement_triton()

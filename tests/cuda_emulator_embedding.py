"""The kernels of the embedding losses on CPU tensors; see ``cuda_emulator``."""

from __future__ import annotations

import ctypes
import functools

import torch
from cuda_emulator import CODES, SMALL, library, raise_error
from torch import Tensor

from kdkernels._dtypes import working_dtype

TRAVERSALS = ("lanes", "block", "stream", "general")
_DEVICE = [(n, ctypes.c_int64) for n in ("arch", "multiprocessors", "block_shared", "seed")]


class View(ctypes.Structure):
    """A tensor as samples of elements."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("type", ctypes.c_int64),
        ("stride", ctypes.c_int64),
        ("element_stride", ctypes.c_int64),
    ]


class FactorCall(ctypes.Structure):
    _fields_ = [
        ("inheritance", View),
        ("exploration", View),
        ("teacher", View),
        ("inheritance_gradient", View),
        ("exploration_gradient", View),
        ("upstream", ctypes.c_void_p),
        ("total", ctypes.c_void_p),
        ("samples", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("inheritance_weight", ctypes.c_double),
        ("exploration_weight", ctypes.c_double),
        ("cosine", ctypes.c_int64),
        ("reduction", ctypes.c_int64),
        *_DEVICE,
        ("plan", ctypes.c_int64 * 6),
    ]


class TupleCall(ctypes.Structure):
    _fields_ = [
        ("student", ctypes.c_void_p),
        ("teacher", ctypes.c_void_p),
        ("gradient", ctypes.c_void_p),
        ("total", ctypes.c_void_p),
        ("target", ctypes.c_void_p),
        ("batch", ctypes.c_int64),
        ("wide", ctypes.c_int64),
        ("reduction", ctypes.c_int64),
        ("margin", ctypes.c_double),
        ("temperature", ctypes.c_double),
        ("scale", ctypes.c_double),
        *_DEVICE,
        ("plan", ctypes.c_int64 * 4),
    ]


@functools.cache
def _function(name: str) -> ctypes._CFuncPtr:
    function = getattr(library(), name)
    function.restype = ctypes.c_char_p
    return function


def view(x: Tensor | None) -> View:
    if x is None:
        return View(type=CODES[torch.float32])
    return View(x.data_ptr(), CODES[x.dtype], *x.stride())


def _unwritten(x: Tensor) -> Tensor:
    return torch.full_like(x, float("nan"))


def factors(
    inheritance: Tensor,
    exploration: Tensor,
    teacher: Tensor,
    inheritance_weight: float = 50.0,
    exploration_weight: float = 50.0,
    cosine: bool = False,
    reduction: int = 1,
    need_inheritance: bool = True,
    need_exploration: bool = True,
    *,
    upstream: Tensor | None = None,
    need_loss: bool = True,
    traversal: str | None = None,
    device: dict[str, int] | None = None,
    seed: int = 1,
) -> tuple[Tensor, Tensor | None, Tensor | None, str]:
    """Loss, gradients and the traversal that ran; arguments as those of ``kdkernels::iekd``."""
    loss = torch.full((), float("nan"), dtype=working_dtype(inheritance, exploration, teacher))
    first = _unwritten(inheritance) if need_inheritance else None
    second = _unwritten(exploration) if need_exploration else None
    call = FactorCall(
        inheritance=view(inheritance),
        exploration=view(exploration),
        teacher=view(teacher),
        inheritance_gradient=view(first),
        exploration_gradient=view(second),
        upstream=None if upstream is None else upstream.data_ptr(),
        total=loss.data_ptr() if need_loss else None,
        samples=teacher.shape[0],
        width=teacher.shape[1],
        inheritance_weight=inheritance_weight,
        exploration_weight=exploration_weight,
        cosine=int(cosine),
        reduction=reduction,
        seed=seed,
        **(device or SMALL),
    )
    call.plan[0] = -1 if traversal is None else TRAVERSALS.index(traversal)
    raise_error(_function("emulate_factors")(b"iekd", ctypes.byref(call)))
    return loss, first, second, TRAVERSALS[call.plan[0]]


def tuples(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    margin: float = 0.2,
    temperature: float = 4.0,
    scale: float = 1.0,
    reduction: int = 1,
    need_gradient: bool = True,
    *,
    device: dict[str, int] | None = None,
    seed: int = 1,
) -> tuple[Tensor, Tensor | None, dict[str, int]]:
    """Loss, gradient and plan; arguments as those of ``kdkernels::tuple_matching``."""
    loss = torch.full((), float("nan"), dtype=student.dtype)
    gradient = _unwritten(student) if need_gradient else None
    call = TupleCall(
        student=student.data_ptr(),
        teacher=teacher.data_ptr(),
        gradient=None if gradient is None else gradient.data_ptr(),
        total=loss.data_ptr(),
        target=target.data_ptr(),
        batch=len(target),
        wide=int(student.dtype == torch.float64),
        reduction=reduction,
        margin=margin,
        temperature=temperature,
        scale=scale,
        seed=seed,
        **(device or SMALL),
    )
    raise_error(_function("emulate_tuples")(b"tuple_matching", ctypes.byref(call)))
    names = ("threads", "blocks", "shared", "scratch")
    return loss, gradient, dict(zip(names, call.plan, strict=True))

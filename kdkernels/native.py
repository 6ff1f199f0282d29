"""Lazy handles on the compiled extensions: what they offer, or why they are absent.

``kdkernels._C`` serves CPU tensors; ``kdkernels._cuda``, a library of its own that is loaded only
where CUDA tensors are used, serves those. Nothing is ever compiled here: the extensions are built
when the package is installed on a machine with a C++ compiler (and nvcc, and a torch with CUDA);
without them the package is pure Python and ``reason()`` says so.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import _backends, _cuda_code, _remedies, _toolchain
from ._calls import FAMILIES, TOPK_LOSS, CorrelationCall, RowCall, TopKLossCall
from ._checks import allocated
from ._dtypes import FLOATS, working_dtype

_extension: Any = None
"""The loaded ``_C``, for the calls below; ``extension()`` loads it."""
_cuda: Any = None
"""Likewise ``_cuda``."""


@functools.cache
def _load(device_type: str) -> tuple[ModuleType | None, str]:
    if device_type not in ("cpu", "cuda"):
        return None, f"compiled kernels run on CPU and CUDA tensors, these are on {device_type}"
    if os.environ.get("KDKERNELS_DISABLE_NATIVE"):
        return None, "KDKERNELS_DISABLE_NATIVE is set"
    return _load_cpu() if device_type == "cpu" else _load_cuda()


def _load_cpu() -> tuple[ModuleType | None, str]:
    try:
        from kdkernels import _C
    except ImportError as error:
        built = _toolchain.why_without_kernels()
        why = f"the build made none: {built}" if built else str(error)
        return (
            None,
            f"the extension kdkernels._C did not load ({why}); build it: "
            f"{_remedies.build_command()}",
        )
    if strays := stray(_C):
        warnings.warn(strays, RuntimeWarning, stacklevel=2)
    global _extension
    _extension = _C
    return _C, ""


def stray(module: ModuleType) -> str:
    """Complains of an extension that does not lie beside the package; empty if it does.

    In a copy of the sources without a library of its own, Python goes on to an editable
    installation, whose library may have been made from other sources.
    """
    here, there = Path(__file__).resolve(), Path(module.__file__ or "").resolve()
    if there.parent == here.parent:
        return ""
    return (
        f"kdkernels at {here.parent} runs the library of another copy, {there}, which may not "
        f"agree with it; build its own: {_remedies.build_command()}"
    )


def _load_cuda() -> tuple[ModuleType | None, str]:
    if torch.version.cuda is None:
        return None, "compiled kernels for GPUs need a torch built with CUDA"
    try:
        from kdkernels import _cuda as module
    except ImportError as error:
        return (
            None,
            f"the extension kdkernels._cuda did not load ({error}); with nvcc on PATH, build it: "
            f"KDKERNELS_CUDA=1 {_remedies.build_command()}",
        )
    if strays := stray(module):
        warnings.warn(strays, RuntimeWarning, stacklevel=2)
    if why := _why_no_device(module):
        return None, why
    global _cuda
    _cuda = module
    return module, ""


def _why_no_device(module: ModuleType) -> str:
    """Why the library does not run on the GPUs that are here; empty if it does.

    GPUs in use are tried; of the others no more is asked than what they say without a context.
    """
    built, driver = module.build_info(), module.driver()
    for index in range(torch.cuda.device_count()):
        name = torch.cuda.get_device_name(index)
        capability = torch.cuda.get_device_capability(index)
        if why := _cuda_code.why_not(built, driver, capability, name):
            return why
        if not torch._C._cuda_hasPrimaryContext(index):  # type: ignore[attr-defined]
            continue
        try:
            module.device_info(index)
        except RuntimeError as error:
            return f"kdkernels._cuda does not run on {name} ({error})"
    return ""


def extension(device_type: str = "cpu") -> ModuleType | None:
    """The pybind11 module for tensors of a device, or None."""
    return _load(device_type)[0]


def reason(device_type: str = "cpu") -> str:
    """Why the extension is absent; empty where it is loaded."""
    return _load(device_type)[1]


def has_rule(device_type: str, family: str, rule: str) -> bool:
    """Whether compiled code runs this rule for tensors of this device."""
    module = extension(device_type)
    return module is not None and rule in module.rules(family)


def scale_(gradient: Tensor, upstream: Tensor) -> Tensor:
    """Scale a private, dense gradient in place; the host reads the factor on the CPU only."""
    if gradient.is_cuda:
        return _scale_cuda(gradient, upstream)
    factor = upstream.item()
    return gradient if factor == 1.0 else gradient.mul_(factor)


def _scale_cuda(gradient: Tensor, upstream: Tensor) -> Tensor:
    if upstream.dtype not in (torch.float32, torch.float64):
        upstream = upstream.float()
    index = gradient.device.index
    _cuda.scale(
        gradient.data_ptr(),
        _CODES[gradient.dtype],
        gradient.numel(),
        upstream.data_ptr(),
        _CODES[upstream.dtype],
        index,
        torch._C._cuda_getCurrentRawStream(index),
    )
    return gradient


_CODES = {torch.float64: 0, torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}
"""The dtype codes of csrc/problem.h."""


_SCALARS = {dtype: torch.empty((), dtype=dtype, device="cpu") for dtype in FLOATS}
"""Patterns for the loss: ``empty_like`` costs less host time than ``empty``."""


def _addressable(student: Tensor, teacher: Tensor, class_dim: int) -> bool:
    """Whether the addresses may be handed over; ``_tracing.traced`` has been asked before."""
    return (
        class_dim == student.dim() - 1
        and student.is_contiguous()
        and teacher.is_contiguous()
        and not student.is_neg()  # a lazily negated view, which the dispatcher would resolve
        and not teacher.is_neg()
        and not torch._C._are_functorch_transforms_active()
        and (student.is_cpu or (student.is_cuda and student.numel() > 0))
        # The operators see to storages that were freed, and to tensors that know they are 0.
        and student.data_ptr() != 0
        and teacher.data_ptr() != 0
        and not (student.storage_offset() and student.untyped_storage().nbytes() == 0)
        and not (teacher.storage_offset() and teacher.untyped_storage().nbytes() == 0)
    )


def _where(student: Tensor) -> tuple[Any, tuple[int, ...]]:
    """The extension for a tensor, and what it needs to know of the device."""
    if student.is_cpu:
        return _extension, ()
    index = student.device.index
    return _cuda, (index, torch._C._cuda_getCurrentRawStream(index))


def _empty_loss(student: Tensor, dtype: torch.dtype) -> Tensor:
    if student.is_cpu:
        return torch.empty_like(_SCALARS[dtype])
    return student.new_empty((), dtype=dtype)


def _address(name: str, x: Tensor | None) -> int:
    """The address of what a row has one number of; 0 where there is none."""
    if x is None:
        return 0
    address = x.data_ptr()
    if address == 0 or x.storage_offset():  # freed since it was checked, or of no rows
        allocated(name, x)
    return address


def row(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    token_weight: Tensor | None,
    hard_token_weight: Tensor | None,
    row_temperature: Tensor | None,
    call: RowCall,
    need_gradient: bool,
    into: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``kdkernels::row``, past the operator machinery where the tensors are plain.

    A gradient is written ``into`` a tensor if one is given, which may be the student itself: of a
    row each class is read before it is written. Such tensors are plain and contiguous.
    """
    if not _addressable(student, teacher, call.class_dim):
        operator = torch.ops.kdkernels.row.default
        numbers = (target, token_weight, hard_token_weight, row_temperature)
        assert into is None, "a tensor whose address may not be handed over"
        return operator(student, teacher, *numbers, *call, need_gradient)
    shape = student.shape
    classes = shape[-1]
    dtype = working_dtype(student, teacher)
    one = call.reduction != 0
    loss = _empty_loss(student, dtype) if one else student.new_empty(shape[:-1], dtype=dtype)
    gradient = into
    if need_gradient and into is None:
        gradient = torch.empty_like(student)
    parts = student.new_empty((3, *shape[:-1]), dtype=dtype) if call.parts else None
    module, where = _where(student)
    module.row(
        student.data_ptr(),
        teacher.data_ptr(),
        0 if gradient is None else gradient.data_ptr(),
        (
            _address("target", target),
            _address("token_weight", token_weight),
            _address("hard_token_weight", hard_token_weight),
            _address("row_temperature", row_temperature),
        ),
        loss.data_ptr(),
        0 if parts is None else parts.data_ptr(),
        _CODES[student.dtype],
        _CODES[teacher.dtype],
        student.numel() // classes,
        classes,
        call,
        *where,
    )
    return loss, gradient, parts


def correlation(
    student: Tensor,
    teacher: Tensor,
    counted: Tensor | None,
    call: CorrelationCall,
    need_gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """``kdkernels::correlation``, past the operator machinery where the tensors are plain."""
    if not _addressable(student, teacher, call.class_dim):
        operator = torch.ops.kdkernels.correlation.default
        return operator(student, teacher, counted, *call, need_gradient)
    loss = _empty_loss(student, working_dtype(student, teacher))
    gradient = torch.empty_like(student) if need_gradient else None
    classes = student.shape[-1]
    module, where = _where(student)
    module.correlation(
        student.data_ptr(),
        teacher.data_ptr(),
        0 if gradient is None else gradient.data_ptr(),
        _address("counted", counted),
        loss.data_ptr(),
        _CODES[student.dtype],
        _CODES[teacher.dtype],
        student.numel() // classes,
        classes,
        call,
        *where,
    )
    return loss, gradient


def topk_loss(
    student: Tensor,
    ids: Tensor,
    buckets: Tensor,
    target: Tensor | None,
    token_weight: Tensor | None,
    hard_token_weight: Tensor | None,
    row_temperature: Tensor | None,
    call: TopKLossCall,
    need_gradient: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The reduced loss of contiguous rows on the CPU against K ids each, whose teacher's small
    logits are ``buckets`` in the working dtype; its gradient; the parts by row."""
    rows, classes = student.shape
    loss = torch.empty_like(_SCALARS[buckets.dtype])
    gradient = torch.empty_like(student) if need_gradient else None
    parts = buckets.new_empty((3, rows)) if call.dense.parts else None
    _extension.topk_loss(
        student.data_ptr(),
        0 if gradient is None else gradient.data_ptr(),
        ids.data_ptr(),
        buckets.data_ptr(),
        (
            _address("target", target),
            _address("token_weight", token_weight),
            _address("hard_token_weight", hard_token_weight),
            _address("row_temperature", row_temperature),
        ),
        loss.data_ptr(),
        0 if parts is None else parts.data_ptr(),
        _CODES[student.dtype],
        rows,
        classes,
        ids.shape[1],
        call.rows,
        call.dense,
    )
    return loss, gradient, parts


def _through_operator(family: str, suffix: str = "") -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        """The operator: its arguments are the tensors, the call's fields and the flags."""
        tensors = FAMILIES[family].tensors + (suffix == "_backward")
        operator = getattr(torch.ops.kdkernels, family + suffix).default
        return operator(*args[:tensors], *args[tensors], *args[tensors + 1 :])

    return run


def _never(*_: Any) -> Any:
    raise AssertionError("the gradient is computed in the forward pass")


_EAGER: dict[str, Callable[..., Any]] = {"row": row, "correlation": correlation}
for _name, _family in FAMILIES.items():
    _backends.register(
        "native",
        _name,
        _backends.Kernels(
            _EAGER.get(_name) or _through_operator(_name),
            _through_operator(_name, "_backward"),
            scale_,
        ),
    )
_backends.register("native", TOPK_LOSS, _backends.Kernels(topk_loss, _never, scale_))

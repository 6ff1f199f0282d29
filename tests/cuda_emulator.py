"""The CUDA kernels of csrc/cuda run on the CPU by the emulator in tests/emulator.

Every thread of a launch is a fiber and every barrier is real, so values, masks, addresses and
barriers are those of the GPU; only the compiler, the memory model and the clock are not.
``library`` compiles the kernels once, ``row_loss`` and ``correlation_loss`` call them on CPU
tensors, and ``instead_of_native`` puts them under the public functions.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdkernels import _backends, _calls
from kdkernels._dtypes import working_dtype

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "csrc" / "cuda"
BUILD = ROOT / "build" / "emulator"
CODES = {torch.float64: 0, torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}
TRAVERSALS = ("lanes", "block", "cluster", "stream", "split", "general")
SMALL = {"arch": 90, "multiprocessors": 4, "block_shared": 232448, "most_cluster": 16}
"""A device with an H200's multiprocessors, but few of them: fewer threads to emulate."""
_DIMS = 8


def compiler() -> str | None:
    """The C++ compiler, or None."""
    return next((n for n in (os.environ.get("CXX", "g++"), "clang++") if shutil.which(n)), None)


def build_facts() -> Any:
    """csrc/cuda/build.py, which lists the kernels and the rules that each is compiled for."""
    specification = importlib.util.spec_from_file_location("cuda_build", SOURCE / "build.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


TOYS = ("toy", "toy_decoupled")
"""The rules of tests/rules: ``../rules/toy.h`` is found by way of tests/emulator."""


def ninja_file(target: Path) -> str:
    """Every kernel of every rule, compiled as C++."""
    facts = build_facts()
    flags = f"-std=c++17 -O1 -fPIC -fvisibility=hidden -DKDK_EMULATED -I{ROOT}/tests/emulator"
    lines = [
        f"flags = {flags}",
        "rule compile",
        f"  command = {compiler()} $flags $extra -MMD -MF $out.d -x c++ -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {compiler()} -shared $in -o $out",
    ]
    objects = []

    def add(name: str, path: Path, extra: str = "") -> None:
        objects.append(f"{name}.o")
        lines.extend([f"build {name}.o: compile {path}", f"  extra = {extra}"])

    for unit in facts.units():
        add(unit.name, unit.source, f"-DKDK_RULE={unit.rule}" if unit.rule else "")
    for rule in TOYS:
        for source in sorted(SOURCE.glob("row_*.cu")):
            add(f"{source.stem}.{rule}", source, f"-DKDK_RULE={rule}")
    toys = " ".join(f"X({rule})" for rule in TOYS)
    macros = " ".join(
        f"'-D{macro} {toys}'" if macro.startswith("KDK_ROW_") else f"'-D{macro}'"
        for macro in facts.host_macros()
    )
    # The operators need PyTorch and CUDA's headers; everything else is plain C++.
    gpu = ("ops", "runtime")
    hosts = [path for path in facts.host_sources() if not path.stem.startswith(gpu)]
    harness = sorted((ROOT / "tests" / "emulator").glob("*.cpp"))
    for path in [*hosts, *(p for p in harness if not p.stem.startswith("check"))]:
        add(f"{path.parent.name}_{path.stem}", path, macros)
    return "\n".join([*lines, f"build {target}: link {' '.join(objects)}", f"default {target}", ""])


@functools.cache
def library() -> ctypes.CDLL:
    """The kernels, compiled if need be; one process compiles, others wait."""
    import fcntl

    BUILD.mkdir(parents=True, exist_ok=True)
    target = BUILD / "kernels.so"
    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (BUILD / "build.ninja").write_text(ninja_file(target))
        command = [sys.executable, "-m", "ninja", "-C", str(BUILD), "-j", "2"]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(result.stdout + result.stderr)
    loaded = ctypes.CDLL(str(target))
    loaded.emulate_row.restype = ctypes.c_char_p
    loaded.emulate_scale.restype = ctypes.c_char_p
    loaded.emulate_correlation.restype = ctypes.c_char_p
    loaded.emulated_launches.restype = ctypes.c_int64
    return loaded


def launches(run: Callable[[], object]) -> int:
    """How many kernels ``run`` launches."""
    before = library().emulated_launches()
    run()
    return library().emulated_launches() - before


@contextlib.contextmanager
def capture() -> Iterator[None]:
    """Calls in it are those of a stream that a CUDA graph captures."""
    library().emulate_capture(ctypes.c_int64(1))
    try:
        yield
    finally:
        library().emulate_capture(ctypes.c_int64(0))


class View(ctypes.Structure):
    """A tensor as rows of classes; ``kdkernels::Rows``."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("type", ctypes.c_int64),
        ("class_stride", ctypes.c_int64),
        ("dims", ctypes.c_int64),
        ("size", ctypes.c_int64 * _DIMS),
        ("stride", ctypes.c_int64 * _DIMS),
    ]


class RowCall(ctypes.Structure):
    _fields_ = [
        ("student", View),
        ("teacher", View),
        ("gradient", View),
        ("target", ctypes.c_void_p),
        ("token_weight", ctypes.c_void_p),
        ("hard_token_weight", ctypes.c_void_p),
        ("row_temperature", ctypes.c_void_p),
        ("upstream", ctypes.c_void_p),
        ("upstream_stride", ctypes.c_int64),
        ("loss", ctypes.c_void_p),
        ("total", ctypes.c_void_p),
        ("parts", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("classes", ctypes.c_int64),
        ("ignore_index", ctypes.c_int64),
        ("reduction", ctypes.c_int64),
        ("standardize", ctypes.c_int64),
        ("temperature", ctypes.c_double),
        ("scale", ctypes.c_double),
        ("hard", ctypes.c_double),
        ("options", ctypes.c_double * 4),
        ("arch", ctypes.c_int64),
        ("multiprocessors", ctypes.c_int64),
        ("block_shared", ctypes.c_int64),
        ("most_cluster", ctypes.c_int64),
        ("seed", ctypes.c_int64),
        ("plan", ctypes.c_int64 * 9),
    ]


def view(x: Tensor | None, class_dim: int) -> View:
    """The rows of a tensor, merged as csrc/bridge.h merges them."""
    if x is None:
        return View(data=None, type=1, class_stride=1, dims=1)
    levels: list[list[int]] = []
    for dim, size in enumerate(x.shape):
        if dim == class_dim or size == 1:
            continue
        if levels and levels[-1][1] == x.stride(dim) * size:
            levels[-1] = [levels[-1][0] * size, x.stride(dim)]
        else:
            levels.append([size, x.stride(dim)])
    levels = levels or [[1, 0]]
    made = View(x.data_ptr(), CODES[x.dtype], x.stride(class_dim), len(levels))
    for dim, (size, stride) in enumerate(levels):
        made.size[dim], made.stride[dim] = size, stride
    return made


def row_call(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    options: Sequence[float],
    *,
    temperature: float = 4.0,
    scale: float = 1.0,
    standardize: bool = False,
    ignore_index: int = -100,
    class_dim: int = -1,
    reduction: int = 1,
    token_weight: Tensor | None = None,
    row_temperature: Tensor | None = None,
    upstream: Tensor | None = None,
    need_gradient: bool = True,
    gradient: Tensor | None = None,
    device: dict[str, int] | None = None,
    seed: int = 1,
) -> tuple[RowCall, Tensor, Tensor | None]:
    """A call with the loss and the gradient, given or made, that it is to fill."""
    class_dim %= student.dim()
    shape = student.shape[:class_dim] + student.shape[class_dim + 1 :]
    dtype = working_dtype(student, teacher)
    loss = torch.full(shape if reduction == 0 else (), float("nan"), dtype=dtype)
    if gradient is None and need_gradient:
        gradient = torch.full_like(student, float("nan"))
    call = RowCall(
        student=view(student, class_dim),
        teacher=view(teacher, class_dim),
        gradient=view(gradient, class_dim),
        target=None if target is None else target.data_ptr(),
        token_weight=None if token_weight is None else token_weight.data_ptr(),
        row_temperature=None if row_temperature is None else row_temperature.data_ptr(),
        upstream=None if upstream is None else upstream.data_ptr(),
        upstream_stride=1 if upstream is not None and upstream.dim() else 0,
        loss=loss.data_ptr() if reduction == 0 else None,
        total=None if reduction == 0 else loss.data_ptr(),
        rows=student.numel() // student.shape[class_dim],
        classes=student.shape[class_dim],
        ignore_index=ignore_index,
        reduction=reduction,
        standardize=int(standardize),
        temperature=temperature,
        scale=scale,
        options=(ctypes.c_double * 4)(*options),
        seed=seed,
        **(device or SMALL),
    )
    return call, loss, gradient


def row_loss(
    rule: str,
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    options: list[float],
    *,
    traversal: str | None = None,
    **arguments: Any,
) -> tuple[Tensor, Tensor | None, str]:
    """Loss, gradient and traversal; arguments as those of ``kdkernels::row``."""
    student, teacher = student.resolve_neg(), teacher.resolve_neg()  # as the dispatcher does
    call, loss, gradient = row_call(student, teacher, target, options, **arguments)
    call.plan[0] = -1 if traversal is None else TRAVERSALS.index(traversal)
    raise_error(library().emulate_row(rule.encode(), ctypes.byref(call)))
    return loss, gradient, TRAVERSALS[call.plan[0]]


CORRELATION_TRAVERSALS = ("tile", "staged", "stream", "columns", "slices")


class CorrelationCall(ctypes.Structure):
    _fields_ = [
        ("student", View),
        ("teacher", View),
        ("gradient", View),
        ("upstream", ctypes.c_void_p),
        ("total", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("classes", ctypes.c_int64),
        ("reduction", ctypes.c_int64),
        ("inter", ctypes.c_double),
        ("intra", ctypes.c_double),
        ("tau", ctypes.c_double),
        ("eps", ctypes.c_double),
        ("arch", ctypes.c_int64),
        ("multiprocessors", ctypes.c_int64),
        ("block_shared", ctypes.c_int64),
        ("most_cluster", ctypes.c_int64),
        ("seed", ctypes.c_int64),
        ("plan", ctypes.c_int64 * 18),
    ]


def correlation_loss(
    rule: str,
    student: Tensor,
    teacher: Tensor,
    *,
    inter: float = 1.0,
    intra: float = 1.0,
    tau: float = 1.0,
    eps: float = 1e-8,
    class_dim: int = -1,
    reduction: int = 1,
    upstream: Tensor | None = None,
    need_gradient: bool = True,
    traversal: str | None = None,
    device: dict[str, int] | None = None,
    seed: int = 1,
) -> tuple[Tensor, Tensor | None, str]:
    """Loss, gradient and traversal; arguments as those of ``kdkernels::correlation``."""
    class_dim %= student.dim()
    student, teacher = student.resolve_neg(), teacher.resolve_neg()  # as the dispatcher does
    total = torch.full((), float("nan"), dtype=working_dtype(student, teacher))
    gradient = torch.full_like(student, float("nan")) if need_gradient else None
    call = CorrelationCall(
        student=view(student, class_dim),
        teacher=view(teacher, class_dim),
        gradient=view(gradient, class_dim),
        upstream=None if upstream is None else upstream.data_ptr(),
        total=total.data_ptr(),
        rows=student.numel() // student.shape[class_dim],
        classes=student.shape[class_dim],
        reduction=reduction,
        inter=inter,
        intra=intra,
        tau=tau,
        eps=eps,
        seed=seed,
        **(device or SMALL),
    )
    call.plan[0] = -1 if traversal is None else CORRELATION_TRAVERSALS.index(traversal)
    raise_error(library().emulate_correlation(rule.encode(), ctypes.byref(call)))
    return total, gradient, CORRELATION_TRAVERSALS[call.plan[0]]


def scale_(gradient: Tensor, upstream: Tensor) -> Tensor:
    """``kdkernels.native.scale_`` on the emulated device."""
    upstream = upstream.to(torch.float64 if upstream.dtype == torch.float64 else torch.float32)
    raise_error(
        library().emulate_scale(
            ctypes.c_void_p(gradient.data_ptr()),
            ctypes.c_int64(CODES[gradient.dtype]),
            ctypes.c_int64(gradient.numel()),
            ctypes.c_void_p(upstream.data_ptr()),
            ctypes.c_int64(CODES[upstream.dtype]),
        )
    )
    return gradient


def _row(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    token_weight: Tensor | None,
    hard_token_weight: Tensor | None,
    row_temperature: Tensor | None,
    call: _calls.RowCall,
    need: bool,
) -> Any:
    if student.numel() == 0:
        return _nothing(student, teacher, call)
    numbers = {"token_weight": token_weight, "row_temperature": row_temperature}
    options = _row_options(call) | numbers | {"need_gradient": need}
    return (*row_loss(call.rule, student, teacher, target, **options)[:2], None)


def _row_options(call: _calls.RowCall) -> dict[str, Any]:
    temperature, scale, hard, *options = call.numbers
    assert hard == 0.0 and not call.parts  # Triton's
    named = {"temperature": temperature, "scale": scale, "options": options}
    same = ("standardize", "ignore_index", "class_dim", "reduction")
    return named | {name: getattr(call, name) for name in same}


def _row_backward(
    upstream: Tensor,
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    token_weight: Tensor | None,
    hard_token_weight: Tensor | None,
    row_temperature: Tensor | None,
    call: _calls.RowCall,
) -> Tensor:
    if student.numel() == 0:
        return torch.empty_like(student)
    upstream = upstream.to(working_dtype(student, teacher)).contiguous()
    numbers = {"token_weight": token_weight, "row_temperature": row_temperature}
    options = _row_options(call) | numbers
    gradient = row_loss(call.rule, student, teacher, target, upstream=upstream, **options)[1]
    assert gradient is not None
    return gradient


def _correlation_options(call: _calls.CorrelationCall) -> dict[str, Any]:
    named = dict(zip(("inter", "intra", "tau", "eps"), call.numbers, strict=True))
    return {**named, "class_dim": call.class_dim, "reduction": call.reduction}


def _correlation(
    student: Tensor,
    teacher: Tensor,
    counted: Tensor | None,
    call: _calls.CorrelationCall,
    need: bool,
) -> Any:
    if student.numel() == 0:
        return _nothing(student, teacher, call)
    assert counted is None  # Triton's
    options = _correlation_options(call)
    return correlation_loss(call.rule, student, teacher, **options, need_gradient=need)[:2]


def _correlation_backward(
    upstream: Tensor,
    student: Tensor,
    teacher: Tensor,
    counted: Tensor | None,
    call: _calls.CorrelationCall,
) -> Tensor:
    if student.numel() == 0:
        return torch.empty_like(student)
    assert counted is None
    upstream = upstream.to(working_dtype(student, teacher)).contiguous()
    options = _correlation_options(call)
    gradient = correlation_loss(call.rule, student, teacher, upstream=upstream, **options)[1]
    assert gradient is not None
    return gradient


def _nothing(student: Tensor, teacher: Tensor, call: Any) -> Any:
    shape = student.shape[: call.class_dim] + student.shape[call.class_dim + 1 :]
    loss = torch.zeros(shape if call.reduction == 0 else (), dtype=working_dtype(student, teacher))
    return (loss, torch.empty_like(student), None)[: 3 if isinstance(call, _calls.RowCall) else 2]


@contextlib.contextmanager
def instead_of_native() -> Iterator[None]:
    """Inside, eager calls with ``backend='native'`` run the CUDA kernels on the emulated device."""
    before = {family: _backends.kernels("native", family) for family in ("row", "correlation")}
    instead = {
        "row": _backends.Kernels(_row, _row_backward, scale_),
        "correlation": _backends.Kernels(_correlation, _correlation_backward, scale_),
    }
    for family, kernels in instead.items():
        _backends.register("native", family, kernels)
    try:
        yield
    finally:
        for family, kernels in before.items():
            _backends.register("native", family, kernels)


def raise_error(text: Any) -> None:
    if text:
        raise RuntimeError(text.decode())

"""What the GPU tests share: where they run, sizes, plans, captured steps, counted launches.

``KDKERNELS_GPU_REHEARSAL=1`` runs their bodies on the CPU with small sizes and stand-ins for
streams and graphs, so that a mistake in a test is found without a GPU. A rehearsal proves nothing
about the kernels.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import cuda_emulator
import pytest
import test_cuda_plan
import torch
from cases import Case
from torch import Tensor

from benchmarks.gpu_clock import CudaClock
from kdkernels import _dispatch, native
from kdkernels.registry import SPECS, LossSpec

REHEARSAL = os.environ.get("KDKERNELS_GPU_REHEARSAL") == "1" and not torch.cuda.is_available()
DEVICE = "cpu" if REHEARSAL else "cuda"
PRESENT = REHEARSAL or torch.cuda.is_available()
KERNELS = ("native", "triton")
CODES = {torch.float64: 0, torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}
ROW_TRAVERSALS = ("lanes", "block", "cluster", "stream", "split", "general")
CORRELATION_TRAVERSALS = ("tile", "staged", "stream", "columns", "slices")
H200 = dict(zip(cuda_emulator.SMALL, test_cuda_plan.DEVICES["H200"], strict=True))
"""What the plans know of a device, in the order of their arguments."""

needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not PRESENT, reason="no CUDA device: nothing of this file ran"),
]
"""``pytestmark`` of each file."""


def cases(specs: Iterable[LossSpec], backends: Iterable[str] = KERNELS) -> list[Any]:
    """A parameter for each loss and backend, skipped with the reasons where it cannot run."""
    made = []
    for spec in specs:
        for backend in backends:
            reasons = ["no CUDA device"] if not PRESENT else []
            if PRESENT:
                reasons = _dispatch.why_not(spec, backend, torch.empty(0, device=DEVICE))
            marks = [pytest.mark.skip(reason="; ".join(reasons))] if reasons else []
            case = Case(spec, backend, DEVICE)
            made.append(pytest.param(case, id=f"{spec.name}-{backend}", marks=marks))
    return made


def ignores(case: Case) -> bool:
    """Whether rows can be ignored; compiled CUDA kernels of losses that couple them ignore none."""
    return case.spec.takes_target and (case.spec.by_row or case.backend != "native")


def each_case(specs: Iterable[LossSpec], backends: Iterable[str] = KERNELS) -> Any:
    return pytest.mark.parametrize("case", cases(specs, backends))


def specs(*names: str) -> list[LossSpec]:
    return [SPECS[name] for name in names]


def pick(real: Any, rehearsed: Any) -> Any:
    return rehearsed if REHEARSAL else real


def shrink(size: tuple[int, ...]) -> tuple[int, ...]:
    """A size for the CPU; that of the GPU otherwise."""
    if not REHEARSAL:
        return size
    return tuple(min(n, 16 if len(size) > 2 else (6, 24)[index]) for index, n in enumerate(size))


def facts() -> dict[str, int]:
    """The device that the plans are made for."""
    module = None if REHEARSAL else native.extension("cuda")
    if module is None:
        return H200
    found = module.device_info(torch.cuda.current_device())
    return {name: found[name] for name in H200}


def like_an_h200() -> bool:
    found = facts()
    return found["arch"] >= 90 and found["multiprocessors"] >= 100


def plan(
    family: str,
    size: tuple[int, ...],
    dtype: torch.dtype,
    *,
    dense: bool = True,
    alike: bool | None = None,
    aligned: bool | None = None,
    adjacent: bool = False,
    plain: bool | None = None,
    run: int | None = None,
) -> str:
    """The traversal that csrc/cuda/plan.cpp takes; classes last, or second of four dimensions.

    ``run``: rows that copies of whole packs bring in together; all of contiguous ones.
    """
    module = native.extension("cpu")
    if module is None:
        pytest.skip(f"the plans are asked of the CPU's extension: {native.reason('cpu')}")
    classes = size[1]
    rows = math.prod(size) // classes
    if plain is None:
        plain = dtype != torch.float64
    if alike is None:
        alike = dense
    if aligned is None:
        aligned = alike and classes * dtype.itemsize % 16 == 0
    asked, others = (rows, classes, CODES[dtype], dense), (aligned, adjacent, plain)
    device = facts().values()
    if family == "row":
        return ROW_TRAVERSALS[module.cuda_row_plan(*asked, alike, *others, *device)["traversal"]]
    if run is None:
        run = rows if dense else 0
    chosen = module.cuda_correlation_plan(*asked, *others, run, *device)
    return CORRELATION_TRAVERSALS[chosen["traversal"]]


def inputs(
    size: tuple[int, ...], dtype: torch.dtype, seed: int = 0, teacher_dtype: Any = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Student, teacher and targets, made on the device."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    how: dict[str, Any] = {"generator": generator, "device": DEVICE}
    student = torch.randn(size, dtype=dtype, **how).mul_(2)
    teacher = torch.randn(size, dtype=dtype, **how).mul_(2).add_(student, alpha=0.5)
    target = torch.randint(size[1], (size[0], *size[2:]), **how)
    return student, teacher.to(teacher_dtype or dtype), target


def synchronize() -> None:
    if not REHEARSAL:
        torch.cuda.synchronize()


def one(loss_dtype: torch.dtype = torch.float32) -> Tensor:
    """An upstream gradient that autograd need not make."""
    return torch.ones((), dtype=loss_dtype, device=DEVICE)


def step(case: Case, student: Tensor, *rest: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """Loss and gradient with nothing else on the device: the leaf's upstream is made before."""
    upstream = options.pop("upstream", None)
    loss = case(student, *rest, **options)
    (gradient,) = torch.autograd.grad(loss, student, upstream)
    return loss.detach(), gradient


@contextlib.contextmanager
def no_synchronization() -> Iterator[None]:
    """An operation that makes the host wait for the device raises."""
    if REHEARSAL:
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def long_kernel() -> None:
    """Some ten milliseconds of nothing on the current stream."""
    if not REHEARSAL:
        torch.cuda._sleep(20_000_000)


def side_stream() -> Any:
    return contextlib.nullcontext() if REHEARSAL else torch.cuda.Stream()


def on(stream: Any) -> Any:
    return contextlib.nullcontext() if REHEARSAL else torch.cuda.stream(stream)


def wait_for(stream: Any) -> None:
    """The current stream waits for another one."""
    if not REHEARSAL:
        torch.cuda.current_stream().wait_stream(stream)


class Captured:
    """A step as a CUDA graph; its tensors keep their addresses from replay to replay."""

    def __init__(self, body: Callable[[], tuple[Tensor, ...]]) -> None:
        self.body = body
        self.graph: Any = None
        self.results: tuple[Tensor, ...] = ()
        if REHEARSAL:
            return
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                body()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.results = body()

    def replay(self) -> tuple[Tensor, ...]:
        if self.graph is None:
            return self.body()
        self.graph.replay()
        return self.results


def launched(body: Callable[[], object]) -> list[str]:
    """The kernels, copies and fills that a step ran on the device, by name; nothing on the CPU."""
    if REHEARSAL:
        body()
        return []
    from benchmarks.gpu_clock import CudaClock

    for _ in range(2):  # kernels are compiled and loaded, the profiler has begun once
        names = [launch.name for launch in CudaClock().launches(body, steps=1)]
    if not names:
        pytest.skip("the profiler reports no kernel on this machine")
    return names


def peak(body: Callable[[], object]) -> int:
    """The most bytes that a step holds beyond what it found."""
    if REHEARSAL:
        body()
        return 0
    return CudaClock().peak(body)


def need_memory(gigabytes: float) -> None:
    """Skip where the device has less than this free."""
    if REHEARSAL:
        return
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gigabytes:
        pytest.skip(f"needs {gigabytes:.0f} GiB of the device's memory, {free:.0f} are free")

"""Each traversal of csrc/cuda by name: chosen by the plan, launched, and right.

The shapes reach all of them on an H200, whatever the plans' thresholds: a test counts. Values and
gradients are judged by the oracle; the kernel that ran is read from the profiler.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import Case, row_weights, same_bits, value_and_grad
from gpu_support import (
    CORRELATION_TRAVERSALS,
    DEVICE,
    REHEARSAL,
    ROW_TRAVERSALS,
    each_case,
    inputs,
    launched,
    like_an_h200,
    need_memory,
    needs_gpu,
    plan,
    shrink,
    specs,
    step,
)
from layouts import LAYOUTS, target_for
from oracle import verify
from torch import Tensor

pytestmark = needs_gpu
F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16

ROW_SHAPES: list[tuple[tuple[int, ...], torch.dtype]] = [
    ((64, 10), F32),
    ((256, 100), F32),
    ((33, 64), BF16),
    ((37, 65), F16),
    ((65, 333), BF16),
    ((257, 1000), F32),
    ((130, 1000), BF16),
    ((31, 1001), F32),
    ((64, 8192), BF16),
    ((33, 8191), F32),
    ((130, 8184), F16),
    ((9, 1025), F32),
    ((140, 4096), F16),
    ((33, 5003), BF16),
    ((17, 32000), BF16),
    ((140, 32000), F32),
    ((33, 128256), BF16),
    ((67, 21848), F16),
    ((20, 262144), BF16),
    ((20, 524288), F32),
    ((18, 1048576), BF16),
    ((1, 131080), BF16),
    ((4, 1048576), F32),
    ((2, 262144), F16),
    ((17, 50257), BF16),
    ((9, 333), F64),
    ((3, 9001), F64),
]
CORRELATION_SHAPES: list[tuple[tuple[int, ...], torch.dtype]] = [
    ((64, 10), F32),
    ((256, 100), F32),
    ((5001, 150), BF16),
    ((333, 19), F16),
    ((1024, 1000), F32),
    ((77, 513), BF16),
    ((64, 4096), BF16),
    ((33, 32000), F32),
    ((21, 2057), F16),
    ((150, 40), F64),
    ((4, 262144), F32),
    ((4500, 1000), F32),
    ((8200, 1001), BF16),
    ((2049, 4104), F16),
    ((130, 21841), F32),
    ((520, 21841), BF16),
    ((301, 32000), BF16),
    ((70, 65536), F32),
    ((70, 128256), BF16),
]


def shapes(table: list[Any]) -> Any:
    names = [f"{'x'.join(map(str, s))}-{str(d).removeprefix('torch.')}" for s, d in table]
    return pytest.mark.parametrize(("size", "dtype"), table, ids=names)


def kernel(family: str, traversal: str) -> str:
    """How the name of a traversal's kernel begins."""
    if family == "row":
        return f"row_{traversal}"
    named = traversal in ("stream", "columns", "slices")
    return f"correlate_{traversal}" if named else "correlate<"


def check_launched(family: str, traversal: str, case: Case, *args: Any, **options: Any) -> None:
    if REHEARSAL:
        return
    student = args[0].detach().requires_grad_()
    names = launched(lambda: step(case, student, *args[1:], **options))
    wanted = kernel(family, traversal)
    assert any(name.startswith(wanted) for name in names), f"{wanted} is not among {names}"


def test_the_shapes_reach_every_traversal() -> None:
    if not like_an_h200():
        pytest.skip("the shapes are chosen for an H200")
    # Contiguous rows begin alike; `block` is for others, in test_dense_rows_lie_anywhere.
    assert {plan("row", *shape) for shape in ROW_SHAPES} == set(ROW_TRAVERSALS) - {"block"}
    assert {plan("correlation", *s) for s in CORRELATION_SHAPES} == set(CORRELATION_TRAVERSALS)


def shape_of(traversal: str, least_rows: int = 2) -> tuple[tuple[int, ...], torch.dtype]:
    """The smallest shape of the list that this device walks by a traversal."""
    able = [x for x in ROW_SHAPES if x[0][0] >= least_rows and plan("row", *x) == traversal]
    if not able:
        pytest.skip(f"no shape of the list is walked by {traversal} on this device")
    return min(able, key=lambda x: math.prod(x[0]))


@shapes(ROW_SHAPES)
@each_case(specs("kd", "dkd", "aekt"), ["native"])
def test_rows(case: Case, size: tuple[int, ...], dtype: torch.dtype) -> None:
    if case.spec.name == "aekt" and math.prod(size) > 2**21:
        pytest.skip("DKD has walked rows of this length")
    need_memory(math.prod(size) * 8 * 40 / 2**30)
    student, teacher, target = inputs(shrink(size), dtype)
    verify(case, student, teacher, target)
    check_launched("row", plan("row", size, dtype), case, student, teacher, target)


@shapes(CORRELATION_SHAPES)
@each_case(specs("dist"), ["native"])
def test_correlations(case: Case, size: tuple[int, ...], dtype: torch.dtype) -> None:
    student, teacher, _ = inputs(shrink(size), dtype)
    verify(case, student, teacher)
    check_launched("correlation", plan("correlation", size, dtype), case, student, teacher)


def misaligned(x: Tensor) -> Tensor:
    """Rows that begin one element off, in storage whose other elements are NaN."""
    base = torch.full((x.shape[0], x.shape[1] + 8), math.nan, dtype=x.dtype, device=x.device)
    return base[:, 1 : 1 + x.shape[1]].copy_(x)


def spaced(x: Tensor) -> Tensor:
    """Aligned rows with NaN between them."""
    gap = 16 // x.element_size()
    base = torch.full((x.shape[0], x.shape[1] + gap), math.nan, dtype=x.dtype, device=x.device)
    return base[:, : x.shape[1]].copy_(x)


STRIDED: dict[str, Callable[[Tensor], Tensor]] = {"misaligned": misaligned, "spaced": spaced}


@pytest.mark.parametrize("dtype", (F32, F16, BF16), ids=str)
@pytest.mark.parametrize("classes", (64, 1000, 4096, 16384), ids=str)
@pytest.mark.parametrize("lay", STRIDED.values(), ids=STRIDED)
@each_case(specs("kd", "dkd", "dist"), ["native"])
def test_dense_rows_lie_anywhere(
    case: Case, lay: Callable[[Tensor], Tensor], classes: int, dtype: torch.dtype
) -> None:
    """The vector loads' alignment, and nothing read beside a row."""
    student, teacher, target = inputs(shrink((21, classes)), dtype)
    verify(case, lay(student), lay(teacher), target)
    verify(case, lay(student), teacher, target)
    if lay is misaligned and case.spec.by_row:  # as the gradient is not
        chosen = plan("row", (21, classes), dtype, alike=False)
        check_launched("row", chosen, case, lay(student), lay(teacher), target)


@pytest.mark.parametrize("dtype", (F32, BF16), ids=str)
@pytest.mark.parametrize("layout", ("transposed", "image", "image_channels_last", "tokens_shifted"))
@each_case(specs("kd", "dkd", "aekt", "dist"), ["native"])
def test_other_strides(case: Case, layout: str, dtype: torch.dtype) -> None:
    for classes in (19, 150, 1003):
        student, teacher, target = inputs((12, classes), dtype)
        student, teacher = LAYOUTS[layout](student), LAYOUTS[layout](teacher)
        verify(case, student, teacher, target_for(student, target))


@pytest.mark.parametrize("size", ((2, 19, 64, 96), (3, 150, 16, 33), (2, 19, 9, 7)), ids=str)
@each_case(specs("kd", "dkd", "dist"), ["native"])
def test_dense_prediction(case: Case, size: tuple[int, ...]) -> None:
    """(N, C, H, W), read in place: ``general`` with adjacent rows; ``columns``, or ``staged`` where
    a plane of pixels is not whole packs."""
    student, teacher, target = inputs(shrink(size), F32)
    verify(case, student, teacher, target)
    family = "row" if case.spec.by_row else "correlation"
    pixels = student.shape[2] * student.shape[3]
    run = pixels if pixels % 4 == 0 else 0
    chosen = plan(family, tuple(student.shape), F32, dense=False, adjacent=True, run=run)
    assert chosen == ("general" if case.spec.by_row else "columns" if run else "staged")
    check_launched(family, chosen, case, student, teacher, target)


@pytest.mark.parametrize(
    "dtypes", ((BF16, F32), (F32, F16), (F16, F64), (F64, F32)), ids=lambda d: f"{d[0]}-{d[1]}"
)
@pytest.mark.parametrize("classes", (100, 3000))
@each_case(specs("kd", "dkd", "dist"), ["native"])
def test_mixed_dtypes(case: Case, dtypes: tuple[Any, Any], classes: int) -> None:
    student, teacher, target = inputs(shrink((21, classes)), dtypes[0], 0, dtypes[1])
    verify(case, student, teacher, target)


@pytest.mark.parametrize("classes", (100, 5000))
@each_case(specs("kd", "dkd"), ["native"])
def test_standardized(case: Case, classes: int) -> None:
    student, teacher, target = inputs(shrink((21, classes)), F32)
    verify(case, student, teacher, target, standardize=True)


@pytest.mark.parametrize("traversal", ROW_TRAVERSALS)
@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
@each_case(specs("kd", "dkd"), ["native"])
def test_reductions_upstream_and_ignored_rows(case: Case, reduction: str, traversal: str) -> None:
    """Gradients other than 1, for each row and for all; ignored rows that hold NaN."""
    size, dtype = shape_of(traversal)
    student, teacher, target = inputs(shrink(size), dtype)
    shape = target.shape if reduction == "none" else ()
    upstream = row_weights(torch.empty(shape, device=DEVICE)) if shape else None
    if upstream is None:
        upstream = torch.tensor(-2.5, device=DEVICE)
    verify(case, student, teacher, target, reduction=reduction, upstream=upstream)

    target[1] = -100
    options = {"reduction": reduction, "upstream": upstream, "target": target}
    expected = value_and_grad(case, student, teacher, **options)
    student[1], teacher[1] = math.nan, math.inf
    actual = value_and_grad(case, student, teacher, **options)
    assert all(same_bits(a, b) for a, b in zip(actual, expected, strict=True))
    assert not actual[1][1].any() and actual[1][0].any()


@pytest.mark.parametrize("traversal", [t for t in ROW_TRAVERSALS if t != "split"])
@each_case(specs("kd", "dkd"), ["native"])
def test_a_row_does_not_depend_on_its_batch(case: Case, traversal: str) -> None:
    size, dtype = shape_of(traversal, least_rows=9)
    student, teacher, target = inputs(shrink(size), dtype)
    order = torch.arange(len(student), device=DEVICE)
    # Of very long rows fewer would be split among blocks, which the contract excepts.
    order = order.flip(0) if size[1] >= 131072 else order[1::2]
    ones = torch.ones(len(student), device=DEVICE)
    how = {"reduction": "none"}
    whole = value_and_grad(case, student, teacher, target, upstream=ones, **how)
    batch = (student[order], teacher[order], target[order])
    part = value_and_grad(case, *batch, upstream=ones[order], **how)
    assert all(same_bits(a, b[order]) for a, b in zip(part, whole, strict=True))

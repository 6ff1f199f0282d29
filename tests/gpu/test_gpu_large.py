"""Many gigabytes: memory, offsets beyond 2^31, and agreement with a chunked float64 reference.

check.py runs them one after another; beside each other they may skip for want of memory.
"""

from __future__ import annotations

import math

import pytest
import torch
from cases import LOSSES, ROW_LOSSES, Case, same_bits
from gpu_support import (
    DEVICE,
    each_case,
    inputs,
    need_memory,
    needs_gpu,
    one,
    peak,
    pick,
    shrink,
    specs,
    step,
)

from benchmarks.gpu_truth import errors, sample, truth

pytestmark = needs_gpu
F32, BF16 = torch.float32, torch.bfloat16
BOUNDS = {F32: 1e-4, BF16: 8e-3}
"""Relative errors of values, norms and the largest element; bfloat16 rounds gradients by 2e-3."""
PEAKS = {"kd": [(4096, 32000), (2048, 128256)], "dist": [(2_000_000, 150), (8192, 128256)]}


@pytest.mark.parametrize("dtype", (F32, BF16), ids=str)
@each_case(LOSSES)
def test_one_gradient_beside_the_inputs(case: Case, dtype: torch.dtype) -> None:
    for size in PEAKS["dist" if case.spec.name == "dist" else "kd"]:
        need_memory(math.prod(size) * dtype.itemsize * 3.2 / 2**30 + 2)
        student, teacher, target = inputs(shrink(size), dtype)
        leaf = student.requires_grad_()
        upstream = one()
        bytes_of_one = student.numel() * student.element_size()

        def body(leaf=leaf, rest=(teacher, target), upstream=upstream) -> None:  # type: ignore[no-untyped-def]
            step(case, leaf, *rest, upstream=upstream)

        body()
        used = peak(body)
        # What is handed of each row from one launch, or pass, to the next.
        native = case.backend == "native"
        each = 64 if not native else 24 if case.spec.name == "dist" else 0
        bound = 1.02 * bytes_of_one + each * math.prod(size) // size[1]
        assert used <= bound, f"{size}: {used / bytes_of_one:.3f} gradients"


LARGE = [
    ("8192x128256", (8192, 128256), BF16, ("kd", "dkd", "aekt")),
    ("4x1048576", (4, 1048576), F32, ("kd", "dkd", "dist")),
    ("4096x32000", (4096, 32000), F32, ("kd", "dkd", "dist")),
    ("2000000x150", (2_000_000, 150), F32, ("dist", "kd")),
    ("2000000x150-bf16", (2_000_000, 150), BF16, ("dist",)),
    ("16x19x512x1024", (16, 19, 512, 1024), F32, ("dist", "kd")),
    ("8192x262144", (8192, 262144), BF16, ("kd",)),
]


@pytest.mark.parametrize(
    ("case", "size", "dtype"),
    [
        pytest.param(*param.values, size, dtype, id=f"{param.id}-{name}", marks=param.marks)
        for name, size, dtype, losses in LARGE
        for param in each_case(specs(*losses)).args[1]
    ],
)
def test_agrees_with_the_chunked_reference(
    case: Case, size: tuple[int, ...], dtype: torch.dtype
) -> None:
    need_memory(math.prod(size) * dtype.itemsize * 3.5 / 2**30 + 8)
    student, teacher, target = inputs(shrink(size), dtype)
    expected = truth(case.spec.name, student, teacher, target if case.spec.needs_target else None)
    loss, gradient = step(case, student.requires_grad_(), teacher, target)
    found = errors(loss, gradient, expected)
    assert expected.gradient.any()
    assert all(size <= BOUNDS[dtype] for size in found.values()), found


@each_case(ROW_LOSSES)
def test_rows_beyond_two_to_the_31_elements(case: Case) -> None:
    """70000 x 32768 bfloat16: rows at both ends are those of a small batch, bit for bit."""
    size = pick((70_000, 32768), (9, 64))
    need_memory(20)
    student, teacher, target = inputs(size, BF16)
    loss, gradient = step(case, student.requires_grad_(), teacher, target, reduction="sum")
    rows = sample(size[0], 40).to(DEVICE)
    few = student.detach()[rows].requires_grad_()
    args = (teacher[rows], target[rows])
    _, expected = step(case, few, *args, reduction="sum")
    assert same_bits(gradient[rows], expected)
    assert torch.isfinite(loss)
    del gradient
    by_row = case(student.detach(), teacher, target, reduction="none")
    alone = case(few.detach(), *args, reduction="none")
    assert same_bits(by_row[rows], alone)
    torch.testing.assert_close(by_row.double().sum().float(), loss, rtol=1e-5, atol=0)


@each_case(specs("dist"))
def test_correlations_beyond_two_to_the_31_elements(case: Case) -> None:
    size = pick((70_000, 32768), (9, 64))
    need_memory(24)
    student, teacher, _ = inputs(size, BF16)
    expected = truth("dist", student, teacher, None)
    loss, gradient = step(case, student.requires_grad_(), teacher)
    found = errors(loss, gradient, expected)
    assert all(size <= BOUNDS[BF16] for size in found.values()), found


@each_case(LOSSES)
def test_strides_beyond_two_to_the_31(case: Case) -> None:
    """Two aligned rows four gigabytes apart, by a fast traversal: (8, 4096) in a huge tensor."""
    need_memory(14)
    stride = pick(2**31 // 2 + 8, 96)
    rows, classes = pick((3, 4096), (3, 64))
    student, teacher, target = inputs((rows, classes), BF16)
    base = torch.empty(2 * stride + classes, dtype=BF16, device=DEVICE)
    far = base.as_strided((rows, classes), (stride, 1)).copy_(teacher)
    near = step(case, student.clone().requires_grad_(), teacher, target)
    assert all(
        same_bits(a, b)
        for a, b in zip(step(case, student.requires_grad_(), far, target), near, strict=True)
    )

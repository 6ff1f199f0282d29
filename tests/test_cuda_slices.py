"""The CUDA kernels of DIST whose blocks keep a slice of the columns, on the emulated device.

Clusters, copies, rows that hardly vary and masked ones, against the reference in float64.
"""

from __future__ import annotations

import functools
from typing import Any

import cuda_emulator
import pytest
import torch
from cases import same_bits
from inputs import make
from test_cuda_kernels import close, dist_in_float64
from torch import Tensor

pytestmark = pytest.mark.skipif(
    cuda_emulator.compiler() is None, reason="the emulator needs a C++ compiler"
)

WIDE = dict(cuda_emulator.SMALL, multiprocessors=32)
"""A device with room for two of the largest clusters."""


def against_dist(student: Tensor, teacher: Tensor, **keywords: Any) -> None:
    """``slices`` against the reference in float64, within what the gradient's dtype can hold."""
    loss, gradient, ran = cuda_emulator.correlation_loss(
        "dist", student, teacher, traversal="slices", **keywords
    )
    assert ran == "slices" and gradient is not None
    expected, slope = dist_in_float64(student, teacher)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-7)
    close(gradient, slope)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("cluster", "size"),
    [(2, (9, 9000)), (4, (40, 2300)), (4, (7, 18001)), (8, (5, 36000)), (16, (4, 70008))],
    ids=str,
)
def test_slices_of_a_cluster(cluster: int, size: tuple[int, int], dtype: torch.dtype) -> None:
    """Blocks that know a part of each row; of more classes than one of them could keep."""
    student, teacher, _ = make("gaussian", *size, dtype=dtype)
    if size == (40, 2300):  # few enough classes for a block, on a device with little shared memory
        device = dict(WIDE, block_shared=60000)
    else:
        device = dict(WIDE, most_cluster=cluster)
    against_dist(student, teacher, device=device)


def test_slices_of_the_longest_rows() -> None:
    """Of half types: more classes to a thread."""
    for rows, classes in (5, 8208), (3, 128256):
        student, teacher, _ = make("gaussian", rows, classes, dtype=torch.bfloat16)
        against_dist(student, teacher, device=dict(WIDE, multiprocessors=16))


def test_slices_by_copies_of_a_thread() -> None:
    """Before sm_90: the same numbers as by bulk copies."""
    one = dict(cuda_emulator.SMALL, multiprocessors=2, most_cluster=0)
    for size in (40, 600), (21, 1001), (9, 4104):
        student, teacher, _ = make("gaussian", *size)
        run = functools.partial(
            cuda_emulator.correlation_loss, "dist", student, teacher, traversal="slices"
        )
        loss, gradient, _ = run(device=dict(one, arch=80))
        other, other_gradient, _ = run(device=one)
        assert gradient is not None and other_gradient is not None
        assert same_bits(loss, other) and same_bits(gradient, other_gradient)
        against_dist(student.bfloat16(), teacher.bfloat16(), device=dict(one, arch=80))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("classes", [1504, 1501])
def test_slices_of_rows_that_hardly_vary(classes: int, dtype: torch.dtype) -> None:
    """A head of zeros: uniform rows, and constant columns, have norms of exactly 0. Peaked rows:
    what is common to a row's derivatives cancels where q is 1."""
    _, teacher, _ = make("gaussian", 12, classes, dtype=dtype)
    for value in 0.0, 3.7:
        against_dist(torch.full_like(teacher, value), teacher, device=WIDE)
    student, _, _ = make("gaussian", 12, classes, dtype=dtype)
    against_dist(student[:1].expand(12, -1).contiguous(), teacher, device=WIDE)
    student, teacher = student.clone(), teacher.clone()
    student[torch.arange(12), torch.arange(12) * 100] += 12
    teacher[torch.arange(12), torch.arange(12) * 100] += 12
    against_dist(student, teacher, device=WIDE)


@pytest.mark.parametrize("mask", [-1e4, -1e9, -1e30, -torch.inf])
def test_slices_of_masked_rows(mask: float) -> None:
    """Classes of whole warps and of whole blocks are masked, in one row all but one."""
    student, teacher, _ = make("gaussian", 24, 4008)
    for x in student, teacher:
        x[:, 1200:] = mask
        x[5, 1:] = mask
    against_dist(student, teacher, device=WIDE)
    against_dist(student, teacher, device=dict(WIDE, block_shared=40000))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_slices_of_rows_far_out(dtype: torch.dtype) -> None:
    """An offset, or a mask, of whole rows; ties among numbers so large that nothing else counts."""
    low = torch.finfo(dtype).min
    for value in (1e3, 3e4, -3e4, low) if dtype == torch.float16 else (1e3, 1e5, 3e7, -1e9, low):
        student, teacher, _ = make("gaussian", 24, 1504, dtype=dtype)
        student[3] = teacher[3] = value
        if value != low:
            student[5, 7] = student[5, 700] = student[5, 1400] = value
            teacher[5, 7] = teacher[5, 700] = teacher[5, 1400] = value
        against_dist(student, teacher, device=WIDE)


def test_slices_give_nan_for_nan() -> None:
    for where, value in ((3, 7), torch.nan), ((0, 3999), torch.inf), ((2,), -torch.inf):
        student, teacher, _ = make("gaussian", 6, 4000)
        student[where] = value
        loss, gradient, ran = cuda_emulator.correlation_loss(
            "dist", student, teacher, traversal="slices", device=WIDE
        )
        assert ran == "slices" and gradient is not None
        assert loss.isnan() and gradient.isnan().all()

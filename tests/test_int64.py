"""Offsets beyond 2^31: in the strides of the inputs, in rows * classes, in the gradient.

On the CPU the memory between the rows is reserved and never touched, so these tests are small.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from cases import ONE_A_FAMILY, Case, each, value_and_grad
from inputs import make
from layouts import target_for
from torch import Tensor

BIG = 2**31 + 8


def _available_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    try:
        with open("/proc/meminfo") as lines:
            return next(int(x.split()[1]) for x in lines if x.startswith("MemAvailable")) * 1024
    except OSError:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _reserve(elements: int, dtype: torch.dtype, device: str) -> Tensor:
    try:
        return torch.empty(elements, dtype=dtype, device=device)
    except (RuntimeError, MemoryError) as error:
        pytest.skip(f"cannot reserve {elements * dtype.itemsize >> 30} GiB of addresses: {error}")


def _spread(x: Tensor, stride: tuple[int, ...]) -> Tensor:
    """The same values at strides of billions."""
    last = sum((n - 1) * step for n, step in zip(x.shape, stride, strict=True))
    assert last >= 2**31
    base = _reserve(last + 1, x.dtype, x.device.type)
    return base.as_strided(x.shape, stride).copy_(x)


STRIDES: dict[str, Callable[[Tensor], Tensor]] = {
    "rows": lambda x: _spread(x, (BIG, 1)),
    "classes": lambda x: _spread(x, (1, BIG // (x.shape[1] - 1) + 1)),
    "tokens": lambda x: _spread(x.view(1, 2, -1), (8, BIG, 1)),
    "image": lambda x: _spread(
        x.view(1, 2, 1, -1).movedim(-1, 1), (8, BIG // (x.shape[1] - 1) + 1, 2, 1)
    ),
}


@each(kernels=True, strides=STRIDES, whose=("student", "teacher"), shared=("strides", "whose"))
def test_strides(case: Case, strides: Callable[[Tensor], Tensor], whose: str) -> None:
    """Two rows of nine classes, four gigabytes apart."""
    student, teacher, target = make("gaussian", 2, 9, dtype=torch.bfloat16, device=case.device)
    far = strides(student if whose == "student" else teacher)
    near = (teacher if whose == "student" else student).view(2, 9)
    if far.dim() > 2:
        near = near.view(1, 2, 9) if far.dim() == 3 else near.view(1, 2, 1, 9).movedim(-1, 1)
    pair = (far, near) if whose == "student" else (near, far)
    target = target_for(near, target)
    actual = value_and_grad(case, *pair, target)
    expected = value_and_grad(case, *(x.contiguous() for x in pair), target)
    assert torch.isfinite(expected[0]) and expected[1].any()
    torch.testing.assert_close(actual[0], expected[0])
    torch.testing.assert_close(actual[1].contiguous(), expected[1].contiguous())


def _quick(case: Case) -> bool:
    """Two billion elements take Triton's interpreter days, and a CPU a quarter of a minute a loss:
    there one of rows alone, and one of rows beside columns."""
    if case.device == "cpu":
        return not case.interpreted and case.spec.name in ("kd", "dist")
    return True


@each(ONE_A_FAMILY, kernels=True, keep=_quick)
def test_more_than_two_to_the_31_elements(case: Case) -> None:
    """rows * classes over 2^31 through stride 0: the count itself must not wrap."""
    classes = 2**16
    rows = 2**15 + 3
    student, teacher, target = make("gaussian", 1, classes, device=case.device)
    s, t, y = (x.expand(rows, -1) for x in (student, teacher, target.view(1, 1)))
    y = y.squeeze(1)
    with torch.no_grad():
        loss = case(s, t, y)
        # One row is its own mean; a batch of equal rows has constant columns, and so has one row.
        expected = case(student, teacher, target)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)


@each(ONE_A_FAMILY, kernels=True, keep=lambda case: not case.interpreted)
def test_gradient_beyond_two_to_the_31(case: Case) -> None:
    """A gradient of more than 2^31 elements: the last row is written where it belongs."""
    if os.environ.get("KDKERNELS_LARGE") != "1" and case.device == "cpu":
        pytest.skip("writes 4.3 GB of gradient: set KDKERNELS_LARGE=1 to run it")
    if _available_bytes() < 14 << 30:
        pytest.skip("needs 14 GB of free memory")
    classes = 2**16
    rows = 2**15 + 1
    student, teacher, target = make(
        "gaussian", 2, classes, dtype=torch.bfloat16, device=case.device
    )
    index = torch.zeros(rows, dtype=torch.int64, device=case.device)
    index[-1] = 1
    y = target[index]
    t = teacher[:1].expand(rows, classes)
    s = student[:1].repeat(rows, 1)
    s[-1] = student[1]
    _, gradient = value_and_grad(case, s, t, y, reduction="sum")
    if case.spec.by_row:
        small = (student, teacher[:1].expand(2, -1), target)
        _, expected = value_and_grad(case, *small, reduction="sum")
        assert torch.equal(gradient[-1], expected[1])
        assert torch.equal(gradient[0], expected[0]) and torch.equal(gradient[-2], expected[0])
    else:
        assert torch.isfinite(gradient[-1]).all() and gradient[-1].any()
        assert torch.equal(gradient[0], gradient[-2])

"""The CUDA kernels on the emulated device, each traversal by name, against the float64 reference.

What a GPU would choose by itself is tested under the public functions (``emulated`` in the other
files); here every traversal walks rows that others would be chosen for, on several schedules.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import cuda_emulator
import pytest
import torch
from cases import call, same_bits
from inputs import FAMILIES, make
from torch import Tensor

from kdkernels.registry import SPECS

pytestmark = pytest.mark.skipif(
    cuda_emulator.compiler() is None, reason="the emulator needs a C++ compiler"
)

COMPILED = {unit.rule for unit in cuda_emulator.build_facts().units()}
ROW_RULES = [s.name for s in SPECS.values() if s.by_row and s.name in COMPILED]


def options_of(rule: str) -> dict[str, Any]:
    """The loss's own numbers, as its reference has them by default."""
    parameters = inspect.signature(SPECS[rule].reference).parameters.values()
    return {
        p.name: p.default
        for p in parameters
        if type(p.default) is float and p.name != "temperature"
    }


OPTIONS = {rule: list(options_of(rule).values()) for rule in ROW_RULES}
SIZES = {
    "lanes": ((5, 8), (9, 64), (6, 72), (3, 320), (2, 1000)),
    "block": ((3, 24), (2, 1032), (2, 2056), (3, 5008)),
    "cluster": ((3, 40), (2, 4104), (9, 20008)),
    "stream": ((3, 40), (3, 37), (2, 4104), (2, 9001), (9, 20008)),
    "split": ((1, 40), (2, 37), (2, 4104), (2, 20009)),
    "general": ((3, 40), (2, 4104)),
}
TRAVERSALS = [(name, size) for name, sizes in SIZES.items() for size in sizes]


def run_row(
    rule: str, traversal: str, student: Tensor, teacher: Tensor, target: Tensor, seed: int = 1
) -> tuple[Tensor, Tensor]:
    scale = 16.0 if SPECS[rule].t_squared else 1.0
    loss, gradient, ran = cuda_emulator.row_loss(
        rule, student, teacher, target, OPTIONS[rule], scale=scale, traversal=traversal, seed=seed
    )
    assert ran == traversal
    assert gradient is not None
    return loss, gradient


def against_reference(
    rule: str, student: Tensor, teacher: Tensor, target: Tensor
) -> tuple[Tensor, Tensor]:
    wide = student.double().detach().clone().requires_grad_()
    options = {"target": target, "temperature": 4.0, "backend": "reference", **options_of(rule)}
    loss = call(SPECS[rule], wide, teacher.double(), **options)
    (gradient,) = torch.autograd.grad(loss, wide)
    return loss.detach(), gradient


def dist_in_float64(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """DIST's loss and gradient by the reference."""
    wide = student.double().requires_grad_()
    loss = SPECS["dist"].function(wide, teacher.double(), backend="reference")
    (gradient,) = torch.autograd.grad(loss, wide)
    return loss.detach(), gradient


def close(gradient: Tensor, expected: Tensor) -> None:
    """Within float32's error of the sums, and the rounding to the gradient's dtype."""
    kind = torch.finfo(gradient.dtype)
    rounding = kind.eps / 2 if gradient.dtype != torch.float32 else 0
    smallest = kind.smallest_normal * kind.eps / 2  # half of the smallest subnormal number
    bound = 2e-6 * expected.abs().max() + (rounding + 2e-5) * expected.abs() + smallest
    error = (gradient.double() - expected).abs()
    assert bool((error <= bound).all()), f"largest excess {(error - bound).max():.2e}"


@pytest.mark.parametrize("rule", ROW_RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("traversal", "size"), TRAVERSALS, ids=str)
def test_row_traversals(
    rule: str, dtype: torch.dtype, traversal: str, size: tuple[int, int]
) -> None:
    student, teacher, target = make("gaussian", *size, dtype=dtype)
    if size[0] > 2:
        target[1] = -100
        student[1] = float("nan")
    loss, gradient = run_row(rule, traversal, student, teacher, target)
    expected_loss, expected = against_reference(rule, student, teacher, target)
    torch.testing.assert_close(loss.double(), expected_loss, rtol=2e-6, atol=0)
    close(gradient, expected)
    if size[0] > 2:
        assert not gradient[1].any()


@pytest.mark.parametrize("traversal", [t for t in SIZES if t != "lanes"])
@pytest.mark.parametrize("family", FAMILIES)
def test_row_families(family: str, traversal: str) -> None:
    """Masks, ties, NaN and huge logits by the traversals that rows so short are not walked by."""
    student, teacher, target = make(family, 2, 40)
    for rule in ROW_RULES:
        expected = run_row(rule, "lanes", student, teacher, target)
        actual = run_row(rule, traversal, student, teacher, target)
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("traversal", SIZES)
def test_rows_do_not_depend_on_the_schedule(traversal: str) -> None:
    size = SIZES[traversal][-1]
    student, teacher, target = make("gaussian", *size)
    first = run_row("dkd", traversal, student, teacher, target, seed=1)
    for seed in range(2, 6):
        other = run_row("dkd", traversal, student, teacher, target, seed=seed)
        assert all(same_bits(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("reduction", [0, 1, 2])
def test_general_rows_are_standardised_in_float64(reduction: int) -> None:
    """The traversal that serves gradcheck, with upstream factors for each row."""
    student, teacher, target = make("gaussian", 6, 21, dtype=torch.float64)
    wide = student.clone().requires_grad_()
    names = ("none", "mean", "sum")
    loss = SPECS["dkd"].function(
        wide, teacher, target, standardize=True, reduction=names[reduction], backend="reference"
    )
    upstream = (
        torch.linspace(-1, 2, 6, dtype=torch.float64) if reduction == 0 else torch.tensor(1.5)
    )
    (expected,) = torch.autograd.grad(loss, wide, upstream.to(loss.dtype))
    value, gradient, _ = cuda_emulator.row_loss(
        "dkd",
        student,
        teacher,
        target,
        OPTIONS["dkd"],
        scale=16.0,
        standardize=True,
        reduction=reduction,
        upstream=upstream.double(),
    )
    torch.testing.assert_close(value, loss.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-14)


CORRELATIONS = [
    ("tile", (33, 520)), ("tile", (21, 1000)),
    ("staged", (40, 7)), ("staged", (300, 19)), ("staged", (130, 150)), ("staged", (33, 501)),
    ("staged", (21, 1000)),
    ("stream", (9, 40)), ("stream", (21, 1000)), ("stream", (13, 4104)), ("stream", (5, 2057)),
    ("columns", (1, 9)), ("columns", (700, 3)), ("columns", (40, 8)), ("columns", (1000, 19)),
    ("columns", (129, 20)), ("columns", (301, 150)), ("columns", (130, 152)),
    ("columns", (64, 256)), ("columns", (33, 501)), ("columns", (35, 512)),
    ("slices", (1, 600)), ("slices", (37, 520)), ("slices", (21, 1001)), ("slices", (13, 4104)),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("traversal", "size"), CORRELATIONS, ids=str)
def test_correlation_traversals(dtype: torch.dtype, traversal: str, size: tuple[int, int]) -> None:
    student, teacher, _ = make("gaussian", *size, dtype=dtype)
    teacher = (student.float() + teacher.float()).to(dtype)

    first: tuple[Tensor, Tensor] | None = None
    for seed in (1, 2, 3):
        loss, gradient, ran = cuda_emulator.correlation_loss(
            "dist", student, teacher, traversal=traversal, seed=seed
        )
        assert ran == traversal
        assert gradient is not None
        first = first or (loss, gradient)
        assert same_bits(loss, first[0]) and same_bits(gradient, first[1])
    expected, slope = dist_in_float64(student, teacher)
    assert first is not None
    torch.testing.assert_close(first[0].double(), expected, rtol=1e-5, atol=1e-7)
    close(first[1], slope)


def test_dense_rows_are_read_in_place() -> None:
    """NCHW: neighbouring threads take neighbouring pixels."""
    student, teacher, _ = make("gaussian", 2 * 6 * 7, 19)
    student, teacher = (
        x.view(2, 6, 7, 19).permute(0, 3, 1, 2).contiguous() for x in (student, teacher)
    )
    rows = functools.partial(cuda_emulator.row_loss, "kd", target=None, options=[])
    loss, gradient, ran = rows(student, teacher, class_dim=1)
    assert ran == "general"
    flat = [x.permute(0, 2, 3, 1).reshape(-1, 19) for x in (student, teacher)]
    other, other_gradient, _ = rows(*flat)
    torch.testing.assert_close(loss, other)
    assert gradient is not None and other_gradient is not None
    torch.testing.assert_close(
        gradient.permute(0, 2, 3, 1).reshape(-1, 19), other_gradient, rtol=1e-4, atol=1e-8
    )
    value, slope, ran = cuda_emulator.correlation_loss("dist", student, teacher, class_dim=1)
    assert ran == "staged"
    other, other_slope, _ = cuda_emulator.correlation_loss("dist", *flat)
    torch.testing.assert_close(value, other)
    assert slope is not None and other_slope is not None
    torch.testing.assert_close(
        slope.permute(0, 2, 3, 1).reshape(-1, 19), other_slope, rtol=1e-3, atol=1e-8
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(
    "size", [(2, 19, 8, 24), (3, 150, 4, 8), (1, 3, 16, 72), (5, 40, 4, 4), (2, 320, 8, 8)], ids=str
)
def test_planes_of_classes_keep_their_columns(
    size: tuple[int, ...], arch: int, dtype: torch.dtype
) -> None:
    """NCHW, whose runs of pixels whole packs bring in: by bulk copies, and where there are none."""
    n, c, h, w = size
    flat = make("gaussian", n * h * w, c, dtype=dtype)[:2]
    student, teacher = (x.view(n, h, w, c).permute(0, 3, 1, 2).contiguous().to(dtype) for x in flat)
    device = dict(cuda_emulator.SMALL, arch=arch)
    value, gradient, ran = cuda_emulator.correlation_loss(
        "dist", student, teacher, class_dim=1, device=device
    )
    assert ran == "columns"
    expected, slope = dist_in_float64(student, teacher)
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-7)
    assert gradient is not None
    close(gradient, slope)


def test_columns_by_copies_of_a_thread() -> None:
    """Before sm_90: the same numbers as by bulk copies."""
    for size in (1, 7), (1000, 19), (301, 150), (130, 152), (35, 512):
        student, teacher, _ = make("gaussian", *size, dtype=torch.bfloat16)
        run = functools.partial(cuda_emulator.correlation_loss, "dist", student, teacher)
        loss, gradient, ran = run(device=dict(cuda_emulator.SMALL, arch=80))
        assert ran == "columns"
        other, other_gradient, _ = run()
        assert gradient is not None and other_gradient is not None
        assert same_bits(loss, other) and same_bits(gradient, other_gradient)


def test_a_stored_gradient_is_scaled_only_by_what_is_not_one() -> None:
    for dtype in cuda_emulator.CODES:
        gradient = torch.arange(1, 1030, dtype=torch.float64).to(dtype)
        kept = gradient.clone()
        assert same_bits(cuda_emulator.scale_(gradient, torch.tensor(1.0)), kept)
        scaled = cuda_emulator.scale_(gradient, torch.tensor(-2.5))
        torch.testing.assert_close(scaled, (kept.double() * -2.5).to(dtype))


@pytest.mark.parametrize("traversal", ["cluster", "stream", "split"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_long_rows_begin_anywhere(traversal: str, dtype: torch.dtype) -> None:
    """Sums that begin at a thread's first classes: when those are masked, the least, or the largest
    by so much that the sum overflows or that everything else vanishes; and rows of finfo.min."""
    size = 2 * 8192
    student, teacher, target = make("gaussian", 6, size, dtype=dtype)
    low = torch.finfo(dtype).min
    student[0, :9000] = -torch.inf
    teacher[0, :9000] = -torch.inf
    student[1, :9000] -= 300
    teacher[1, 9000:] += 700
    student[2, :8200] += 400
    teacher[2, 100] = 3e4
    student[3] = teacher[3] = low
    student[4, 5000:] = low
    teacher[4, 4000:] = low
    for rule in ROW_RULES:
        for row in range(len(student)):
            x = tuple(tensor[row : row + 1] for tensor in (student, teacher, target))
            loss, gradient = run_row(rule, traversal, *x)
            if row == 3:  # equal; the reference loses log C beside such numbers
                assert loss == 0 and not gradient.any()
                continue
            expected_loss, expected = against_reference(rule, *x)
            torch.testing.assert_close(loss.double(), expected_loss, rtol=5e-6, atol=1e-9)
            close(gradient, expected)


@pytest.mark.parametrize("traversal", ["cluster", "stream", "split"])
@pytest.mark.parametrize("mask", [-1e4, -1e9, -1e10, -1e30, torch.finfo(torch.bfloat16).min])
@pytest.mark.parametrize("temperature", [1.0, 4.0, 8.0])
def test_finite_masks_of_long_rows(traversal: str, mask: float, temperature: float) -> None:
    """Whole threads masked, or only the classes that they begin with."""
    wide = 2 * 8192
    student, teacher, _ = make("gaussian", 3, wide, dtype=torch.bfloat16)
    for x in student, teacher:
        x[0, 3000:] = mask
        x[1, :6000] = mask
        x[2, ::2] = mask
    for dtype in torch.float32, torch.bfloat16:
        for row in range(3):
            s, t = (x[row : row + 1].to(dtype) for x in (student, teacher))
            loss, gradient, ran = cuda_emulator.row_loss(
                "kd", s, t, None, [], temperature=temperature, traversal=traversal
            )
            assert ran == traversal
            w = s.double().requires_grad_()
            expected = SPECS["kd"].function(w, t.double(), temperature, backend="reference")
            (slope,) = torch.autograd.grad(expected, w)
            scale = temperature**2
            torch.testing.assert_close(loss.double() * scale, expected.detach(), rtol=5e-6, atol=0)
            assert gradient is not None
            close(gradient * scale, slope)


@pytest.mark.parametrize("mask", [-1e4, -1e9, -1e10, -1e30, -3e38])
def test_columns_of_masked_rows(mask: float) -> None:
    """DIST keeps its numbers where classes, or all of a row, are masked by a finite number."""
    student, teacher, _ = make("gaussian", 40, 19)
    student[:, 11:], teacher[:, 11:] = mask, mask
    student[3], teacher[3] = mask, mask
    value, gradient, ran = cuda_emulator.correlation_loss("dist", student, teacher)
    assert ran == "columns" and gradient is not None
    other, other_gradient, ran = cuda_emulator.correlation_loss(
        "dist", student, teacher, traversal="staged"
    )
    assert ran == "staged" and other_gradient is not None
    torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(gradient, other_gradient, rtol=1e-4, atol=1e-8)

"""The CUDA kernels of the embedding losses, run by the emulator, against the specification."""

from __future__ import annotations

import itertools

import pytest
import torch
from cuda_emulator import SMALL, compiler
from cuda_emulator_embedding import factors, tuples
from torch import Tensor

from kdkernels import native
from kdkernels.reference.iekd import iekd
from kdkernels.reference.refilled import distances, matching

NO_CPU = native.reason("cpu")
cpu_kernels = pytest.mark.skipif(bool(NO_CPU), reason=NO_CPU or "")
pytestmark = pytest.mark.skipif(compiler() is None, reason="the emulator needs a C++ compiler")

TINY = {"arch": 80, "multiprocessors": 2, "block_shared": 4096}
"""No room for an anchor in shared memory, and more work than blocks."""
SIMILARITIES = {False: "l1", True: "cosine"}
ROUNDING = {torch.float64: 1e-12, torch.float32: 4e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def three(*shape: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [draw(*shape, seed=seed, dtype=dtype) for seed in range(3)]


def specified_factors(
    inh: Tensor, exp: Tensor, t: Tensor, cosine: bool = False, reduction: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    inh, exp = (x.double().detach().requires_grad_() for x in (inh, exp))
    loss = iekd(
        inh, exp, t.double(), inheritance_weight=50.0, exploration_weight=20.0,
        similarity=SIMILARITIES[cosine], reduction="mean" if reduction == 1 else "sum",
    )  # fmt: skip
    return (loss.detach(), *torch.autograd.grad(loss, (inh, exp)))


def close(actual: Tensor | None, expected: Tensor, dtype: torch.dtype, size: float = 0.0) -> None:
    """``size``: of the terms, where ``expected`` itself may be 0."""
    assert actual is not None
    rounding = ROUNDING[dtype]
    bound = rounding * max(expected.abs().max().item(), size)
    torch.testing.assert_close(actual.double(), expected.double(), rtol=rounding, atol=bound)


def check_factors(x: list[Tensor], cosine: bool, reduction: int = 1, **how) -> str:
    loss, first, second, traversal = factors(*x, 50.0, 20.0, cosine, reduction, **how)
    expected = specified_factors(*x, cosine, reduction)
    wide = torch.float64 in [y.dtype for y in x]
    close(loss, expected[0], torch.float64 if wide else torch.float32)
    size = 50.0 / x[0].shape[1] / torch.cat(x[:2]).double().norm(dim=1).min().item()
    close(first, expected[1], x[0].dtype, size)
    close(second, expected[2], x[1].dtype, size)
    return traversal


@pytest.mark.parametrize("cosine", SIMILARITIES)
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize(
    "samples, width, traversal",
    [
        (1, 8, "lanes"), (7, 40, "lanes"), (3, 256, "lanes"), (2, 264, "lanes"), (5, 512, "lanes"),
        (2, 520, "block"), (3, 1024, "block"), (2, 4096, "block"), (2, 4104, "block"),
        (1, 8192, "block"), (2, 8200, "stream"), (1, 20480, "stream"), (6, 2048, "block"),
        (4, 1, "general"), (3, 37, "general"), (2, 1030, "general"),
    ],
)  # fmt: skip
def test_factors(
    samples: int, width: int, traversal: str, dtype: torch.dtype, cosine: bool
) -> None:
    chosen = check_factors(three(samples, width, dtype=dtype), cosine)
    whole = dtype != torch.float64 and width * dtype.itemsize % 16 == 0
    assert chosen == (traversal if whole else "general")


@pytest.mark.parametrize("cosine", SIMILARITIES)
@pytest.mark.parametrize("traversal", ("lanes", "block", "stream", "general"))
def test_factor_traversals_agree(traversal: str, cosine: bool) -> None:
    x = three(9, 320)
    assert check_factors(x, cosine, 2, traversal=traversal) == traversal
    assert check_factors(x, cosine, 2, traversal=traversal, device=TINY) == traversal


@pytest.mark.parametrize("cosine", SIMILARITIES)
def test_factor_strides(cosine: bool) -> None:
    whole = three(5, 96)
    padded = [torch.cat([x, x], 1)[:, :96] for x in whole]
    assert check_factors(padded, cosine) == "lanes"
    shifted = [torch.cat([x[:, :1], x], 1)[:, 1:] for x in whole]
    assert check_factors(shifted, cosine) == "general"
    transposed = [x.t().contiguous().t() for x in whole]
    assert check_factors(transposed, cosine) == "general"
    assert check_factors([whole[0], transposed[1], whole[2]], cosine) == "general"
    one = [x[:1].expand(4, 96) for x in whole]
    loss = factors(*one, 50.0, 20.0, cosine, need_inheritance=False, need_exploration=False)[0]
    close(loss, specified_factors(*one, cosine)[0], torch.float32)


@pytest.mark.parametrize("dtypes", [*itertools.product(ROUNDING, repeat=3)], ids=str)
def test_factor_dtypes(dtypes: tuple[torch.dtype, ...]) -> None:
    x = [draw(2, 40, seed=seed, dtype=dtype) for seed, dtype in enumerate(dtypes)]
    for cosine in SIMILARITIES:
        check_factors(x, cosine)


@pytest.mark.parametrize("width", (64, 600, 9000, 61))
def test_wanted_gradients_and_upstream(width: int) -> None:
    x = three(6, width)
    loss, first, second, _ = factors(*x)
    factor = torch.tensor(-1.5)
    for needs in itertools.product((False, True), repeat=2):
        got = factors(*x, 50.0, 50.0, False, 1, *needs)
        assert torch.equal(got[0], loss)
        scaled = factors(*x, 50.0, 50.0, False, 1, *needs, upstream=factor, need_loss=False)
        assert scaled[0].isnan()
        wholes = (first, second)
        for need, one, multiple, whole in zip(needs, got[1:3], scaled[1:3], wholes, strict=True):
            assert (one is None) == (not need)
            if need:
                assert torch.equal(one, whole)
                close(multiple, -1.5 * whole, torch.float32)


@pytest.mark.parametrize("dtype, width", [(torch.float32, 64), (torch.bfloat16, 1024),
                                          (torch.float32, 9000), (torch.float64, 33)])  # fmt: skip
def test_factors_are_deterministic(dtype: torch.dtype, width: int) -> None:
    x = three(11, width, dtype=dtype)
    x[0][-2:] *= 1e-12  # those that blocks sum again in double, last
    first = factors(*x, device=TINY)
    for seed in range(2, 12):
        again = factors(*x, device=TINY, seed=seed)
        assert all(torch.equal(a, b) for a, b in zip(first[:3], again[:3], strict=True))
    # No bit of a sample's gradient depends on the others, but for the division by their number.
    alone = factors(*(y[3:4].contiguous() for y in x), reduction=2)
    together = factors(*x, reduction=2, device=TINY)
    assert torch.equal(alone[1][0], together[1][3])
    assert torch.equal(alone[2][0], together[2][3])


@cpu_kernels
@pytest.mark.parametrize("cosine", SIMILARITIES)
@pytest.mark.parametrize("width", (64, 600, 9000, 61))
def test_factor_edges_follow_the_cpu(width: int, cosine: bool) -> None:
    """Zero vectors, tiny, huge, opposite, infinite and NaN samples, each beside ordinary ones."""
    inh, exp, t = three(12, width)
    inh[0] = exp[0] = 0
    t[1] = 0
    inh[3] *= 1e-30
    t[3] *= 1e30
    exp[3] *= 1e25
    inh[4] *= 1e-14
    exp[4] *= 1e-38
    inh[5], exp[5] = -2 * t[5], -t[5]
    inh[6, width // 2] = float("nan")
    t[7, 3] = float("nan")
    exp[8, 0] = float("inf")
    t[9, 5] = -float("inf")
    args = (50.0, 20.0, cosine, 2, True, True)
    for row in range(12):
        x = [y[row : row + 1].contiguous() for y in (inh, exp, t)]
        got = factors(*x, *args)[:3]
        expected = torch.ops.kdkernels.iekd(*x, list(args[:2]), None, *args[2:])
        torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=5e-6, equal_nan=True)
        for student, a, b in zip(x, got[1:], expected[1:], strict=False):
            # Opposite vectors leave rounding errors of terms of this size.
            norm = student.double().norm().nan_to_num(1e30, posinf=1e30).clamp(min=1e-12).item()
            size = 50.0 / norm / (width**0.5 if cosine else width)
            torch.testing.assert_close(a, b, rtol=1e-5, atol=4e-6 * size, equal_nan=True)
        whole = factors(inh, exp, t, *args)
        assert torch.equal(whole[1][row].nan_to_num(7), got[1][0].nan_to_num(7))
        assert torch.equal(whole[2][row].nan_to_num(7), got[2][0].nan_to_num(7))


def test_equal_factors() -> None:
    for width in (64, 2000, 9000, 61):
        for dtype in ROUNDING:
            t = draw(3, width, dtype=dtype)
            loss, first, second, _ = factors(t, 2 * t, t)  # equal once they are normalised
            assert loss == 0 and not first.any() and not second.any()


def batch(samples: int, classes: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, ...]:
    """Distances and labels with many semi-hard negatives."""
    student, teacher = (draw(samples, 6, seed=seed + k) for k in range(2))
    teacher = student + 0.5 * teacher
    target = torch.randint(classes, (samples,), generator=torch.Generator().manual_seed(seed))
    return distances(student).to(dtype), distances(teacher).to(dtype), target


def check_tuples(student: Tensor, teacher: Tensor, target: Tensor, **options) -> dict[str, int]:
    how = {k: options.pop(k) for k in ("device", "seed") if k in options}
    options = {"margin": 0.2, "temperature": 4.0, "scale": 1.0, "reduction": 1, **options}
    loss, gradient, plan = tuples(student, teacher, target, **options, **how)
    wide = student.double().requires_grad_()
    # The kernel compares with the margin in the distances' dtype.
    expected = options["scale"] * matching(
        wide,
        teacher.double(),
        target,
        margin=torch.tensor(options["margin"], dtype=student.dtype).item(),
        temperature=options["temperature"],
        reduction="mean" if options["reduction"] == 1 else "sum",
    )
    (slope,) = torch.autograd.grad(expected, wide, allow_unused=True)
    dtype = student.dtype
    rounding = 1e-12 if dtype == torch.float64 else 2e-5
    close_by = {"rtol": rounding, "atol": rounding * expected.abs().item() + 1e-30}
    torch.testing.assert_close(loss.double(), expected.detach(), **close_by)
    slope = torch.zeros_like(wide) if slope is None else slope
    bound = (1e-12 if dtype == torch.float64 else 1e-6) * slope.abs().max().item()
    # Slopes are differences of probabilities near each other.
    unit = torch.finfo(dtype).eps * 8 * options["scale"] / options["temperature"]
    torch.testing.assert_close(gradient.double(), slope, rtol=rounding, atol=bound + unit)
    return plan


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("samples, classes", [(1, 1), (2, 1), (2, 2), (5, 2), (31, 3), (32, 4),
                                              (33, 2), (64, 8), (100, 20), (150, 3)])  # fmt: skip
@pytest.mark.parametrize("reduction", (1, 2))
def test_tuples(samples: int, classes: int, dtype: torch.dtype, reduction: int) -> None:
    check_tuples(*batch(samples, classes, dtype), reduction=reduction, scale=1.5)


@pytest.mark.parametrize(
    "options",
    [{"margin": 2.0}, {"margin": 1e-3}, *({"temperature": t} for t in (0.003, 0.02, 100.0))],
    ids=str,
)
def test_tuple_options(options: dict[str, float]) -> None:
    for dtype in (torch.float64, torch.float32):
        student, teacher, target = batch(40, 4, dtype)
        if options.get("temperature", 1.0) < 0.1 and dtype == torch.float32:
            # The logits' own rounding is that large.
            loss = tuples(student, teacher, target, **options)[0]
            wide = tuples(student.double(), teacher.double(), target, **options)[0]
            assert abs(loss - wide) < 1e-4 * wide
        else:
            check_tuples(student, teacher, target, **options)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("gap, found", [(0.0, False), (0.25, True), (0.5, True), (0.75, False)])
def test_the_margin_belongs_to_the_band(gap: float, found: bool, dtype: torch.dtype) -> None:
    """Distances whose differences are exact: 0 < D_an - D_ap <= 1/2."""
    student = torch.tensor([[0, 1, 1 + gap], [1, 0, 2], [1 + gap, 2, 0]], dtype=dtype)
    teacher, target = student.square(), torch.tensor([0, 0, 1])
    check_tuples(student, teacher, target, margin=0.5)
    assert bool(tuples(student, teacher, target, margin=0.5)[0] > 0) == found


def test_large_batches_use_the_workspace() -> None:
    x = batch(70, 3, torch.float32)
    resident, gradient, plan = tuples(*x)
    assert plan["scratch"] == 0
    streamed, other, plan = tuples(*x, device=TINY)
    assert plan["scratch"] > 0 and plan["blocks"] == 4
    assert torch.equal(resident, streamed) and torch.equal(gradient, other)
    check_tuples(*x, device=TINY)


@pytest.mark.parametrize("device", (SMALL, TINY))
def test_tuples_are_deterministic(device: dict[str, int]) -> None:
    x = batch(45, 3, torch.float32)
    first = tuples(*x, device=device)
    for seed in range(2, 6):
        again = tuples(*x, device=device, seed=seed)
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert torch.equal(tuples(*x, need_gradient=False)[0], tuples(*x)[0])


@pytest.mark.parametrize("reduction", (1, 2))
def test_no_tuples(reduction: int) -> None:
    student, teacher, target = batch(20, 1, torch.float32)
    for labels in (target, torch.arange(20)):
        loss, gradient, _ = tuples(student, teacher, labels, reduction=reduction)
        assert loss == 0 and (gradient == 0).all()
    far = student * 0 + 1  # no negative is farther than a positive
    loss, gradient, _ = tuples(far, teacher, torch.arange(20) % 2, reduction=reduction)
    assert loss == 0 and (gradient == 0).all()


def test_equal_teacher() -> None:
    student, _, target = batch(40, 3, torch.float32)
    loss, gradient, _ = tuples(student, student.clone(), target)
    assert loss.abs() < 1e-12 and gradient.abs().max() < 1e-7


@cpu_kernels
def test_nan_distances_follow_the_cpu() -> None:
    student, teacher, target = batch(24, 3, torch.float32)
    student[3, 7] = student[5, :] = student[:, 9] = float("nan")
    clean = tuples(student, teacher, target)
    ours = torch.ops.kdkernels.tuple_matching(
        student, teacher, target, [0.2, 4.0, 1.0], None, 1, True
    )
    torch.testing.assert_close(clean[0], ours[0], rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(clean[1], ours[1], rtol=1e-5, atol=1e-7)
    teacher[2, 4] = teacher[6, :] = float("nan")
    got = tuples(student, teacher, target, reduction=2)
    ours = torch.ops.kdkernels.tuple_matching(
        student, teacher, target, [0.2, 4.0, 1.0], None, 2, True
    )
    torch.testing.assert_close(got[0], ours[0], equal_nan=True)
    torch.testing.assert_close(got[1], ours[1], rtol=1e-5, atol=1e-7, equal_nan=True)

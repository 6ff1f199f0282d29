"""The numerical contract, line by line, on every backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import (
    LOSSES,
    ROW_LOSSES,
    SOFTMAX,
    Case,
    alone_if_interpreted,
    at_temperature,
    each_emulated as each,
    each_sample_emulated as each_sample,
    passes,
    reductions,
    row_weights,
    same_bits,
    value_and_grad,
)
from inputs import DTYPE_PAIRS, INF, dtype_id, make
from oracle import verify
from torch import Tensor

NAN = float("nan")


def _inputs(case: Case, rows: int = 6, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
    return make("gaussian", rows, case.pick(37, 10), device=case.device, **kwargs)


# 1. p = 0 contributes 0; gradients are finite wherever the loss is.


@each(
    family=("mask_same", "mask_teacher", "mask_first_block", "mask_last_block"),
    keep=lambda case, family: family != "mask_teacher" or not case.spec.needs_teacher_mass,
)
def test_impossible_classes_cost_nothing(case: Case, family: str) -> None:
    student, teacher, target = make(family, 5, case.pick(37, 9), device=case.device)
    for reduction in passes(case.spec):
        loss, gradient = verify(case, student, teacher, target, reduction=reduction)
        assert torch.isfinite(loss).all() and torch.isfinite(gradient).all()


@each([s for s in ROW_LOSSES if s.needs_teacher_mass])
def test_a_class_that_only_the_teacher_excludes_is_never_silent(case: Case) -> None:
    """Such a row is infinite, it has no gradient, and it touches no other."""
    student, teacher, target = _inputs(case)
    clean, clean_gradient = value_and_grad(case, student, teacher, target, reduction="none")
    teacher[2, 3] = -INF
    loss, gradient = value_and_grad(case, student, teacher, target, reduction="none")
    assert loss[2] == INF and not torch.isfinite(gradient[2]).any()
    others = torch.arange(6) != 2
    assert same_bits(loss[others], clean[others])
    assert same_bits(gradient[others], clean_gradient[others])


@each([s for s in ROW_LOSSES if not s.needs_teacher_mass])
def test_an_infinite_loss_has_a_finite_gradient(case: Case) -> None:
    """The student excludes a class the teacher does not: whatever the loss, training goes on."""
    student, teacher, target = make("mask_different", 5, 9, device=case.device)
    for reduction in ("none", "sum"):
        _, gradient = value_and_grad(case, student, teacher, target, reduction=reduction)
        assert torch.isfinite(gradient).all() and gradient.any()


@each([s for s in ROW_LOSSES if s.family == "decoupled"], kernels=True)
def test_a_certain_target_keeps_its_digits(case: Case) -> None:
    """q_t - p_t of 1e-6 is exact to its own size, which 1 - 1e-6 has lost."""
    student, teacher, target = make("peaked", 4, case.pick(37, 10), device=case.device)
    options = {"beta": 0.0, "temperature": 1.0}
    wide, reference = student.double(), Case(case.spec, "reference", case.device)
    _, expected = value_and_grad(reference, wide, teacher.double(), target, **options)
    _, gradient = value_and_grad(case, student, teacher, target, **options)
    at = target.unsqueeze(1)
    assert (expected.gather(1, at).abs() < 1e-4).all()
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-4, atol=0)


# 2. A bad row is NaN, alone.

BAD_ROWS: dict[str, Callable[[Tensor], Any]] = {
    "nan": lambda row: row.__setitem__(3, NAN),
    "plus_inf": lambda row: row.__setitem__(3, INF),
    "all_minus_inf": lambda row: row.fill_(-INF),
    "nan_first": lambda row: row.__setitem__(0, NAN),
    "nan_last": lambda row: row.__setitem__(-1, NAN),
    "nan_among_minus_inf": lambda row: row.fill_(-INF).__setitem__(1, NAN),
}


def _bad(case: Case, bad: Any, whose: str) -> bool:
    """A sigmoid of an infinite logit is 0 or 1, which is no fault."""
    names = ("nan", "nan_first", "nan_last", "nan_among_minus_inf")
    fault = case.spec in SOFTMAX or bad in [BAD_ROWS[name] for name in names]
    return fault and alone_if_interpreted(case)


@each(ROW_LOSSES, bad=BAD_ROWS, whose=("student", "teacher"), keep=_bad, shared=("whose",))
def test_a_bad_row_is_nan_and_touches_no_other(case: Case, bad: Any, whose: str) -> None:
    student, teacher, target = _inputs(case)
    row = 2
    others = torch.arange(6) != row
    for reduction in reductions(case.spec):
        clean, clean_gradient = value_and_grad(case, student, teacher, target, reduction=reduction)
        s, t = student.clone(), teacher.clone()
        bad((s if whose == "student" else t)[row])
        loss, gradient = value_and_grad(case, s, t, target, reduction=reduction)
        assert loss[row].isnan() if reduction == "none" else loss.isnan()
        if case.spec in SOFTMAX:
            assert gradient[row].isnan().all()
        else:  # classes are on their own
            assert torch.equal(gradient[row].isnan(), (s[row] + t[row]).isnan())
        assert same_bits(gradient[others], clean_gradient[others])
        if reduction == "none":
            assert same_bits(loss[others], clean[others])


@each(
    [s for s in LOSSES if not s.by_row],
    bad=BAD_ROWS,
    whose=("student", "teacher"),
    keep=_bad,
    shared=("whose",),
)
def test_a_bad_row_is_never_silent_where_rows_are_coupled(case: Case, bad: Any, whose: str) -> None:
    student, teacher, target = _inputs(case)
    bad((student if whose == "student" else teacher)[2])
    loss, gradient = value_and_grad(case, student, teacher, target)
    assert loss.isnan() and gradient[2].isnan().all()


@each(
    [s for s in ROW_LOSSES if s.needs_target],
    side=("student", "teacher", "both"),
    shared=("side",),
)
def test_an_infinite_target_is_a_bad_row_too(case: Case, side: str) -> None:
    """The target's logit stands apart from the softmax, and must not slip through."""
    student, teacher, target = _inputs(case)
    target[2] = 3
    for name, logits in (("student", student), ("teacher", teacher)):
        if side in (name, "both"):
            logits[2, 3] = INF
    loss, gradient = value_and_grad(case, student, teacher, target, reduction="none")
    assert torch.isnan(loss[2]) and torch.isnan(gradient[2]).all()
    assert torch.isfinite(loss).sum() == len(loss) - 1


@each(
    [s for s in LOSSES if s.family == "correlation"],
    kernels=True,
    constant=("student", "teacher"),
    size={"300x24": (300, 24), "100x8": (100, 8), "100x104": (100, 104), "335x3": (335, 3)},
    keep=lambda case, constant, size: not case.interpreted or size == (100, 8),
    shared=("size",),
)
def test_constant_columns(case: Case, constant: str, size: tuple[int, int]) -> None:
    """A student that begins at zero, or one row for all: the moments are 0, not their rounding."""
    student, teacher, _ = make("gaussian", *size, device=case.device)
    if constant == "student":
        student = torch.zeros_like(student)
    else:
        teacher = teacher[:1].expand_as(teacher).contiguous()
    wide, wide_teacher = student.double(), teacher.double()
    truth, slope = value_and_grad(case.spec.function, wide, wide_teacher, backend="reference")
    loss, gradient = value_and_grad(case, student, teacher)
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=1e-6)
    error = (gradient.double() - slope).abs().max()
    assert error <= 2e-5 * slope.abs().max() + 1e-9


# 3. Ignored rows and no rows: test_masks.py. 4. Ties: no loss yet has a corner there.


# 5. Dtypes.


@each(
    dtypes={dtype_id(pair): pair for pair in DTYPE_PAIRS},
    shared=("dtypes",),
    keep=alone_if_interpreted,
)
def test_dtypes_of_loss_and_gradient(case: Case, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    student, teacher, target = _inputs(case, dtype=dtypes[0], teacher_dtype=dtypes[1])
    expected = torch.float64 if torch.float64 in dtypes else torch.float32
    for reduction in reductions(case.spec):
        student.grad = None
        loss = case(student.requires_grad_(), teacher, target, reduction=reduction)
        loss.sum().backward()
        assert loss.dtype == expected
        assert student.grad is not None and student.grad.dtype == dtypes[0]
        with torch.no_grad():
            assert case(student, teacher, target, reduction=reduction).dtype == expected


# 6. The teacher is a constant.


@each(keep=alone_if_interpreted)
def test_a_teacher_that_requires_grad_raises(case: Case) -> None:
    student, teacher, target = _inputs(case)
    teacher.requires_grad_()
    with pytest.raises(ValueError, match=r"teacher_logits must be a constant.*detach\(\)"):
        case(student.requires_grad_(), teacher, target)
    with torch.no_grad():
        assert torch.isfinite(case(student, teacher, target))


# 7. Nothing is written into; a second backward gives the same numbers.


@each(
    upstream=(1.0, 3.0, -2.5),
    dtype={dtype_id(d): d for d in (torch.float32, torch.float16)},
    shared=("upstream", "dtype"),
    keep=alone_if_interpreted,
)
def test_nothing_is_mutated_and_backward_repeats(
    case: Case, upstream: float, dtype: torch.dtype
) -> None:
    student, teacher, target = _inputs(case, dtype=dtype)
    before = [x.clone() for x in (student, teacher, target)]
    student.requires_grad_()
    for reduction in reductions(case.spec):
        loss = case(student, teacher, target, reduction=reduction)
        gradient = torch.full_like(loss, upstream)
        first, second, third = (
            torch.autograd.grad(loss, student, gradient, retain_graph=True)[0] for _ in range(3)
        )
        kept = first.clone()
        assert same_bits(first, second) and same_bits(first, third)
        first.mul_(2)  # the caller owns what it was given
        assert same_bits(second, kept) and second.data_ptr() != third.data_ptr()
        assert same_bits(torch.autograd.grad(loss, student, gradient)[0], kept)
        assert same_bits(gradient, torch.full_like(loss, upstream))
        versions = [x._version for x in (student, teacher, target)]
        for x, old in zip((student, teacher, target), before, strict=True):
            assert same_bits(x.detach(), old)
        assert versions == [0, 0, 0]


@each(operation=("exp", "softmax", "tanh"), shared=("operation",), keep=alone_if_interpreted)
def test_an_operation_that_saves_its_output_before_the_loss(case: Case, operation: str) -> None:
    """A kernel that writes the gradient over its input corrupts the backward of the layer above."""
    student, teacher, target = _inputs(case, dtype=torch.float64)
    layer = {"softmax": lambda x: 5 * x.softmax(-1)}.get(operation, getattr(torch, operation))
    head = lambda x, *rest, **kw: case(layer(x), *rest, **kw)  # noqa: E731
    reference = Case(case.spec, "reference", case.device)
    expected_head = lambda x, *rest, **kw: reference(layer(x), *rest, **kw)  # noqa: E731
    for reduction in reductions(case.spec):
        _, actual = value_and_grad(head, student, teacher, target, reduction=reduction)
        _, expected = value_and_grad(expected_head, student, teacher, target, reduction=reduction)
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


# 8. Determinism; row losses do not see the batch.


@each_sample(
    keep=lambda case, sample: (
        (sample == 0 and alone_if_interpreted(case))
        or (case.backend == "native" and not case.emulated)
    )
)
def test_two_runs_have_the_same_bits(case: Case, options: dict[str, Any]) -> None:
    student, teacher, target = make("gaussian", *case.pick((33, 517), (4, 10)), device=case.device)
    for reduction in reductions(case.spec):
        options["reduction"] = reduction
        runs = [value_and_grad(case, student, teacher, target, **options) for _ in range(3)]
        assert all(same_bits(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


@each(
    ROW_LOSSES,
    kernels=True,
    dtype={dtype_id(d): d for d in (torch.float32, torch.bfloat16)},
    shared=("dtype",),
    keep=alone_if_interpreted,
)
def test_a_row_does_not_see_its_batch(case: Case, dtype: torch.dtype) -> None:
    """The bits of a row alone, of the batch reversed, and of rows far away in memory agree."""
    rows, classes = case.pick((33, 517), (5, 10))
    student, teacher, target = make("gaussian", rows, classes, dtype=dtype, device=case.device)

    def run(index: Tensor) -> tuple[Tensor, Tensor]:
        s, t = student[index], teacher[index]
        ones = torch.ones(len(index), device=case.device)
        return value_and_grad(case, s, t, target[index], reduction="none", upstream=ones)

    everything = torch.arange(rows)
    loss, gradient = run(everything)
    flipped = run(everything.flip(0))
    assert same_bits(flipped[0].flip(0), loss) and same_bits(flipped[1].flip(0), gradient)
    for row in {0, rows // 2, rows - 1}:
        alone = run(torch.tensor([row]))
        assert same_bits(alone[0][0], loss[row]) and same_bits(alone[1][0], gradient[row])


# 9. int64 addressing: test_int64.py.
# 10. Accurate near zero.


@each(ROW_LOSSES, kernels=True, shift=(0.0, 1000.0))
def test_nearly_equal_rows(case: Case, shift: float) -> None:
    """Relative error of every row at KL about 1e-6; a common offset changes nothing."""
    student, teacher, target = make("nearly_equal", 6, case.pick(501, 40), device=case.device)
    student, teacher = student + shift, teacher + shift
    options = at_temperature(case.spec, 1.0)
    truth = Case(case.spec, "reference", case.device)(
        student.double(), teacher.double(), target, reduction="none", **options
    )
    assert (truth < (1e-3 if case.spec.smooth else 3e-2)).all()
    loss = case(student, teacher, target, reduction="none", **options)
    torch.testing.assert_close(loss.double(), truth, rtol=1e-3, atol=0)


@each(SOFTMAX, kernels=True, keep=alone_if_interpreted)
def test_a_common_offset_changes_nothing(case: Case) -> None:
    """Logits on a grid of 1/16, so that adding 1000 is exact."""
    student, teacher, target = _inputs(case)
    student, teacher = (x.mul(16).round() / 16 for x in (student, teacher))
    for reduction in reductions(case.spec):
        expected = value_and_grad(case, student, teacher, target, reduction=reduction)
        moved = value_and_grad(case, student + 1000, teacher - 1000, target, reduction=reduction)
        for a, b in zip(moved, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-7)


# 11. Errors: test_errors.py.
# 12. Reductions.


@each(keep=alone_if_interpreted)
def test_reductions(case: Case) -> None:
    student, teacher, target = _inputs(case)
    mean, same = (
        value_and_grad(case, student, teacher, target, reduction=name)
        for name in ("mean", "batchmean")
    )
    default = value_and_grad(case, student, teacher, target)
    for other in (same, default):
        assert all(same_bits(a, b) for a, b in zip(mean, other, strict=True))
    assert mean[0].dim() == 0
    if not case.spec.by_row:
        with pytest.raises(ValueError, match="reduction must be"):
            case(student, teacher, target, reduction="none")
        return
    ones = torch.ones(len(target), device=case.device)
    rows = value_and_grad(case, student, teacher, target, reduction="none", upstream=ones)
    total = value_and_grad(case, student, teacher, target, reduction="sum")
    assert rows[0].shape == target.shape
    torch.testing.assert_close(rows[0].sum(), total[0])
    torch.testing.assert_close(rows[1], total[1])
    torch.testing.assert_close(total[0] / len(target), mean[0])
    torch.testing.assert_close(total[1] / len(target), mean[1])


@each(keep=alone_if_interpreted)
def test_gradient_only_where_asked(case: Case) -> None:
    """Values agree with and without a graph; nothing is recorded for a frozen student."""
    student, teacher, target = _inputs(case)
    for reduction in reductions(case.spec):
        recorded = case(student.clone().requires_grad_(), teacher, target, reduction=reduction)
        assert recorded.requires_grad
        for context in (torch.no_grad, torch.inference_mode):
            with context():
                loss = case(student, teacher, target, reduction=reduction)
            assert not loss.requires_grad
            torch.testing.assert_close(loss, recorded.detach(), rtol=2e-6, atol=0)
        loss = case(student, teacher, target, reduction=reduction)
        assert not loss.requires_grad and loss.grad_fn is None
        assert row_weights(loss).shape == loss.shape

"""Corners of the contract that random use has shown: each option at 0, any temperature, any integer
type of the target, memory that is not there."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import (
    LOSS_IDS,
    LOSSES,
    ROW_LOSSES,
    SOFTMAX_ROWS,
    Case,
    alone_if_interpreted,
    at_temperature,
    each,
    each_emulated,
    named_inputs,
    option_names,
    reductions,
    value_and_grad,
)
from fuzz_formulas import ROWS, WIDE
from inputs import dtype_id, make
from torch import Tensor

from kdkernels import _checks
from kdkernels.registry import SPECS, LossSpec

TEMPERATURES = (0.01, 1.0, 1000.0, 1e6)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=dtype_id)
@pytest.mark.parametrize("spec", [s for s in ROW_LOSSES if s.name in ROWS], ids=LOSS_IDS)
def test_the_reference_keeps_its_digits_at_any_temperature(
    spec: LossSpec, dtype: torch.dtype, temperature: float
) -> None:
    """Against closed forms in extended precision: a specification is the most accurate of all."""
    student, teacher, target = make("gaussian", 6, 50, dtype=dtype)
    options = {n: p.default for n, p in option_names(spec).items()}
    options |= {"temperature": temperature, "reduction": "none"}
    case = Case(spec, "reference", "cpu")
    given = {k: v for k, v in options.items() if k != "backend"}
    options |= {"floor": 0.0, "pivot": False, "unit": 1.0, "tiny": torch.finfo(dtype).tiny}
    loss, gradient = value_and_grad(
        case, student, teacher, target, **given, upstream=torch.ones(6, dtype=dtype)
    )
    wide = [x.double().numpy().astype(WIDE) for x in (student, teacher)]
    value, slope, _ = ROWS[spec.name](*wide, target.numpy(), options, lambda x: x)
    near = 40 * torch.finfo(dtype).eps * max(1.0, 1 / temperature)
    if not spec.t_squared:
        near *= max(temperature, 1 / temperature)  # conditioned for certain students instead
    assert (abs(loss.double().numpy() - value) <= near * abs(value)).all()
    # In float64 the difference q - p of nearly equal numbers is what an independent form has too.
    # Where all rows are certain, a mixture's gradient is below the rounding of the probabilities.
    rounding = 0.0 if spec.t_squared else 4 * torch.finfo(dtype).eps / temperature
    error = abs(gradient.double().numpy() - slope)
    assert (error <= 10 * near * abs(slope).max() + rounding).all()


@pytest.mark.parametrize("name", ["kd", "dkd"])
def test_the_reference_keeps_its_digits_over_many_classes(name: str) -> None:
    """What the logsumexps lose is common to all classes, and no sum over them averages it out."""
    draw = torch.Generator().manual_seed(1)
    student, teacher = (torch.randn(64, 4096, generator=draw) / 4 for _ in range(2))
    target = torch.arange(64)
    options = {"temperature": 1.0} | ({"alpha": 0.0} if name == "dkd" else {})
    case = Case(SPECS[name], "reference", "cpu")
    loss, truth = (
        case(student.to(dtype), teacher.to(dtype), target, reduction="none", **options)
        for dtype in (torch.float32, torch.float64)
    )
    error = (loss.double() / truth - 1) / torch.finfo(torch.float32).eps
    # 0.6 as it is, 1.3 with undivided probabilities, 7 with q beside p exp(-d).
    assert error.square().mean().sqrt() <= 1


@each_emulated([s for s in ROW_LOSSES if not s.needs_teacher_mass])
def test_a_term_of_weight_0_is_not_there(case: Case) -> None:
    """Not even where it is infinite: 0 times infinity is no NaN. A NaN row stays NaN."""
    student, teacher, target = make("mask_different", 6, 9, device=case.device)
    student[2, 3] = float("nan")
    others = torch.arange(6) != 2
    options = [n for n in option_names(case.spec) if n not in case.spec.domains]
    weights = [n for n in ("alpha", "beta") if n in options]
    for names in (("loss_weight",), weights, *((n,) for n in weights)):
        options = dict.fromkeys(names, 0.0)
        for reduction in ("none", "sum"):
            loss, gradient = value_and_grad(
                case, student, teacher, target, reduction=reduction, **options
            )
            assert loss[2].isnan() if reduction == "none" else loss.isnan()
            assert not gradient[others].isnan().any()
            if reduction == "none":
                assert not loss[others].isnan().any()
                if names == ("loss_weight",) or (names == weights and weights):
                    assert (loss[others] == 0).all() and (gradient[others] == 0).all()


@each_emulated([s for s in ROW_LOSSES if s.needs_target])
def test_a_student_without_other_classes(case: Case) -> None:
    """The teacher has some: +inf, and no gradient of what has no distribution."""
    student = torch.tensor([[1.0, -torch.inf], [0.5, 0.25]], device=case.device)
    teacher = torch.tensor([[0.5, 1.0], [0.5, 1.0]], device=case.device)
    target = torch.tensor([0, 1], device=case.device)
    loss, gradient = value_and_grad(case, student, teacher, target, reduction="none", beta=1.0)
    assert loss[0] == torch.inf and loss[1].isfinite()
    _, explicit = value_and_grad(case, student, teacher, target, reduction="none", beta=0.0)
    assert gradient.isfinite().all()
    torch.testing.assert_close(gradient[0], explicit[0])


@each([spec for spec in LOSSES if spec.name == "alpha_beta"], gap=(3.0, 80.0, 200.0))
def test_a_divergence_that_is_infinite_by_its_exponent(case: Case, gap: float) -> None:
    """beta = 0 and a class that the student excludes: (q^alpha - p^alpha) / alpha by log q."""
    student = torch.tensor([[1.0, 2.0, -torch.inf, 0.0], [0.0, 1.0, 2.0, 3.0]], device=case.device)
    teacher = torch.tensor([[1.0, 0.0, -gap, 3.0], [3.0, 1.0, 2.0, 0.0]], device=case.device)
    options = {"alpha": 0.9, "beta": 0.0, "reduction": "none"}
    loss, gradient = value_and_grad(case, student, teacher, upstream=torch.ones(2), **options)
    # A probability that float32 does not have is 0.
    assert loss[0] == torch.inf if gap < 100 else loss[0].isfinite()
    assert loss[1].isfinite()
    q, p = student.double().softmax(-1), teacher.double().softmax(-1)
    slope = (q**0.9 - p**0.9) / 0.9
    wanted = slope - q * slope.sum(-1, keepdim=True)
    torch.testing.assert_close(gradient.double(), wanted, rtol=1e-5, atol=1e-6)


@each_emulated([s for s in LOSSES if s.family == "correlation"], eps=(0.0, 1e-8), shared=("eps",))
def test_constants_have_no_correlation_whatever_eps(case: Case, eps: float) -> None:
    """One row: every column is a constant. Not 0 / 0."""
    for rows, constant in ((1, False), (5, True)):
        student, teacher, _ = make("gaussian", rows, 9, device=case.device)
        if constant:
            student = torch.zeros_like(student)
        loss, gradient = value_and_grad(case, student, teacher, eps=eps, beta=0.0)
        torch.testing.assert_close(loss, torch.ones_like(loss))
        assert gradient.isfinite().all()


@each_emulated([s for s in LOSSES if s.family == "correlation"])
def test_columns_whose_squares_underflow_leave_the_others_alone(case: Case) -> None:
    """Certain rows in float32: 1 / aa overflows in a column, and infinity times 0 would be NaN."""
    generator = torch.Generator().manual_seed(6)
    student, teacher = 30 * torch.randn(2, 12, 9, generator=generator).to(case.device)
    for rows in (5, 12):
        pair = student[:rows], teacher[:rows]
        loss, gradient = value_and_grad(case, *pair, eps=0.0)
        wide = [x.double() for x in pair]
        wanted, right = value_and_grad(case.spec.function, *wide, eps=0.0, backend="reference")
        torch.testing.assert_close(loss.double(), wanted, rtol=1e-3, atol=1e-3)
        assert (gradient.double() - right).abs().max() <= 0.25 * right.abs().max()


@each([s for s in LOSSES if s.family == "correlation"], classes=(3, 7, 10), rows=(3, 7, 9))
def test_constants_whose_mean_rounds(case: Case, classes: int, rows: int) -> None:
    """The mean of seven times 1/7 is not 1/7 in floating point, and yet a constant has no slope."""
    _, teacher, _ = make("gaussian", rows, classes, device=case.device, dtype=torch.float64)
    student = torch.arange(float(rows)).to(teacher)[:, None].expand(rows, classes).contiguous()
    softmax = case.spec.activation == "softmax"  # of sigmoids the columns are no constants
    options = {} if softmax else {"gamma": 0.0}
    loss, gradient = value_and_grad(case, student, teacher, eps=0.0, **options)
    torch.testing.assert_close(
        loss, torch.full_like(loss, 2.0 if softmax else 1.0), rtol=1e-15, atol=0.0
    )
    assert not gradient.any()


@each([spec for spec in LOSSES if spec.name == "aekt"])
def test_a_ratio_that_underflows_has_a_root(case: Case) -> None:
    """p_t / q_t = exp(-800) is no number of float64, and its square root exp(-400) is one."""
    dtype = torch.float64
    student, teacher = (torch.tensor([[x, 0.0, 0.0]], dtype=dtype) for x in (100.0, -800.0))
    options = {"beta": 0.0, "kappa": 0.5, "temperature": 1.0}
    target = torch.zeros(1, dtype=torch.int64)
    leaf = student.to(case.device).requires_grad_()
    case(leaf, teacher.to(case.device), target.to(case.device), **options).backward()
    assert leaf.grad is not None
    # The derivative of TCKD is q_t - p_t, which is 1 but for 1e-43.
    torch.testing.assert_close(
        leaf.grad[0, 0].item(), np.exp(-400.0) / np.sqrt(2.0), rtol=1e-11, atol=0.0
    )


@each([spec for spec in LOSSES if spec.name == "dist"])
def test_the_mean_of_many_columns(case: Case) -> None:
    """Constant columns have the correlation 0, and in their mean of 1 no errors add up."""
    classes = case.pick(40_000, 40)
    student, teacher, _ = make("gaussian", 1, classes, dtype=torch.float64)
    loss = case(student.to(case.device), teacher.to(case.device), beta=0.0)
    torch.testing.assert_close(loss.item(), 1.0, rtol=1e-14, atol=0.0)


@each(
    [s for s in LOSSES if s.takes_target],
    dtype={dtype_id(d): d for d in sorted(_checks.INTEGERS, key=str)},
    shared=("dtype",),
    keep=alone_if_interpreted,
)
def test_targets_of_any_integer_type(case: Case, dtype: torch.dtype) -> None:
    """A narrow type wraps neither the classes nor the index that is ignored."""
    for classes, wrong in ((260, 270), (100, 120)):
        student, teacher, target = make("gaussian", 4, classes, device=case.device)
        target %= 100
        expected = case(student, teacher, target=target)
        if torch.iinfo(dtype).max >= classes - 1 or (target <= torch.iinfo(dtype).max).all():
            actual = case(student, teacher, target=target.to(dtype), ignore_index=-(2**40))
            torch.testing.assert_close(actual, expected)
        if case.spec.needs_target and case.device == "cpu" and wrong <= torch.iinfo(dtype).max:
            target[1] = wrong
            with pytest.raises(ValueError, match=r"class indices must be in \[0, "):
                case(student, teacher, target=target.to(dtype))


def _freed(x: Tensor, offset: bool) -> Tensor:
    x = torch.stack([x, x])[1] if offset else x.clone()
    x.untyped_storage().resize_(0)
    return x


@pytest.mark.parametrize("offset", (False, True))
@pytest.mark.parametrize("backend", (None, "reference"))
@pytest.mark.parametrize("spec", SPECS.values(), ids=LOSS_IDS)
def test_memory_that_was_freed(spec: LossSpec, backend: str | None, offset: bool) -> None:
    """Sharded training gives storages back; to read them would be a crash."""
    inputs = named_inputs(spec)
    for name, value in inputs.items():
        changed = {**inputs, name: _freed(value, offset)}
        with pytest.raises(
            ValueError, match=rf"^{name} must be a Tensor with memory, got one whose"
        ):
            spec.function(**changed, backend=backend)


@each(keep=lambda case: not case.interpreted)  # the interpreter wants addresses
def test_tensors_that_know_that_they_are_zero(case: Case) -> None:
    """``torch._efficientzerotensor`` has no memory and needs none."""
    student, teacher, target = make("gaussian", 4, 9, device=case.device)
    zero = torch._efficientzerotensor((4, 9), device=case.device)
    for pair, plain in (
        ((zero, teacher), (torch.zeros_like(student), teacher)),
        ((student, zero), (student, torch.zeros_like(teacher))),
    ):
        torch.testing.assert_close(case(*pair, target), case(*plain, target))


# Losses of other losses' rows ask for their gradients in the backward pass.
@each([s for s in LOSSES if s.steps is None], kernels=True)
def test_too_little_memory_says_so(case: Case) -> None:
    """A petabyte of gradient, from one number: no crash and no name of a macro."""
    if case.device != "cpu":
        pytest.skip("allocators of GPUs have their own words")
    student = torch.zeros(1, 1).expand(1 << 24, 1 << 24).requires_grad_()
    target = torch.zeros(1, dtype=torch.int64).expand(1 << 24)
    with pytest.raises((RuntimeError, MemoryError)) as error:
        case(student, student.detach(), target)
    assert "API call failed" not in str(error.value) and "memory" in str(error.value)


@pytest.mark.parametrize("spec", LOSSES, ids=LOSS_IDS)
def test_temperatures_and_numbers_at_the_ends_of_their_range(spec: LossSpec) -> None:
    """What is allowed is finite, in float32 too."""
    student, teacher, target = make("gaussian", 6, 9)
    for value in (_checks.COLDEST, _checks.HOTTEST):
        for reduction in reductions(spec):
            options = {**at_temperature(spec, value), "loss_weight": np.float64(_checks.LARGEST)}
            case = Case(spec, "reference", "cpu")
            loss, gradient = value_and_grad(
                case, student, teacher, target, reduction=reduction, **options
            )
            assert loss.isfinite().all() and gradient.isfinite().all()


@each(ROW_LOSSES, mask=(-1e6, -1e9))
def test_a_finite_mask_on_the_teachers_likeliest_class(case: Case, mask: float) -> None:
    """The gradient of the other classes keeps its digits, though differences of logits have few."""
    student = torch.tensor([[0.96, 2.5, mask, 2.47], [0.5, -1.0, mask, 2.0]])
    teacher = torch.tensor([[-1.5, -3.0, 0.0, -1.25], [2.0, 0.5, 2.5, -1.0]])
    target = torch.tensor([1, 3])
    spec = Case(case.spec, "reference", "cpu")
    _, expected = value_and_grad(spec, student.double(), teacher.double(), target)
    _, gradient = value_and_grad(case, student, teacher, target)
    near = 1e-4 * expected.abs().amax(1, keepdim=True)
    assert ((gradient - expected).abs() <= near).all()


@each(SOFTMAX_ROWS)
def test_a_teacher_without_a_class_beside_a_certain_student(case: Case) -> None:
    student = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    teacher = torch.tensor([[-torch.inf, -torch.inf], [0.5, 0.0]])
    loss = case(student, teacher, torch.tensor([0, 1]), reduction="none")
    assert loss[0].isnan() and loss[1].isfinite()


@each(SOFTMAX_ROWS, keep=alone_if_interpreted)
def test_a_common_offset_costs_the_cross_entropy_nothing(case: Case) -> None:
    student, teacher, target = make("gaussian", 4, 9)
    student = (student * 64).round() / 64
    given = {"target": target, "hard_weight": 1.0, "loss_weight": 0.0, "reduction": "none"}
    expected = torch.nn.functional.cross_entropy(student.double(), target, reduction="none")
    loss = case(student + 65536.0, teacher, **given).double()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)


@each(ROW_LOSSES, keep=alone_if_interpreted)
def test_no_items_in_a_batch_without_any(case: Case) -> None:
    """As a trainer counts them where every label is ignored."""
    student, teacher, _ = make("gaussian", 3, 5)
    ignored = torch.full((3,), -100)
    options = {"target": ignored, "num_items_in_batch": torch.tensor(0)}
    loss, gradient = value_and_grad(case, student, teacher, **options)
    assert loss == 0 and not gradient.any()

"""``teacher_grad=True``: the gradient by the teacher, beside that by the student.

It must equal autograd's in float64 of the losses written plainly (``plain_losses.py``), and of a
loss whose roles are exchanged the student's. What else looks on: test_teacher_grad_surroundings.py.
"""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from cases import (
    LOSS_IDS,
    LOSSES,
    ROW_LOSSES,
    SOFTMAX,
    Case,
    alone_if_interpreted,
    each,
    each_sample,
    once_if_interpreted,
    row_weights,
    same_bits,
)
from inputs import FAMILIES, make
from plain_losses import PLAIN, gradients, pair, plain
from torch import Tensor

from kdkernels.registry import SPECS, LossSpec

losses = pytest.mark.parametrize("spec", LOSSES, ids=LOSS_IDS)
ON = {"teacher_grad": True}


@each_sample(
    dtype=(torch.float64, torch.float32),
    keep=once_if_interpreted,
)
def test_both_gradients_are_those_of_the_plain_formula(
    case: Case, options: dict[str, Any], dtype: torch.dtype
) -> None:
    """And value and student's gradient those of a constant teacher, to the bit."""
    student, teacher, target = pair(dtype=dtype, device=case.device)
    loss = case(student, teacher, target, **options, **ON)
    own, given = gradients(loss, student, teacher)
    alone = case(student, teacher.detach(), target, **options)
    assert same_bits(loss.detach(), alone.detach())
    assert same_bits(own, *gradients(alone, student))
    values = plain(case.spec, student, teacher, target, options)
    expected = gradients(values.mean(), student, teacher)
    close = (
        {"rtol": 1e-9, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 2e-6}
    )
    torch.testing.assert_close(loss.detach().double(), values.mean().detach(), **close)
    for actual, wanted in zip((own, given), expected, strict=True):
        assert actual.dtype == dtype and actual.any()
        torch.testing.assert_close(actual, wanted, **close)


ROLES: list[tuple[str, dict[str, Any], str, dict[str, Any]]] = [
    ("kd", {"temperature": 2.0}, "reverse_kl", {"temperature": 2.0, "loss_weight": 4.0}),
    ("reverse_kl", {}, "kd", {"temperature": 1.0}),
    ("tv", {}, "tv", {}),
    ("dist", {"tau": 2.0, "gamma": 0.5}, "dist", {"tau": 2.0, "gamma": 0.5}),
    ("jsd", {"beta": 0.125}, "jsd", {"beta": 0.875}),
    ("mixed_kl", {"forward_weight": 0.25}, "mixed_kl", {"forward_weight": 0.75}),
    ("mixed_kl", {"forward_weight": 0.0}, "kd", {"temperature": 1.0}),
    ("skew_kl", {"alpha": 0.25}, "skew_reverse_kl", {"alpha": 0.25}),
    ("skew_reverse_kl", {"alpha": 0.25}, "skew_kl", {"alpha": 0.25}),
    ("alpha_beta", {"alpha": 0.25, "beta": 0.5}, "alpha_beta", {"alpha": 0.5, "beta": 0.25}),
    ("acceptance", {}, "acceptance", {}),
]


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize(
    ("name", "options", "other", "exchanged"), ROLES, ids=lambda x: x if isinstance(x, str) else ""
)
def test_roles_exchanged_give_the_teachers_gradient(
    name: str, options: dict[str, Any], other: str, exchanged: dict[str, Any], backend: str
) -> None:
    student, teacher, _ = pair(dtype=torch.float32)
    one, two = (Case(SPECS[x], backend, "cpu") for x in (name, other))
    _, given = gradients(one(student, teacher, **options, **ON), student, teacher)
    (expected,) = gradients(two(teacher, student.detach(), **exchanged), teacher)
    if backend == "native":
        assert same_bits(given, expected)
    torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-6)


HARD = ("peaked", "disagreeing", "nearly_equal", "close", "offset", "gap", "ties", "constant_rows")


@each(ROW_LOSSES, family=HARD, keep=lambda case, family: not case.interpreted)
def test_hard_inputs_in_float32(case: Case, family: str) -> None:
    """The reference in float64 is the judge, but where jumps or bounds depend on the dtype."""
    student, teacher, target = make(family, 5, 12, dtype=torch.float32, device=case.device)
    student.requires_grad_()
    teacher.requires_grad_()
    options = {"reduction": "none", "temperature": 1.0, **ON}
    loss = case(student, teacher, target, **options)
    _, given = gradients(loss, student, teacher)
    s, t = student.double(), teacher.double()
    wide = Case(case.spec, "reference", case.device)(s, t, target, **options)
    _, expected = gradients(wide, s, t)
    assert given.isfinite().all()
    jumps = not case.spec.smooth and family not in ("disagreeing", "close")
    if not jumps:
        size = expected.abs().amax(-1, keepdim=True)
        assert ((given - expected).abs() <= 2e-4 * size + 1e-5).all()


EXCLUDING = [name for name in FAMILIES if name not in HARD]


@losses
@pytest.mark.parametrize("family", EXCLUDING)
def test_excluded_classes_and_bad_rows(spec: LossSpec, family: str) -> None:
    """Kernels are finite in the rows in which the reference is, and equal there."""
    found = []
    for backend in ("native", "reference"):
        student, teacher, target = make(family, 6, 9, dtype=torch.float64)
        student.requires_grad_()
        teacher.requires_grad_()
        options = {"reduction": "none"} if spec.by_row else {}
        loss = Case(spec, backend, "cpu")(student, teacher, target, **options, **ON)
        found.append(gradients(loss, student, teacher)[1])
    finite = [x.isfinite().all(1) for x in found]
    assert torch.equal(*finite)
    given, expected = (x[finite[0]] for x in found)
    torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-10)


@each([spec for spec in LOSSES if spec.takes_target])
def test_ignored_rows_have_no_gradient(case: Case) -> None:
    """Nor the others' another one, whatever the ignored ones hold."""
    student, teacher, target = pair(dtype=torch.float32, device=case.device)
    kept = torch.tensor([0, 2, 3, 5])
    whole = case(student[kept], teacher[kept], target[kept], **ON, **_mask(case, target[kept]))
    expected = gradients(whole, student, teacher)
    target[[1, 4]] = -100
    with torch.no_grad():
        student[1], teacher[1], teacher[4] = torch.nan, torch.inf, torch.nan
    loss = case(student, teacher, target, **ON, **_mask(case, target))
    torch.testing.assert_close(loss, whole)
    for actual, wanted in zip(gradients(loss, student, teacher), expected, strict=True):
        assert (actual[[1, 4]] == 0).all()
        torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-7)


def _mask(case: Case, target: Tensor) -> dict[str, Tensor]:
    return {} if case.spec.needs_target else {"target": target}


@each(ROW_LOSSES, keep=alone_if_interpreted)
def test_keywords_of_rows(case: Case) -> None:
    """Weights, temperatures, denominators, learned weights, cross-entropies and parts."""
    student, teacher, target = pair(device=case.device)
    weight = torch.linspace(0.5, 2.0, 6, dtype=torch.float64)
    heats = torch.linspace(1.0, 3.0, 6, dtype=torch.float64)
    learned = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    softmax = case.spec in SOFTMAX  # only it has a cross-entropy beside it
    beside = {"hard_weight": 0.5, "return_parts": True} if softmax else {}
    given: Any = case(
        student, teacher, target, token_weight=weight, temperature=heats, num_items_in_batch=9,
        loss_weight=learned, **ON, **beside,
        **({} if case.spec.needs_target else {"target": target}),
    )  # fmt: skip
    loss = given[0] if softmax else given
    rows = [
        plain(
            case.spec, student[i : i + 1], teacher[i : i + 1], target[i : i + 1],
            {"temperature": heats[i].item(), "loss_weight": 1.0},
        )
        for i in range(6)
    ]  # fmt: skip
    values = learned * torch.cat(rows)
    if softmax:
        values = values + 0.5 * torch.nn.functional.cross_entropy(student, target, reduction="none")
    expected = (weight * values).sum() / 9
    leaves = student, teacher, learned
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)
    if softmax:
        torch.testing.assert_close(given[1].distillation + given[1].hard, loss.detach())
    pairs = zip(gradients(loss, *leaves), gradients(expected, *leaves), strict=True)
    for actual, wanted in pairs:
        torch.testing.assert_close(actual, wanted, rtol=1e-8, atol=1e-11)


@each(ROW_LOSSES, reduction=("mean", "sum", "none"), shared=("reduction",))
def test_half_precision_images_and_reductions(case: Case, reduction: str) -> None:
    """Gradients have the dtypes and shapes of what they are of, and any upstream."""
    student, teacher, target = pair(12, 5, device=case.device)
    shape = 2, 5, 2, 3
    student, teacher = (x.detach().reshape(2, 2, 3, 5).movedim(-1, 1) for x in (student, teacher))
    s, t = student.half().requires_grad_(), teacher.bfloat16().requires_grad_()
    y = target.reshape(2, 2, 3)
    loss = case(s, t, y, reduction=reduction, **ON)
    assert loss.shape == (y.shape if reduction == "none" else ())
    upstream = row_weights(loss)
    given = torch.autograd.grad(loss, (s, t), upstream)
    assert [x.dtype for x in given] == [torch.float16, torch.bfloat16]
    flat = [x.detach().double().movedim(1, -1).reshape(12, 5).requires_grad_() for x in (s, t)]
    values = plain(case.spec, *flat, target, {})
    factor = upstream.reshape(-1) if reduction == "none" else 1 / 12 if reduction == "mean" else 1
    expected = gradients(values * factor, *flat)
    for actual, wanted in zip(given, expected, strict=True):
        assert actual.shape == shape
        rows = actual.movedim(1, -1).reshape(12, 5).double()
        size = wanted.abs().max().item()
        torch.testing.assert_close(rows, wanted, rtol=2e-2, atol=1e-2 * size)


@losses
def test_any_shape_and_a_second_backward_pass(spec: LossSpec) -> None:
    student, teacher, target = pair()
    options = {"class_dim": 0} if "class_dim" in inspect.signature(spec.function).parameters else {}
    s, t = (x.detach().t().contiguous().requires_grad_() if options else x
            for x in (student, teacher))  # fmt: skip
    index = {spec.target_name: target} if spec.needs_target else {}
    loss = spec.function(s, t, **index, **options, **ON)
    first = torch.autograd.grad(loss, (s, t), retain_graph=True)
    second = torch.autograd.grad(loss, (s, t))
    assert all(same_bits(a, b) for a, b in zip(first, second, strict=True))
    expected = gradients(spec.function(student, teacher, **index, **ON), student, teacher)
    for actual, wanted in zip(first, expected, strict=True):
        torch.testing.assert_close(actual.t() if options else actual, wanted)


@losses
def test_a_gradient_that_nobody_wants_is_not_made(spec: LossSpec) -> None:
    """A frozen student, a frozen teacher, and no graph; the Module takes the keyword."""
    student, teacher, target = pair()
    index = {spec.target_name: target} if spec.needs_target else {}
    module = spec.module(**ON)
    both = gradients(module(student, teacher, **index), student, teacher)
    assert "teacher_grad=True" in repr(module)
    (of_teacher,) = gradients(module(student.detach(), teacher, **index), teacher)
    (of_student,) = gradients(module(student, teacher.detach(), **index), student)
    assert same_bits(of_student, both[0]) and same_bits(of_teacher, both[1])
    with torch.no_grad():
        assert not module(student, teacher, **index).requires_grad
    assert not module(student.detach(), teacher.detach(), **index).requires_grad


@losses
def test_every_loss_has_a_plain_formula(spec: LossSpec) -> None:
    assert spec.name in PLAIN, f"write {spec.name} into tests/test_teacher_grad.py"

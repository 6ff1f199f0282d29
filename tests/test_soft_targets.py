"""Targets that are probabilities: the expectation of the loss over the target's class.

What a loss must equal is the weighted sum over all classes of the loss with that class as its
target, in float64, by the plain formulas of ``plain_losses.py`` or by the reference.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import LOSSES, Case, each, each_sample, once_if_interpreted, same_bits, value_and_grad
from inputs import make
from plain_losses import gradients, pair, plain
from torch import Tensor

import kdkernels
from kdkernels.registry import SPECS, LossSpec

DECOUPLED = [spec for spec in LOSSES if spec.family == "decoupled"]
assert [spec for spec in LOSSES if spec.needs_target] == DECOUPLED
decoupled = pytest.mark.parametrize("spec", DECOUPLED, ids=lambda spec: spec.name)


def dense(rows: int, classes: int) -> Tensor:
    made = torch.rand(rows, classes, generator=torch.Generator().manual_seed(3)).double() + 0.1
    return made / made.sum(-1, keepdim=True)


def one_hot(target: Tensor, classes: int) -> Tensor:
    return F.one_hot(target.cpu(), classes).double()


def smoothed(target: Tensor, classes: int, rate: float = 0.1) -> Tensor:
    return one_hot(target, classes) * (1 - rate) + rate / classes


def mixed(target: Tensor, classes: int) -> Tensor:
    """Of two classes, one of some rows, and none of the last."""
    share = torch.linspace(0.1, 1.0, len(target)).double()[:, None]
    made = share * one_hot(target, classes) + (1 - share) * one_hot(target.roll(1), classes)
    made[-1] = 0.0
    return made


def kinds(target: Tensor, classes: int) -> dict[str, Tensor]:
    return {
        "mixed": mixed(target, classes),
        "smoothed": smoothed(target, classes),
        "dense": dense(len(target), classes),
    }


def expected(
    spec: LossSpec, student: Tensor, teacher: Tensor, weights: Tensor, options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Value and gradient of each row's expectation in float64, by the reference of indices."""
    student = student.detach().double().requires_grad_()
    teacher, weights = teacher.double(), weights.to(student)
    total = torch.zeros(len(student), dtype=torch.float64, device=student.device)
    options = {**options, "reduction": "none", "backend": "reference"}
    for y in range(student.shape[-1]):
        rows = (weights[:, y] != 0).nonzero()[:, 0]
        index = torch.full((len(rows),), y, device=student.device)
        loss = spec.function(student[rows], teacher[rows], index, **options)
        total = total.index_add(0, rows, weights[rows, y] * loss)
    return total.detach(), *gradients(total, student)


@each_sample(
    DECOUPLED,
    dtype=(torch.float64, torch.float32),
    keep=once_if_interpreted,
)
def test_is_the_expectation_of_the_plain_formula(
    case: Case, options: dict[str, Any], dtype: torch.dtype
) -> None:
    student, teacher, target = pair(6, 5, dtype=dtype, device=case.device)
    teacher = teacher.detach()
    rows, classes = student.shape
    wide = dtype == torch.float64
    close = {"rtol": 1e-9, "atol": 1e-12} if wide else {"rtol": 2e-5, "atol": 2e-6}
    for weights in kinds(target, classes).values():
        weights = weights.to(case.device)
        values = torch.zeros(rows, dtype=torch.float64, device=case.device)
        for y in range(classes):
            index = torch.full((rows,), y, device=case.device)
            values = values + weights[:, y] * plain(case.spec, student, teacher, index, options)
        for reduction in ("none", "mean"):
            loss = case(student, teacher, weights.to(dtype), reduction=reduction, **options)
            wanted = values if reduction == "none" else values.mean()
            torch.testing.assert_close(loss.double(), wanted, **close)
            (given,) = gradients(loss, student)
            (judge,) = torch.autograd.grad(wanted.sum(), student, retain_graph=True)
            assert given.dtype == dtype and given.any()
            torch.testing.assert_close(given, judge.to(dtype), **close)


HARD = ("peaked", "disagreeing", "nearly_equal", "close", "offset", "gap", "ties", "constant_rows")


@each(DECOUPLED, family=HARD, keep=lambda case, family: not case.interpreted)
def test_hard_inputs_in_float32(case: Case, family: str) -> None:
    """Where p or q of a class is nearly 1, what the others leave is a small difference."""
    student, teacher, target = make(family, 6, 12, dtype=torch.float32, device=case.device)
    options = {"temperature": 1.0, "beta": 2.0}
    for name, weights in kinds(target, 12).items():
        weights = weights.to(student)
        loss, gradient = value_and_grad(
            case, student, teacher, weights, upstream=torch.ones(6), reduction="none", **options
        )
        values, judge = expected(case.spec, student, teacher, weights, options)
        size = judge.abs().amax(-1, keepdim=True)
        assert ((gradient - judge).abs() <= 2e-5 * size + 1e-6).all(), name
        assert ((loss - values).abs() <= 1e-5 * values + 1e-6).all(), name


@each(DECOUPLED, keep=lambda case: not case.interpreted)
def test_unlikely_classes_of_rows_that_agree(case: Case) -> None:
    """log(1 - p) of a small p has none of its digits: a class of 1e-13 is not one of 1e-16."""
    student = torch.tensor([[80.0, 50.0, -40.0, 0.0, 30.0], [0.0, 31.0, 3.0, 4.0, 2.0]]).double()
    teacher = student + torch.tensor([[0.01, -0.01, 0.02, 0.0, 0.01]]).double()
    weights = smoothed(torch.tensor([3, 2]), 5)
    options = {"temperature": 1.0, "alpha": 1e12, "beta": 1e-6}
    loss = case(student, teacher, weights, reduction="none", **options)
    values, _ = expected(case.spec, student, teacher, weights, options)
    torch.testing.assert_close(loss, values, rtol=1e-6, atol=0.0)


@decoupled
@pytest.mark.parametrize("family", ["masked_student", "masked_teacher", "masked_both"])
def test_excluded_classes(spec: LossSpec, family: str) -> None:
    student, teacher, target = make("gaussian", 7, 9, dtype=torch.float64)
    for x, place in ((student, "student"), (teacher, "teacher")):
        if family.endswith((place, "both")):
            x[::2, 1:3] = x[1, 4:] = -torch.inf
    for weights in kinds(target, 9).values():
        values, judge = expected(spec, student, teacher, weights, {})
        for backend in ("native", "reference"):
            case = Case(spec, backend, "cpu")
            loss, gradient = value_and_grad(
                case, student, teacher, weights, upstream=torch.ones(7), reduction="none"
            )
            torch.testing.assert_close(loss, values, rtol=1e-9, atol=1e-12)
            finite = values.isfinite()
            torch.testing.assert_close(gradient[finite], judge[finite], rtol=1e-8, atol=1e-11)


@each(DECOUPLED)
def test_two_labels_are_the_weighted_pair(case: Case) -> None:
    """To the bit without a reduction: no other class is looked at."""
    student, teacher, target = pair(dtype=torch.float32, device=case.device)
    teacher, other = teacher.detach(), target.roll(1)
    share = torch.linspace(0.6, 0.9, len(target), device=case.device)
    weights = share[:, None] * one_hot(target, 11) + (1 - share)[:, None] * one_hot(other, 11)
    options: dict[str, Any] = {"hard_weight": 0.5, "reduction": "none"}
    weights = weights.float()
    shares = [weights.gather(1, y[:, None])[:, 0] for y in (target, other)]
    shares[1] = torch.where(target == other, 0.0, shares[1])
    loss = case(student, teacher, weights, **options)
    both = [
        case(student, teacher, y, token_weight=w, **options)
        for y, w in zip((target, other), shares, strict=True)
    ]
    assert same_bits(loss, both[0] + both[1])
    torch.testing.assert_close(gradients(loss, student), gradients(both[0] + both[1], student))


@each(DECOUPLED)
def test_indices_as_probabilities(case: Case) -> None:
    student, teacher, target = make("gaussian", 5, 7, dtype=torch.float32, device=case.device)
    one = value_and_grad(case, student, teacher, target)
    other = value_and_grad(case, student, teacher, one_hot(target, 7).to(student))
    torch.testing.assert_close(one, other)


@decoupled
def test_common_keywords(spec: LossSpec) -> None:
    student, teacher, target = make("gaussian", 6, 8, dtype=torch.float64)
    weights = smoothed(target, 8)
    loss = spec.function
    rows, judge = expected(spec, student, teacher, weights, {"temperature": 2.0})
    soft = {"temperature": 2.0, "target": weights}
    weight = torch.linspace(0.5, 2.0, 6).double()
    torch.testing.assert_close(
        loss(student, teacher, token_weight=weight, **soft), (rows * weight).mean()
    )
    torch.testing.assert_close(
        loss(student, teacher, num_items_in_batch=24, **soft), rows.sum() / 24
    )
    heats = torch.full((6,), 2.0).double()
    torch.testing.assert_close(
        loss(student, teacher, weights, temperature=heats, loss_weight=torch.tensor(0.25)),
        rows.mean() / 4,
    )
    entropies = F.cross_entropy(student, weights, reduction="none")
    total, parts = loss(student, teacher, hard_weight=0.5, return_parts=True, **soft)
    torch.testing.assert_close(total, (rows + 0.5 * entropies).mean())
    torch.testing.assert_close(parts.distillation, rows.mean())
    torch.testing.assert_close(parts.hard, 0.5 * entropies.mean())
    both = expected(spec, student, teacher, weights, {"standardize": True, "hard_weight": 0.5})
    judged = value_and_grad(
        loss, student, teacher, weights, upstream=torch.ones(6), reduction="none",
        standardize=True, hard_weight=0.5,
    )  # fmt: skip
    torch.testing.assert_close(judged, both)
    q = (student / 2).softmax(-1)
    torch.testing.assert_close(parts.entropy, -(q * q.log()).sum(-1))
    averaged = [teacher, teacher + 1.0]
    torch.testing.assert_close(loss(student, averaged, **soft), rows.mean())
    module = spec.module(temperature=2.0)
    torch.testing.assert_close(module(student, teacher, weights), rows.mean())
    torch.testing.assert_close(module(student, teacher, labels=weights), rows.mean())
    assert judge.any()


@decoupled
def test_cross_entropy_of_logits_with_an_offset(spec: LossSpec) -> None:
    student, teacher, target = make("gaussian", 4, 7, dtype=torch.float32)
    student, weights = student + 1e4, smoothed(target, 7).float()
    loss = spec.function(
        student, teacher, weights, hard_weight=1.0, loss_weight=0.0, reduction="none"
    )
    judge = F.cross_entropy(student.double(), weights.double(), reduction="none")
    torch.testing.assert_close(loss.double(), judge, rtol=1e-6, atol=1e-6)


@decoupled
def test_a_device_that_the_numbers_are_not_on(spec: LossSpec) -> None:
    """0-d tensors of the CPU, beside logits of another device."""
    given = (x.to("meta") for x in (*make("gaussian", 4, 7)[:2], torch.ones(4, 7)))
    weight = torch.tensor(0.5)
    loss = spec.function(*given, backend="reference", loss_weight=weight, hard_weight=0.3)
    assert loss.is_meta


@decoupled
def test_exported_with_any_number_of_rows(spec: LossSpec) -> None:
    class Model(torch.nn.Module):
        def forward(self, s: Tensor, t: Tensor, w: Tensor) -> Tensor:
            return spec.function(s, t, w)

    student, teacher, target = make("gaussian", 4, 7)
    weights = smoothed(target, 7).float()
    rows = torch.export.Dim("rows")
    made = torch.export.export(
        Model(), (student, teacher, weights), dynamic_shapes=({0: rows},) * 3
    )
    more = [x.repeat(2, 1) for x in (student, teacher, weights)]
    torch.testing.assert_close(made.module()(*more), spec.function(*more))


@decoupled
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_layouts(spec: LossSpec, backend: str) -> None:
    """(B, S, V), (N, C, H, W), and any by ``class_dim``; half precision; strides."""
    student, teacher, target = make("gaussian", 24, 5, dtype=torch.float32)
    weights = smoothed(target, 5).float()
    case = Case(spec, backend, "cpu")
    value, gradient = value_and_grad(case, student, teacher, weights)

    def check(there: Any, back: Any, **how: Any) -> None:
        given = [there(x) for x in (student, teacher, weights)]
        loss, made = value_and_grad(case, *given, **how)
        torch.testing.assert_close(loss, value)
        torch.testing.assert_close(back(made), gradient)

    check(lambda x: x.reshape(4, 6, 5), lambda x: x.reshape(24, 5))
    check(
        lambda x: x.reshape(2, 3, 4, 5).movedim(-1, 1),
        lambda x: x.movedim(1, -1).reshape(24, 5),
    )
    check(
        lambda x: x.reshape(4, 6, 5).movedim(-1, 1).contiguous(),
        lambda x: x.movedim(1, -1).reshape(24, 5),
        class_dim=1,
    )
    check(lambda x: x.T.contiguous().T, lambda x: x)
    none = value_and_grad(case, *(x[:0] for x in (student, teacher, weights)))
    assert none[0] == 0 and none[1].shape == (0, 5)
    for dtype in (torch.bfloat16, torch.float16):
        narrow = [x.to(dtype) for x in (student, teacher, weights)]
        wide = value_and_grad(case, *(x.float() for x in narrow))
        loss, made = value_and_grad(case, *narrow)
        assert made.dtype == dtype and loss.dtype == torch.float32
        torch.testing.assert_close(loss, wide[0])
        torch.testing.assert_close(made.float(), wide[1], rtol=2e-2, atol=2e-3)


@decoupled
def test_compiled_and_transformed(spec: LossSpec) -> None:
    student, teacher, target = make("gaussian", 6, 8, dtype=torch.float64)
    weights = smoothed(target, 8)

    def loss(s: Tensor, w: Tensor = weights) -> Tensor:
        return spec.function(s, teacher, w)

    value, gradient = value_and_grad(loss, student)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(value_and_grad(compiled, student), (value, gradient))
    torch.testing.assert_close(torch.func.grad(loss)(student), gradient)
    tangent = torch.ones_like(student).cumsum(1)
    _, moved = torch.func.jvp(loss, (student,), (tangent,))
    torch.testing.assert_close(moved, (gradient * tangent).sum())

    def twice(backend: str | None) -> Tensor:
        leaf = student.clone().requires_grad_()
        made = spec.function(leaf, teacher, weights, backend=backend)
        (first,) = torch.autograd.grad(made, leaf, create_graph=True)
        return torch.autograd.grad(first.square().sum(), leaf)[0]

    assert twice("reference").any()
    with pytest.raises(RuntimeError, match="differentiated twice"):
        twice("native")


BAD: list[tuple[Any, dict[str, Any], str]] = [
    (lambda w: w[:, :-1], {}, "target must be of the logits' shape (4, 6) .*, got (4, 5)"),
    (lambda w: w[:, 0], {}, "target must be integer class indices.*, got torch.float32"),
    (lambda w: -w, {}, "target must be probabilities, finite and >= 0, got -.*"),
    (lambda w: w * torch.nan, {}, "target must be probabilities, finite and >= 0, got nan"),
    (lambda w: w.to("meta"), {}, "target must be on the student's device cpu, got meta"),
    (lambda w: w.clone().requires_grad_(), {}, "target must be a constant .*"),
    (lambda w: w, {"teacher_grad": True}, "target must be class indices where teacher_grad.*"),
]


@decoupled
@pytest.mark.parametrize(("spoil", "options", "text"), BAD, ids=[text for _, _, text in BAD])
def test_errors(spec: LossSpec, spoil: Any, options: dict[str, Any], text: str) -> None:
    student, teacher, target = make("gaussian", 4, 6, dtype=torch.float32)
    pattern = ".*".join(re.escape(part) for part in text.split(".*"))
    teacher.requires_grad_("teacher_grad" in options)
    with pytest.raises((ValueError, TypeError), match=pattern):
        spec.function(student, teacher, spoil(smoothed(target, 6).float()), **options)


def test_other_losses_refuse_probabilities() -> None:
    """A loss whose target is but a mask, or class indices."""
    student, teacher, target = make("gaussian", 4, 6, dtype=torch.float32)
    for spec in SPECS.values():
        if spec in LOSSES and spec.takes_target and spec not in DECOUPLED:
            with pytest.raises((ValueError, TypeError), match=r"(target|labels) must be"):
                spec.function(student, teacher, **{spec.target_name: smoothed(target, 6)})
    with kdkernels.use_backend("reference"):
        assert SPECS["dkd"].function(student, teacher, smoothed(target, 6)) > 0

"""Laws that hold whatever the numbers: those a loss names in ``LossSpec.laws``, and those of all.

Float64, so that a law is checked to rounding; hypothesis draws shapes, values and options.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import (
    DEVICES,
    LOSSES,
    ROW_LOSSES,
    SOFTMAX,
    Case,
    alone_if_interpreted,
    at_temperature,
    each_emulated as each,
    option_names,
    params,
    temperature_name,
    value_and_grad,
)
from hypothesis import given, settings, strategies as st
from inputs import make
from torch import Tensor

from kdkernels.registry import SPECS

Inputs = tuple[Tensor, Tensor, Tensor]
CLOSE = {"rtol": 1e-9, "atol": 1e-11}
EXAMPLES = 12
LAWS: dict[str, Callable[[Case, Inputs, dict[str, Any]], None]] = {}


def _law(function: Callable[[Case, Inputs, dict[str, Any]], None]) -> Any:
    LAWS[function.__name__] = function
    return function


def _options(case: Case, draw: st.DataObject) -> dict[str, Any]:
    """One of the registry's samples at a temperature of its own."""
    options = dict(draw.draw(st.sampled_from(list(case.spec.samples)), "options"))
    temperature = draw.draw(st.sampled_from([0.5, 1.0, 3.0, 4.0]), "temperature")
    return {**options, **at_temperature(case.spec, temperature)}


def _draw(case: Case, draw: st.DataObject) -> Inputs:
    limit = case.pick(40, 9)
    rows = draw.draw(st.integers(2, case.pick(9, 4)), "rows")
    classes = draw.draw(st.integers(3, limit), "classes")
    family = draw.draw(st.sampled_from(["gaussian", "ties", "disagreeing"]), "family")
    seed = draw.draw(st.integers(0, 99), "seed")
    return make(family, rows, classes, seed=seed, dtype=torch.float64, device=case.device)


@_law
def non_negative(case: Case, inputs: Inputs, options: dict[str, Any]) -> None:
    assert case(*inputs, **{**options, "loss_weight": 1.0}) >= -1e-12


@_law
def zero_iff_equal(case: Case, inputs: Inputs, options: dict[str, Any]) -> None:
    student, _, target = inputs
    teacher = student.clone()
    # The gaps are rounding errors of the same logits, the loss their square where it is smooth.
    most = 1e-28 if case.spec.smooth else 1e-14
    assert 0 <= case(student, teacher, target, **options) <= most
    weights = {"alpha", "beta"} & set(option_names(case.spec)) - set(case.spec.domains)
    options |= {name: 1.0 for name in weights}
    options |= at_temperature(case.spec, 4.0)  # no row is so certain that a step of 1 is nothing
    teacher[0, target[0]] += 1.0
    assert case(student, teacher, target, **options) > 1e-6


@_law
def shift(case: Case, inputs: Inputs, options: dict[str, Any]) -> None:
    """A constant added to a row of logits changes neither value nor gradient."""
    student, teacher, target = inputs
    ramp = torch.linspace(-30, 20, len(target), dtype=torch.float64).unsqueeze(1).to(student)
    expected = value_and_grad(case, student, teacher, target, **options)
    moved = value_and_grad(case, student + ramp, teacher - 2 * ramp, target, **options)
    for a, b in zip(moved, expected, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


@_law
def odds(case: Case, inputs: Inputs, options: dict[str, Any]) -> None:
    """Each class is a softmax of two: of its logit and 0."""
    student, teacher, _ = inputs

    def pairs(x: Tensor) -> Tensor:
        return torch.stack([x, torch.zeros_like(x)], -1).flatten(0, -2)

    def of_two(student: Tensor) -> Tensor:
        given = {**options, "reduction": "sum", "backend": "reference"}
        return SPECS["kd"].function(pairs(student), pairs(teacher), **given) / len(student)

    for a, b in zip(
        value_and_grad(case, student, teacher, **options),
        value_and_grad(of_two, student),
        strict=True,
    ):
        torch.testing.assert_close(a, b, **CLOSE)


@_law
def temperature_scaling(case: Case, inputs: Inputs, options: dict[str, Any]) -> None:
    """L(s, t, T) = L(s / T, t / T, 1), times T^2 where that is in."""
    student, teacher, target = inputs
    name = temperature_name(case.spec)
    assert name is not None
    options = {k: v for k, v in options.items() if k != "standardize"}
    temperature = options[name]
    direct = case(student, teacher, target, **options)
    scaled = case(student / temperature, teacher / temperature, target, **{**options, name: 1.0})
    factor = temperature**2 if case.spec.t_squared else 1.0
    torch.testing.assert_close(direct, factor * scaled, **CLOSE)


@_law
def masked_class(case: Case, inputs: Inputs, options: dict[str, Any]) -> None:
    """A class at -inf for both is as good as deleted; its gradient is 0."""
    student, teacher, target = inputs
    options = {k: v for k, v in options.items() if k != "standardize"}
    gone = student.shape[1] // 2
    keep = torch.arange(student.shape[1], device=student.device) != gone
    target = torch.where(target == gone, 0, target)
    shorter = target - (target > gone).long()
    expected = value_and_grad(case, student[:, keep], teacher[:, keep], shorter, **options)
    s, t = (x.masked_fill(~keep, -torch.inf) for x in (student, teacher))
    loss, gradient = value_and_grad(case, s, t, target, **options)
    torch.testing.assert_close(loss, expected[0], **CLOSE)
    torch.testing.assert_close(gradient[:, keep], expected[1], **CLOSE)
    assert not gradient[:, gone].any()


@_law
def affine(case: Case, inputs: Inputs, options: dict[str, Any]) -> None:
    """Pearson correlation: 0 for q = a p + b with a > 0 in each row, and for equal columns."""
    _, teacher, _ = inputs
    name = temperature_name(case.spec)
    assert name is not None
    tau = options[name]
    softmax = case.spec.activation == "softmax"
    if not softmax:  # ties would be constants
        ramp = torch.linspace(0, 1, teacher.numel(), dtype=torch.float64)
        teacher = teacher + ramp.reshape(teacher.shape).to(teacher)
    p = torch.softmax(teacher / tau, -1) if softmax else torch.sigmoid(teacher / tau)
    q = 0.7 * p + 0.3 / p.shape[1]
    student = tau * (q.log() if softmax else q.logit())
    rows = {name: tau, "beta": 1.0, "gamma": 0.0, "eps": 0.0}
    columns = {**rows, "beta": 0.0, "gamma": 1.0}
    for weights in (rows, columns):  # the same a and b in every row: columns are affine too
        loss, gradient = value_and_grad(case, student, teacher, **weights)
        tolerance = 1e-13 + 1e-15 / _spread(p) ** 2
        assert loss.abs() <= tau**2 * tolerance
        assert gradient.abs().max() <= tau * tolerance
    both = {**rows, "gamma": 1.0}
    bent = student + torch.linspace(0, 1, p.shape[1], dtype=torch.float64).square().to(p)
    assert case(bent, teacher, **both) > 1e-6


def _spread(p: Tensor) -> float:
    """The smallest norm by which the gradient of a correlation divides."""
    rows = (p - p.mean(1, keepdim=True)).norm(dim=1).min()
    columns = (p - p.mean(0, keepdim=True)).norm(dim=0).min()
    return min(rows.item(), columns.item(), 1.0)


NAMED = [
    pytest.param(*p.values, law, id=f"{p.id}-{law}", marks=p.marks)
    for p in params(LOSSES, ("native", "triton", "reference"))
    for law in p.values[0].spec.laws
    if alone_if_interpreted(*p.values)
]


@pytest.mark.parametrize("spec", LOSSES, ids=lambda spec: spec.name)
def test_named_laws_exist(spec) -> None:
    unknown = set(spec.laws) - set(LAWS)
    assert not unknown, f"test_laws.py has no law {sorted(unknown)}"
    assert spec.laws


def _for_examples(case: Case, check: Callable[[st.DataObject], None]) -> None:
    limit = settings(max_examples=8 if case.emulated else case.pick(EXAMPLES, 4))
    limit(given(st.data())(check))()


@pytest.mark.parametrize(("case", "law"), NAMED)
def test_law(case: Case, law: str) -> None:
    def check(draw: st.DataObject) -> None:
        LAWS[law](case, _draw(case, draw), _options(case, draw))

    _for_examples(case, check)


@each(keep=alone_if_interpreted)
def test_class_permutation(case: Case) -> None:
    """Classes have no order: the value stays, the gradient moves along."""

    def check(draw: st.DataObject) -> None:
        (student, teacher, target), options = _draw(case, draw), _options(case, draw)
        order = torch.randperm(student.shape[1], generator=torch.Generator().manual_seed(1))
        order = order.to(student.device)
        expected = value_and_grad(case, student, teacher, target, **options)
        moved = value_and_grad(
            case, student[:, order], teacher[:, order], order.argsort()[target], **options
        )
        torch.testing.assert_close(moved[0], expected[0], **CLOSE)
        torch.testing.assert_close(moved[1], expected[1][:, order], **CLOSE)

    _for_examples(case, check)


@each(keep=alone_if_interpreted)
def test_row_permutation_and_duplication(case: Case) -> None:
    """Rows have no order; a batch given twice has the same mean and half the gradient a row."""

    def check(draw: st.DataObject) -> None:
        (student, teacher, target), options = _draw(case, draw), _options(case, draw)
        expected = value_and_grad(case, student, teacher, target, **options)
        order = torch.arange(len(target)).flip(0)
        moved = value_and_grad(case, student[order], teacher[order], target[order], **options)
        torch.testing.assert_close(moved[0], expected[0], **CLOSE)
        torch.testing.assert_close(moved[1], expected[1][order], **CLOSE)
        options.pop("eps", None)  # compares with norms, which grow with the batch
        zero = {"eps": 0.0} if "eps" in option_names(case.spec) else {}
        once = value_and_grad(case, student, teacher, target, **options, **zero)
        twice = value_and_grad(
            case,
            torch.cat([student, student]),
            torch.cat([teacher, teacher]),
            torch.cat([target, target]),
            **options,
            **zero,
        )
        torch.testing.assert_close(twice[0], once[0], **CLOSE)
        torch.testing.assert_close(twice[1][: len(target)], once[1] / 2, **CLOSE)

    _for_examples(case, check)


@each(ROW_LOSSES, keep=alone_if_interpreted)
def test_batches_add_up(case: Case) -> None:
    """The sum over a batch is the sum over its parts, masks included."""

    def check(draw: st.DataObject) -> None:
        (student, teacher, target), options = _draw(case, draw), _options(case, draw)
        cut = draw.draw(st.integers(0, len(target)), "cut")
        options["reduction"] = "sum"
        if case.spec.takes_target:
            target[draw.draw(st.integers(0, len(target) - 1), "ignored")] = -100

        def run(rows: slice) -> tuple[Tensor, Tensor]:
            given_target = {"target": target[rows]} if case.spec.takes_target else {}
            return value_and_grad(case, student[rows], teacher[rows], **given_target, **options)

        whole, first, second = run(slice(None)), run(slice(0, cut)), run(slice(cut, None))
        torch.testing.assert_close(first[0] + second[0], whole[0], **CLOSE)
        torch.testing.assert_close(torch.cat([first[1], second[1]]), whole[1], **CLOSE)

    _for_examples(case, check)


@each(SOFTMAX, keep=alone_if_interpreted)
def test_gradient_rows_sum_to_zero(case: Case) -> None:
    def check(draw: st.DataObject) -> None:
        inputs, options = _draw(case, draw), _options(case, draw)
        _, gradient = value_and_grad(case, *inputs, **options)
        size = gradient.abs().sum(-1)
        assert (gradient.sum(-1).abs() <= 1e-10 * size + 1e-12).all()

    _for_examples(case, check)


@each([s for s in ROW_LOSSES if "standardize" in inspect.signature(s.function).parameters])
def test_standardized_logits_have_no_scale(case: Case) -> None:
    """Logit standardisation: a row times a positive number is the same (to 1e-7 / std)."""

    def check(draw: st.DataObject) -> None:
        student, teacher, target = _draw(case, draw)
        options = {**_options(case, draw), "standardize": True}
        student, teacher = student + torch.randn_like(student), teacher + torch.randn_like(teacher)
        expected = case(student, teacher, target, **options)
        scaled = case(3 * student, teacher / 2, target, **options)
        torch.testing.assert_close(scaled, expected, rtol=1e-4, atol=1e-6)

    _for_examples(case, check)


def test_a_gpu_is_present() -> None:
    """The one skip that says that all of the above ran on the CPU only."""
    if DEVICES == ("cpu",):
        pytest.skip("no CUDA device: every test runs on the CPU only")

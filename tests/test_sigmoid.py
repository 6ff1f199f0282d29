"""The losses of sigmoids against formulas of their own in float64, and against softmaxes of two."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import SOFTMAX, Case, each_emulated as each, value_and_grad
from inputs import make
from torch import Tensor

from kdkernels import SigmoidDISTLoss, SigmoidKDLoss, functional
from kdkernels.registry import SPECS

KD, DIST = SPECS["sigmoid_kd"], SPECS["sigmoid_dist"]
SHAPES = {
    "rows": (9, 37),
    "one_class": (8, 1),
    "many": (5, 300),
    "tokens": (2, 3, 19),
    "image": (2, 21, 3, 5),
}
BOTH = {"f64": torch.float64, "f32": torch.float32}


def _inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    student, teacher = (2 * torch.randn(shape, generator=generator).double() for _ in range(2))
    return student.to(dtype), teacher.to(dtype)


def _rows(x: Tensor) -> Tensor:
    return (x.movedim(1, -1) if x.dim() == 4 else x).flatten(0, -2)


def _kd(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """A value a row, from PyTorch's cross-entropy less the teacher's entropy."""
    s, t = (_rows(x) / temperature for x in (student, teacher))
    p = t.sigmoid()
    cross = torch.nn.functional.binary_cross_entropy_with_logits(s, p, reduction="none")
    entropy = -torch.xlogy(p, p) - torch.xlogy((-t).sigmoid(), (-t).sigmoid())
    return temperature**2 * (cross - entropy).sum(-1)


def _dist(student: Tensor, teacher: Tensor, beta: float, gamma: float, tau: float) -> Tensor:
    q, p = (_rows(x).div(tau).sigmoid() for x in (student, teacher))
    loss = torch.zeros((), dtype=q.dtype)
    for weight, a, b in ((beta, q, p), (gamma, q.T, p.T)):
        a, b = (x - x.mean(1, keepdim=True) for x in (a, b))
        norms = [((x * x).sum(1) + 1e-40).sqrt() for x in (a, b)]  # a root has no slope at 0
        rho = (a * b).sum(1) / (norms[0] * norms[1] + 1e-8)
        loss = loss + weight * tau**2 * (1 - rho).mean()
    return loss


def _compare(actual: tuple[Tensor, Tensor], expected: Tensor, leaf: Tensor) -> None:
    """With a formula's value and gradient, as far as the dtype goes."""
    (gradient,) = torch.autograd.grad(expected, leaf)
    close = {"rtol": 1e-10, "atol": 1e-13}
    if actual[1].dtype == torch.float32:
        close = {"rtol": 2e-5, "atol": 1e-5 * float(gradient.abs().max())}
    torch.testing.assert_close(actual[0].double(), expected.detach(), **close)
    torch.testing.assert_close(actual[1].double(), gradient, **close)


@each([KD], shape=SHAPES, dtype=BOTH)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_kd(case: Case, shape: tuple[int, ...], dtype: torch.dtype, temperature: float) -> None:
    student, teacher = _inputs(shape, dtype)
    actual = value_and_grad(case, student, teacher, temperature=temperature)
    leaf = student.double().requires_grad_()
    _compare(actual, _kd(leaf, teacher.double(), temperature).mean(), leaf)


@each([DIST], shape={**SHAPES, "planes": (2, 35, 9, 17)}, dtype=BOTH)
@pytest.mark.parametrize("weights", [(1.0, 2.0, 1.0), (1.0, 0.0, 2.5), (0.0, 1.0, 0.5)], ids=str)
def test_dist(
    case: Case,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    weights: tuple[float, float, float],
) -> None:
    """Planes of a hundred and more rows, whose classes are far apart, are read in tiles."""
    student, teacher = _inputs(shape, dtype)
    options = dict(zip(("beta", "gamma", "tau"), weights, strict=True))
    actual = value_and_grad(case, student, teacher, **options)
    leaf = student.double().requires_grad_()
    _compare(actual, _dist(leaf, teacher.double(), *weights), leaf)


@each([KD])
def test_kd_is_that_of_a_softmax_of_two(case: Case) -> None:
    student, teacher = _inputs((50, 1))
    zero = torch.zeros_like(student)
    actual = value_and_grad(case, student, teacher)
    pair = torch.cat([student, zero], 1)
    loss, gradient = value_and_grad(
        functional.kd_loss, pair, torch.cat([teacher, zero], 1), backend="reference"
    )
    torch.testing.assert_close(actual[0], loss, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(actual[1], gradient[:, :1], rtol=1e-10, atol=1e-14)


@each([DIST])
def test_columns_of_dist_are_those_of_a_softmax_of_two(case: Case) -> None:
    """Of [x, 0] both columns correlate as the sigmoids do; eps stays out of it."""
    student, teacher = _inputs((50, 1))
    zero, options = torch.zeros_like(student), {"beta": 0.0, "eps": 0.0, "tau": 2.0}
    actual = value_and_grad(case, student, teacher, **options)
    loss, gradient = value_and_grad(
        functional.dist_loss, torch.cat([student, zero], 1), torch.cat([teacher, zero], 1),
        **options, backend="reference",
    )  # fmt: skip
    torch.testing.assert_close(actual[0], loss, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(actual[1], gradient[:, :1], rtol=1e-10, atol=1e-14)


@each([KD], dtype=BOTH)
def test_kd_keeps_its_digits(case: Case, dtype: torch.dtype) -> None:
    """Near equality, where the textbook form cancels, at any logit."""
    base = torch.linspace(-60, 60, 121, dtype=torch.float64)
    eps = torch.finfo(dtype).eps
    for gap in (1e-5, 1e-3, 0.1, 0.249, 0.251, 1.0, 5.0):
        for sign in (1, -1):
            student = base.to(dtype)
            teacher = (base + sign * gap).to(dtype)
            s, t = student.double(), teacher.double()
            loss, gradient = value_and_grad(
                case, student[:, None], teacher[:, None], temperature=1.0, reduction="none",
                upstream=torch.ones(121, dtype=dtype),
            )  # fmt: skip
            rare = torch.where(s > 0, (-t).sigmoid() - (-s).sigmoid(), s.sigmoid() - t.sigmoid())
            slope = (gradient[:, 0].double() / rare)[abs(base) < 10]
            # Of a tail KL is that of two rates: p log(p / q) - p + q, from above and from below.
            g, u = t - s, torch.where(s > 0, -s, s)
            g = torch.where(s > 0, -g, g)
            powers = [g**n * ((n - 1) / math.factorial(n)) for n in range(2, 25)]
            closed = g.exp() * g - g.exp() + 1
            tail = u.exp() * torch.where(g.abs() < 1.5, sum(powers), closed)
            far = abs(base) > 40
            ratio = (loss.double() / tail)[far]
            torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=0, atol=200 * eps)
            wanted = 1e-4 if dtype == torch.float32 else 1e-9
            torch.testing.assert_close(slope, torch.ones_like(slope), rtol=0, atol=wanted)
            assert (loss > 0).all()


@each([KD], dtype=BOTH)
def test_kd_of_large_and_infinite_logits(case: Case, dtype: torch.dtype) -> None:
    inf = math.inf
    rows = [  # student, teacher, loss, slope
        (1e4, -1e4, 1e4, 1.0),
        (-1e4, 1e4, 1e4, -1.0),
        (1e4, 1e4, 0.0, 0.0),
        (1e10, 0.0, 5e9 - math.log(2), 0.5),
        (-5.0, 1e10, 5 + math.log1p(math.exp(-5)), 1 / (1 + math.exp(5)) - 1),
        (-200.0, -190.0, 0.0, 0.0),
        (0.0, inf, math.log(2), -0.5),
        (0.0, -inf, math.log(2), 0.5),
        (inf, inf, 0.0, 0.0),
        (-inf, -inf, 0.0, 0.0),
        (inf, 0.0, inf, 0.5),
        (-inf, 0.0, inf, -0.5),
        (-inf, inf, inf, -1.0),
    ]
    student, teacher, loss, slope = torch.tensor(rows, dtype=dtype).T.contiguous()
    actual = value_and_grad(
        case, student[:, None], teacher[:, None], temperature=1.0, reduction="none",
        upstream=torch.ones_like(loss),
    )  # fmt: skip
    torch.testing.assert_close(actual[0], loss, rtol=1e-6, atol=1e-30)
    torch.testing.assert_close(actual[1][:, 0], slope, rtol=1e-6, atol=1e-30)


@each([KD])
def test_kd_of_nan_is_nan(case: Case) -> None:
    for position in range(2):
        pair = [torch.tensor([[200.0, 1.0, -200.0]]), torch.tensor([[-200.0, 1.0, -200.0]])]
        for at in range(3):
            given = [x.clone() for x in pair]
            given[position][0, at] = math.nan
            loss, gradient = value_and_grad(case, *given, temperature=1.0)
            assert loss.isnan() and gradient.isnan().tolist() == [[k == at for k in range(3)]]


@each([KD, DIST])
def test_rows_that_are_ignored(case: Case) -> None:
    if not case.masks:
        return
    student, teacher = _inputs((12, 7))
    student[3], teacher[5] = math.nan, math.inf
    mask = torch.ones(12, dtype=torch.bool)
    mask[[3, 5]] = False
    loss, gradient = value_and_grad(case, student, teacher, target=mask)
    wanted = value_and_grad(case, student[mask], teacher[mask])
    torch.testing.assert_close(loss, wanted[0], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gradient[mask], wanted[1], rtol=1e-10, atol=1e-13)
    assert not gradient[~mask].any()


def test_each_anchor_may_be_a_row() -> None:
    """RetinaNet's (N, A C, H, W)."""
    student, teacher = _inputs((2, 6, 3, 4))
    apart = [x.unflatten(1, (2, 3)) for x in (student, teacher)]
    flat = [x.movedim(2, -1).flatten(0, -2) for x in apart]
    for function in (functional.sigmoid_kd_loss, functional.sigmoid_dist_loss):
        found = function(*apart, class_dim=2)
        torch.testing.assert_close(found, function(*flat), rtol=1e-12, atol=0)


def test_modules() -> None:
    student, teacher = _inputs((6, 5))
    for module, function, options in (
        (SigmoidKDLoss, functional.sigmoid_kd_loss, {"temperature": 2.0}),
        (SigmoidDISTLoss, functional.sigmoid_dist_loss, {"beta": 2.0, "gamma": 0.5}),
    ):
        expected = function(student, teacher, **options)
        assert torch.equal(module(**options)(student, teacher), expected)


@pytest.mark.parametrize("keyword", ["hard_weight", "return_parts", "standardize", "tp_group"])
def test_what_belongs_to_a_softmax_is_refused(keyword: str) -> None:
    student, teacher = _inputs((6, 5))
    for form in (functional.sigmoid_kd_loss, SigmoidKDLoss()):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{keyword}'"):
            form(student, teacher, **{keyword: 1.0})


def test_softmaxes_of_one_class_name_these_losses() -> None:
    student, teacher, target = make("gaussian", 4, 1)
    for spec in SOFTMAX:
        options: dict[str, Any] = {"target": target} if spec.needs_target else {}
        with pytest.raises(ValueError, match=r"^student_logits must be .*sigmoid_kd_loss"):
            spec.function(student, teacher, **options)


def test_a_learned_temperature_is_refused() -> None:
    student, teacher = _inputs((6, 5))
    heat = torch.tensor(2.0, requires_grad=True)
    with pytest.raises(ValueError, match=r"^temperature must be a constant \(sigmoid_kd has no"):
        functional.sigmoid_kd_loss(student, teacher, temperature=heat)

"""Several teachers: their softened probabilities are averaged, in every loss of two logits."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from cases import LOSSES
from test_class_dim import LOSSES as OF_CLASSIFIERS
from torch import Tensor

from kdkernels import _ensemble, kd_loss
from kdkernels.registry import LossSpec
from kdkernels.teacher import EnsembleTeacher

losses = pytest.mark.parametrize("spec", LOSSES, ids=lambda spec: spec.name)
WEIGHTS = (3.0, 1.0, 0.5)


def _logits(*shape: int) -> tuple[Tensor, list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(5)
    student, *teachers = 2 * torch.randn(4, *shape, generator=generator, dtype=torch.float64)
    rows = (shape[0], *shape[2:]) if len(shape) == 4 else shape[:-1]
    target = torch.randint(shape[-1 if len(shape) < 4 else 1], rows, generator=generator)
    target.flatten()[1] = -100
    return student, list(teachers), target


def _mean(
    spec: LossSpec, teachers: list[Tensor], weights: Any, temperature: float, dim: int
) -> Tensor:
    """The logits that one teacher would need, by hand."""
    if spec.activation == "sigmoid":
        odds = [
            sum(
                w * (sign * x / temperature).sigmoid()
                for w, x in zip(weights, teachers, strict=True)
            )
            for sign in (1, -1)
        ]
        return temperature * (odds[0] / odds[1]).log()
    p = sum(w * (x / temperature).softmax(dim) for w, x in zip(weights, teachers, strict=True))
    assert isinstance(p, Tensor)
    return temperature * p.div(p.sum(dim, keepdim=True)).log()


def _heat(spec: LossSpec) -> str:
    return "tau" if spec.family == "correlation" else "temperature"


def _value(spec: LossSpec, student: Tensor, teacher: Any, **options: Any) -> list[Tensor]:
    leaf = student.detach().clone().requires_grad_()
    loss = spec.function(leaf, teacher, **options)
    return [loss.detach(), *torch.autograd.grad(loss.sum(), leaf)]


def _options(spec: LossSpec, target: Tensor) -> dict[str, Any]:
    return {spec.target_name: target} if spec.takes_target else {}


@losses
@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 7), (2, 7, 2, 3)], ids=str)
@pytest.mark.parametrize("backend", [None, "reference"])
def test_equals_the_mean_of_probabilities(
    spec: LossSpec, shape: tuple[int, ...], backend: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_ensemble, "BLOCK", 8)  # several blocks
    student, teachers, target = _logits(*shape)
    dim = 1 if len(shape) != 3 else 2
    before = [x.clone() for x in teachers]
    options = {**_options(spec, target), _heat(spec): 2.5, "backend": backend}
    by_row = torch.linspace(0.1, 2, 3 * target.numel()).double().reshape(3, *target.shape)
    given = [
        (teachers, (1.0, 1.0, 1.0)),
        (tuple(teachers[:1]), (1.0,)),
        (EnsembleTeacher(teachers, WEIGHTS), WEIGHTS),
        (EnsembleTeacher(teachers, torch.tensor(WEIGHTS)), WEIGHTS),
        (EnsembleTeacher(teachers, by_row), by_row.unsqueeze(dim + 1)),
    ]
    for ensemble, weights in given:
        members = ensemble.logits if isinstance(ensemble, EnsembleTeacher) else ensemble
        found = _value(spec, student, ensemble, **options)
        wanted = _value(spec, student, _mean(spec, list(members), weights, 2.5, dim), **options)
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)
    # It is not the mean of the logits.
    pair = [_value(spec, student, x, **options) for x in (torch.stack(teachers).mean(0), teachers)]
    assert max((a - b).abs().max() for a, b in zip(*pair, strict=True)) > 1e-4
    assert all(torch.equal(a, b) for a, b in zip(teachers, before, strict=True))


@losses
def test_modules_half_precision_and_certain_teachers(spec: LossSpec) -> None:
    """Probabilities that underflow, classes that some teachers exclude, dtypes of their own."""
    student, teachers, target = _logits(4, 7)
    teachers[0][:, 2] = 900.0
    teachers[1][:, 2] = -torch.inf
    wanted = _mean(spec, teachers, (1, 1, 1), 1.0, 1)
    options = {**_options(spec, target), _heat(spec): 1.0}
    expected = _value(spec, student, wanted, **options)
    module = spec.module(**{_heat(spec): 1.0})
    del options[_heat(spec)]
    found = module(student, teachers, **options)
    torch.testing.assert_close(found, expected[0], rtol=1e-9, atol=1e-11)
    mixed = [teachers[0].float(), teachers[1].bfloat16(), teachers[2].half()]
    wide = [x.float() for x in mixed]
    halves = [_value(spec, student.bfloat16(), x, **options) for x in (mixed, wide)]
    assert all(torch.equal(a, b) for a, b in zip(*halves, strict=True))
    assert halves[0][0].dtype == torch.float32 and halves[0][0].isfinite()


@losses
def test_compiles_and_reads_no_teacher_of_weight_zero(spec: LossSpec) -> None:
    student, teachers, target = _logits(4, 7)
    options = _options(spec, target)
    nan = torch.full_like(teachers[0], torch.nan)
    found = _value(spec, student, EnsembleTeacher([*teachers, nan], (1, 1, 1, 0)), **options)
    expected = _value(spec, student, teachers, **options)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    torch._dynamo.reset()
    compiled = torch.compile(spec.function, fullgraph=True, backend="aot_eager")
    leaf = student.clone().requires_grad_()
    loss = compiled(leaf, teachers, **options)
    torch.testing.assert_close(loss.detach(), expected[0], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(torch.autograd.grad(loss, leaf)[0], expected[1])
    torch._dynamo.reset()


@pytest.mark.parametrize("spec", OF_CLASSIFIERS, ids=lambda spec: spec.name)
def test_with_class_dim(spec: LossSpec) -> None:
    student, teachers, target = _logits(2, 7, 2, 3)
    target = target[:, 0]
    student, *teachers = (x[:, :, 0] for x in (student, *teachers))
    options = {**_options(spec, target), "class_dim": -2}
    by_row = 1.0 + torch.arange(18.0).double().reshape(3, 2, 3)
    ensemble = EnsembleTeacher(teachers, by_row)
    found = _value(spec, student, ensemble, **options)
    default = inspect.signature(spec.function).parameters[_heat(spec)].default
    wanted = _mean(spec, teachers, by_row.unsqueeze(2), default, 1)
    torch.testing.assert_close(found, _value(spec, student, wanted, **options))


@losses
def test_temperatures_of_rows(spec: LossSpec) -> None:
    if not spec.by_row:
        return  # its temperature is a number, which other tests vary
    student, teachers, target = _logits(5, 7)
    heats = torch.linspace(0.5, 4, 5).double()
    options = {**_options(spec, target), "reduction": "none"}
    found = spec.function(student, teachers, temperature=heats, **options)
    rows = [
        spec.function(
            student[i : i + 1],
            [x[i : i + 1] for x in teachers],
            temperature=float(heats[i]),
            **{**options, **_options(spec, target[i : i + 1])},
        )
        for i in range(5)
    ]
    torch.testing.assert_close(found, torch.cat(rows), rtol=1e-9, atol=1e-11)


@losses
def test_errors(spec: LossSpec) -> None:
    student, teachers, target = _logits(4, 7)
    options = _options(spec, target)

    def refused(error: type[Exception], match: str, teacher: Any, **more: Any) -> None:
        with pytest.raises(error, match=match):
            spec.function(student, teacher, **options, **more)

    refused(TypeError, "teacher_logits must be Tensors, at least one", [])
    refused(TypeError, "teacher_logits must be a Tensor, got list", [teachers[0].tolist()])
    refused(ValueError, r"teacher_logits must be of the student's shape \(4, 7\)", [student[1:]])
    refused(ValueError, "teacher_logits must be a constant", [student.clone().requires_grad_()])
    by_row = EnsembleTeacher(teachers, torch.ones(3, 5))
    refused(ValueError, r"weights must be of shape \(3,\) or \(3, 4\), got \(3, 5\)", by_row)
    if "standardize" in inspect.signature(spec.function).parameters:
        refused(ValueError, "standardize must be False where", teachers, standardize=True)
    if spec.by_row:
        heat = torch.tensor(2.0, requires_grad=True)
        refused(ValueError, "temperature must be a constant where", teachers, temperature=heat)


@pytest.mark.parametrize(
    ("weights", "match"),
    [
        ((1.0, 1.0), "weights must be 3 numbers"),
        ((1.0, -1.0, 1.0), "weights must be >= 0"),
        ((0.0, 0.0, 0), "weights must be more than 0 in sum"),
        (torch.ones(2), r"weights must be one for each of the 3 teachers"),
        (torch.ones(3).long(), "weights must be float64"),
        (torch.ones(3, requires_grad=True), "weights must be a constant"),
        ("abc", "weights must be 3 numbers"),
    ],
)
def test_errors_of_weights(weights: Any, match: str) -> None:
    with pytest.raises((TypeError, ValueError), match=match):
        EnsembleTeacher([torch.zeros(2, 3)] * 3, weights)


def test_weights_whose_ratio_underflows() -> None:
    student, first, second = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(1))
    both = EnsembleTeacher([first, second], (1e-320, 1e12))
    torch.testing.assert_close(kd_loss(student, both), kd_loss(student, second))


def test_float64_students_keep_their_digits() -> None:
    generator = torch.Generator().manual_seed(2)
    student = torch.randn(4, 7, generator=generator, dtype=torch.float64)
    teacher = torch.randn(4, 7, generator=generator)
    one, several = (kd_loss(student, x, 2.0) for x in (teacher, [teacher, teacher]))
    torch.testing.assert_close(several, one, rtol=1e-13, atol=0.0)


def test_blocks_hold_few_rows() -> None:
    """What is alive at once beside the result is some blocks, whatever the number of rows."""
    from test_class_dim import SHAPES

    for shape, dim in SHAPES.values():
        size = torch.Size(shape)
        over, blocks = _ensemble._blocks(size, dim % len(shape))
        parts = list(blocks)
        length = size[over]
        assert sum(count for _, count in parts) == length
        assert over != dim % len(shape) or len(shape) == 1
    _, blocks = _ensemble._blocks(torch.Size((1, 4096, 50_000)), 2)
    assert max(count for _, count in blocks) * 50_000 <= _ensemble.BLOCK

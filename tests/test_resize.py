"""``resize="bilinear"``: a student of another height and width, as if it were resized by hand."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels.functional import attention_transfer_loss, kd_loss
from kdkernels.registry import SPECS
from kdkernels.teacher import EnsembleTeacher

ON = {"resize": "bilinear"}
SIZES = ((3, 4), (8, 5), (6, 7), (1, 1), (12, 14))
"""Of the student; the teacher's is (6, 7)."""


def _draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _kd(s: Tensor, t: Tensor, labels: Tensor, temperature: float) -> Tensor:
    p, q = ((x / temperature).softmax(1) for x in (t, s))
    values = (p * (p / q).log()).sum(1)
    return temperature**2 * values[labels != -100].mean()


def _attention(s: Tensor, t: Tensor) -> Tensor:
    maps = [F.normalize(x.square().mean(1).flatten(1), dim=1) for x in (s, t)]
    return (maps[0] - maps[1]).square().mean()


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("backend", [None, "reference"])
def test_equals_resizing_by_hand(size: tuple[int, int], backend: str | None) -> None:
    """Value and gradients of both losses; KD's labels and teacher's gradient have its size."""
    student = _draw(2, 5, *size).requires_grad_()
    teacher = _draw(2, 5, 6, 7, seed=1).requires_grad_()
    labels = torch.randint(5, (2, 6, 7), generator=torch.Generator().manual_seed(2))
    labels[0, :, 2:4] = -100
    by_hand = F.interpolate(student, size=(6, 7), mode="bilinear")
    leaves = student, teacher
    for loss, expected, wanted in (
        (
            kd_loss(student, teacher, 2.0, labels=labels, teacher_grad=True, backend=backend, **ON),
            _kd(by_hand, teacher, labels, 2.0),
            leaves,
        ),
        (
            attention_transfer_loss(student, teacher.detach(), backend=backend, **ON),
            _attention(by_hand, teacher),
            leaves[:1],
        ),
    ):
        torch.testing.assert_close(loss, expected)
        given = torch.autograd.grad(loss, wanted)
        slopes = torch.autograd.grad(expected, wanted, retain_graph=True)
        for actual, slope in zip(given, slopes, strict=True):
            torch.testing.assert_close(actual, slope)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_half_precision_and_autocast_resize_in_float32(dtype: torch.dtype) -> None:
    student, teacher = _draw(2, 5, 3, 4, dtype=dtype).requires_grad_(), _draw(2, 5, 6, 7, seed=1)
    teacher = teacher.to(dtype)
    for function in (kd_loss, attention_transfer_loss):
        wide = F.interpolate(student.float(), size=(6, 7), mode="bilinear")
        expected = function(wide, teacher.float())
        (slope,) = torch.autograd.grad(expected, student)
        for region in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=region):
                loss = function(student, teacher, **ON)
            assert loss.dtype == torch.float32
            torch.testing.assert_close(loss, expected)
            (gradient,) = torch.autograd.grad(loss, student)
            assert gradient.dtype == dtype
            torch.testing.assert_close(gradient, slope)


def test_what_needs_no_resizing_is_as_before() -> None:
    """Equal sizes, and logits that are no maps, keep their bits."""
    for shape in ((2, 5, 6, 7), (6, 5), (2, 6, 5)):
        student, teacher = _draw(*shape), _draw(*shape, seed=1)
        assert torch.equal(kd_loss(student, teacher, **ON), kd_loss(student, teacher))
    tokens = _draw(2, 6, 5), _draw(2, 6, 5, seed=1)
    assert torch.equal(attention_transfer_loss(*tokens, **ON), attention_transfer_loss(*tokens))


def test_several_teachers_and_rows_and_modules() -> None:
    student, teachers = _draw(2, 5, 3, 4), [_draw(2, 5, 6, 7, seed=k) for k in (1, 2)]
    by_hand = F.interpolate(student, size=(6, 7), mode="bilinear")
    for teacher in (teachers, EnsembleTeacher(teachers, [1.0, 3.0])):
        torch.testing.assert_close(kd_loss(student, teacher, **ON), kd_loss(by_hand, teacher))
    rows = kd_loss(student, teachers[0], reduction="none", class_dim=1, **ON)
    torch.testing.assert_close(rows, kd_loss(by_hand, teachers[0], reduction="none"))
    for name in ("kd", "attention"):
        module = SPECS[name].module(**ON)
        assert "resize='bilinear'" in repr(module)
        expected = SPECS[name].function(by_hand, teachers[0])
        torch.testing.assert_close(module(student, teachers[0]), expected)


def test_under_a_compiler_and_a_transform() -> None:
    student, teacher = _draw(2, 5, 3, 4, dtype=torch.float32), _draw(2, 5, 6, 7, seed=1).float()
    for function in (kd_loss, attention_transfer_loss):
        torch._dynamo.reset()
        call = lambda s, f=function: f(s, teacher, **ON)  # noqa: E731
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        leaf = student.clone().requires_grad_()
        (expected,) = torch.autograd.grad(call(leaf), leaf)
        torch.testing.assert_close(torch.autograd.grad(compiled(leaf), leaf)[0], expected)
        torch.testing.assert_close(torch.func.grad(call)(student), expected)


BAD: list[tuple[Any, dict[str, Any], str]] = [
    (((2, 5, 3, 4), (2, 5, 6, 7)), {}, r"teacher_logits must be of .* resize='bilinear'\), got"),
    (((2, 5, 3, 4), (2, 6, 6, 7)), ON, "teacher_logits must be of the student's shape"),
    (((2, 5, 3, 4), (3, 5, 6, 7)), ON, "teacher_logits must be of the student's shape"),
    (((2, 5, 0, 4), (2, 5, 6, 7)), ON, "student_logits must be of at least one position"),
    (((2, 5, 3, 4), (2, 5, 6, 0)), ON, "teacher_logits must be of at least one position"),
    (((2, 5, 3, 4), (2, 5, 6, 7)), ON | {"class_dim": 3}, "class_dim must be None or 1 where"),
    (((2, 5, 3, 4), (2, 5, 6, 7)), {"resize": "nearest"}, "resize must be None or 'bilinear', got"),
]


@pytest.mark.parametrize(("shapes", "options", "text"), BAD)
def test_errors_of_logits(shapes: Any, options: dict[str, Any], text: str) -> None:
    student, teacher = (_draw(*shape) for shape in shapes)
    with pytest.raises(ValueError, match=f"^{text}"):
        kd_loss(student, teacher, **options)


def test_errors_of_features() -> None:
    student, teacher = _draw(2, 5, 3, 4), _draw(2, 8, 6, 7)
    with pytest.raises(ValueError, match=r"^teacher_features must be .*: resize='bilinear'\), got"):
        attention_transfer_loss(student, teacher)
    with pytest.raises(ValueError, match=r"^resize must be None or 'bilinear', got 'area'"):
        attention_transfer_loss(student, teacher, resize="area")
    for bad in (_draw(3, 8, 6, 7), _draw(2, 6, 8)):
        with pytest.raises(ValueError, match=r"^teacher_features must be"):
            attention_transfer_loss(student, bad, **ON)
    with pytest.raises(ValueError, match=r"^teacher_features must be"):
        attention_transfer_loss(_draw(2, 6, 8), _draw(2, 7, 8), **ON)


def test_kd_and_attention_transfer_take_it() -> None:
    takers = {n for n, s in SPECS.items() if "resize" in inspect.signature(s.function).parameters}
    assert takers == {"kd", "attention"}

"""``class_dim``: logits of any shape are the rows that one reads off them by hand."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from kdkernels._shapes import ClassesAt
from kdkernels.registry import SPECS, LossSpec

LOSSES = [s for s in SPECS.values() if "class_dim" in inspect.signature(s.function).parameters]
SHAPES: dict[str, tuple[tuple[int, ...], int]] = {
    "(N, C, L)": ((3, 7, 5), 1),
    "(N, C, D, H, W)": ((2, 7, 2, 3, 2), 1),
    "(N, H, W, C)": ((2, 3, 2, 7), -1),
    "(B, S, D, V)": ((2, 3, 4, 7), 3),
    "(C, N)": ((7, 5), 0),
    "(C, H, W)": ((7, 3, 4), -3),
    "(N, L, C, M)": ((2, 3, 7, 2), 2),
    "(C,)": ((7,), 0),
    "no rows": ((0, 7, 5), 1),
}

losses = pytest.mark.parametrize("spec", LOSSES, ids=lambda spec: spec.name)


def _inputs(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    student, teacher = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    return student.requires_grad_(), teacher


def _rows(x: Tensor, dim: int) -> Tensor:
    """(rows, classes), by hand."""
    classes = x.shape[dim]
    return torch.stack([x.select(dim, c).flatten() for c in range(classes)], 1)


def test_losses_of_classifiers_take_it() -> None:
    softmax = {"kd", "dkd", "aekt", "dist"}
    assert {spec.name for spec in LOSSES} == {*softmax, "sigmoid_kd", "sigmoid_dist"}


@losses
@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_equals_the_rows(spec: LossSpec, shape: tuple[Any, int], backend: str | None) -> None:
    size, dim = shape
    student, teacher = _inputs(size)
    before = student.detach().clone(), teacher.clone()
    rows = teacher.select(dim, 0).shape
    options: dict[str, Any] = {"backend": backend}
    flat: dict[str, Any] = {"backend": backend}
    reductions = ["mean", "sum"]
    if spec.by_row:
        reductions.append("none")
        target = torch.arange(rows.numel()).reshape(rows) % 7
        target = torch.where(target == 3, -100, target)
        weight = 1.0 + torch.arange(rows.numel(), dtype=torch.float64).reshape(rows)
        options |= {spec.target_name: target, "token_weight": weight, "temperature": 1 + weight}
        flat |= {k: x.flatten() for k, x in options.items() if isinstance(x, Tensor)}
    for reduction in reductions:
        loss = spec.function(student, teacher, class_dim=dim, reduction=reduction, **options)
        wanted = spec.function(
            _rows(student, dim), _rows(teacher, dim), reduction=reduction, **flat
        )
        assert loss.shape == (rows if reduction == "none" else ())
        torch.testing.assert_close(loss.flatten(), wanted.flatten(), rtol=1e-12, atol=1e-12)
        upstream = torch.linspace(0.5, 2, loss.numel(), dtype=torch.float64)
        pairs = [
            torch.autograd.grad((x.flatten() * upstream).sum(), student) for x in (loss, wanted)
        ]
        torch.testing.assert_close(*(x[0] for x in pairs), rtol=1e-11, atol=1e-12)
    assert torch.equal(student.detach(), before[0]) and torch.equal(teacher, before[1])


@losses
def test_modules_parts_and_graphs(spec: LossSpec) -> None:
    student, teacher = _inputs((2, 7, 2, 3, 2))
    target = torch.ones(2, 2, 3, 2, dtype=torch.int64)
    module = spec.module(class_dim=1)
    inputs = (student, teacher, target)[: 3 if spec.needs_target else 2]
    loss = module(*inputs)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), loss)
    if spec.by_row and spec.activation == "softmax":
        parts = spec.function(*inputs, class_dim=1, reduction="none", return_parts=True)[1]
        assert all(x.shape == target.shape for x in parts)


@pytest.mark.parametrize("name", ["(N, C, L)", "(N, C, D, H, W)", "(N, H, W, C)", "(C, N)"])
def test_nothing_is_copied(name: str) -> None:
    size, dim = SHAPES[name]
    x = torch.randn(size)
    assert ClassesAt(dim, x, x).logits(x).data_ptr() == x.data_ptr()


@losses
def test_errors(spec: LossSpec) -> None:
    student, teacher = _inputs((2, 7, 5))
    target = torch.ones(2, 5, dtype=torch.int64)
    inputs = (student, teacher, target)[: 3 if spec.needs_target else 2]
    for wrong, error, text in (
        (3, ValueError, r"^class_dim must be a dimension of \(2, 7, 5\), got 3"),
        (1.5, TypeError, "^class_dim must be"),
    ):
        with pytest.raises(error, match=text):
            spec.function(*inputs, class_dim=wrong)
    with pytest.raises(ValueError, match=r"^teacher_logits must be of the student's shape"):
        spec.function(student, teacher[:1], *inputs[2:], class_dim=1)
    if spec.by_row:
        with pytest.raises(ValueError, match=r"^token_weight must be of shape \(2, 5\), got"):
            spec.function(*inputs, class_dim=1, token_weight=torch.ones(10))
        with pytest.raises(ValueError, match=r"^token_weight must be of shape \(2, 5\), got \(\)"):
            spec.function(*inputs, class_dim=1, token_weight=torch.ones(()))


def test_losses_of_tokens_have_their_classes_last() -> None:
    x = torch.randn(2, 3, 4)
    for spec in SPECS.values():
        if spec.target_name == "labels" and spec.family == "divergence":
            with pytest.raises(TypeError, match="unexpected keyword argument 'class_dim'"):
                spec.function(x, x, class_dim=1)

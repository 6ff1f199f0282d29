"""Losses through the output layer where it is rarely looked: shapes, rows that do not count,
weights of 0, half precision, recomputation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kdkernels.functional import kd_loss, linear_kd_loss, topk_kd_loss
from kdkernels.teacher import LinearTeacher, TopKTeacher, top_k

backends = pytest.mark.parametrize("backend", (None, "reference"))


def _normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _teachers(logits: Tensor) -> dict[str, Any]:
    return {"dense": logits, "topk": top_k(logits, 3)}


@backends
@pytest.mark.parametrize("kind", ("dense", "topk"))
@pytest.mark.parametrize("shape", ((2, 2, 3), (1, 2, 3, 2), (12,)))
def test_any_shape_of_rows(backend: str | None, kind: str, shape: tuple[int, ...]) -> None:
    """The classes come last, of four dimensions too; parts have the rows' shape."""
    hidden, weight, teacher = _normal(12, 4), _normal(5, 4, seed=1), _normal(12, 5, seed=2)
    labels = torch.arange(12) % 5
    labels[3] = -100
    weights = torch.linspace(0.5, 2, 12, dtype=torch.float64)
    for reduction in ("mean", "none"):
        options: dict[str, Any] = {"reduction": reduction, "hard_weight": 0.5, "return_parts": True}
        flat = {"labels": labels, "token_weight": weights}
        wanted, parts = linear_kd_loss(hidden, weight, _teachers(teacher)[kind], **flat, **options)
        loss, own = linear_kd_loss(
            hidden.reshape(*shape, 4), weight, _teachers(teacher.reshape(*shape, 5))[kind],
            **{k: x.reshape(shape) for k, x in flat.items()}, **options, backend=backend,
        )  # fmt: skip
        torch.testing.assert_close(loss, wanted.reshape(shape) if wanted.dim() else wanted)
        for a, b in zip(own, parts, strict=True):
            torch.testing.assert_close(a, b.reshape(shape) if b.dim() else b)


@backends
@pytest.mark.parametrize("kind", ("dense", "topk"))
def test_ignored_rows_may_hold_nan(backend: str | None, kind: str) -> None:
    """In the products with the weight neither, nor where the teacher says nothing."""
    hidden, weight = _normal(4, 3), _normal(5, 3, seed=1).requires_grad_()
    teacher = _teachers(_normal(4, 5, seed=2))[kind]
    labels = torch.tensor([0, -100, 2, 1])
    hidden[1] = torch.nan
    if kind == "topk":
        teacher.logprobs[3] = -torch.inf
        teacher = TopKTeacher(teacher.ids, teacher.logprobs)
        hidden[3] = torch.inf
    bias = _normal(5, seed=3).requires_grad_()
    leaf = hidden.requires_grad_()
    loss = linear_kd_loss(
        leaf, weight, teacher, labels, student_bias=bias, softcap=2.0, backend=backend
    )
    for made in torch.autograd.grad(loss, (leaf, weight, bias)):
        assert made.isfinite().all()


@backends
@pytest.mark.parametrize("tail", ("bucket", "renormalize", "teacher", "drop"))
def test_a_weight_of_an_ignored_row_may_be_nan(backend: str | None, tail: str) -> None:
    teacher = top_k(_normal(3, 5), 3)
    hidden, weight = _normal(3, 4, seed=1), _normal(5, 4, seed=2)
    options: dict[str, Any] = {"tail": tail, "backend": backend}
    labels = torch.tensor([1, -100, 2])
    given = [
        linear_kd_loss(hidden, weight, teacher, labels, token_weight=weights, **options)
        for weights in (torch.tensor([1.0, torch.nan, 1.0]), torch.ones(3))
    ]
    torch.testing.assert_close(given[0], given[1])


@backends
def test_an_infinite_cross_entropy_of_weight_0(backend: str | None) -> None:
    bias = torch.tensor([0.0, -torch.inf, 0.0, 0.0, 0.0], dtype=torch.float64)
    ids = torch.tensor([[0, 2], [3, 4], [2, 4]])
    teacher = TopKTeacher(ids, _normal(3, 2).log_softmax(-1) - 0.1)
    loss, parts = linear_kd_loss(
        _normal(3, 4), _normal(5, 4, seed=1), teacher, torch.tensor([1, 0, 2]), student_bias=bias,
        token_weight=torch.tensor([0.0, 1.0, 1.0]), hard_weight=1.0, return_parts=True,
        backend=backend,
    )  # fmt: skip
    assert loss.isfinite() and parts.hard.isfinite()


@pytest.mark.parametrize("kind", ("number", "tensor", "tokens"))
def test_small_weights_before_a_loss_scale(kind: str) -> None:
    """Float16's gradient is made when the scale is known, as on logits."""
    half = torch.float16
    teacher = _normal(64, 2000, seed=2).to(half)
    students = [_normal(64, 16).to(half), (_normal(2000, 16, seed=1) / 4).to(half)]
    options: dict[str, Any] = {
        "number": {"loss_weight": 1e-4},
        "tensor": {"loss_weight": torch.tensor(1e-4)},
        "tokens": {"token_weight": torch.full((64,), 1e-4)},
    }[kind]

    def slopes(dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [x.to(dtype).requires_grad_() for x in students]
        loss = linear_kd_loss(*leaves, teacher.to(dtype), **options) * 65536
        return torch.autograd.grad(loss, leaves)

    for made, wanted in zip(slopes(half), slopes(torch.float64), strict=True):
        assert (made.double() - wanted).norm() < 2e-3 * wanted.norm()


@pytest.mark.parametrize("dtype", (torch.float64, torch.float16))
@pytest.mark.parametrize("reduction", ("mean", "none"))
@pytest.mark.parametrize("kind", ("dense", "topk"))
def test_recomputed_by_a_checkpoint(dtype: torch.dtype, reduction: str, kind: str) -> None:
    hidden, weight = _normal(6, 4).to(dtype), _normal(5, 4, seed=1).to(dtype)
    teacher = _teachers(_normal(6, 5, seed=2).to(dtype))[kind]

    def loss(x: Tensor) -> Any:
        return linear_kd_loss(x, weight, teacher, reduction=reduction).sum()

    leaf = hidden.requires_grad_()
    (wanted,) = torch.autograd.grad(loss(leaf), leaf)
    for graph in (False, True):
        again = checkpoint(loss, leaf, use_reentrant=False)
        (made,) = torch.autograd.grad(again, leaf, create_graph=graph)
        torch.testing.assert_close(made, wanted)


def test_a_second_pass_has_the_same_bits_beside_parts() -> None:
    hidden, weight = _normal(12, 4).requires_grad_(), _normal(300, 4, seed=1).requires_grad_()
    teacher = top_k(_normal(12, 300, seed=2), 3)
    loss, _ = linear_kd_loss(hidden, weight, teacher, tail="renormalize", return_parts=True)
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(loss, (hidden, weight))
    assert all(map(torch.equal, first, second))


def test_exponents_of_alpha_beta_together() -> None:
    with pytest.raises(ValueError, match=r"^alpha \+ beta must be at least 0\.5, got 0\.0"):
        linear_kd_loss(
            _normal(3, 4), _normal(5, 4), _normal(3, 5), divergence="alpha_beta", alpha=0.0,
            beta=0.0,
        )  # fmt: skip


@backends
def test_no_tokens_of_a_teacher_with_a_head(backend: str | None) -> None:
    teacher = LinearTeacher(_normal(0, 3), _normal(5, 3))
    assert teacher.logits().shape == (0, 5)
    assert linear_kd_loss(_normal(0, 4), _normal(5, 4), teacher, backend=backend) == 0


@backends
def test_beside_all_classes_nothing_is_left(backend: str | None) -> None:
    """K = V is the dense loss without ``log_rest`` too, however the sum of the masses rounds."""
    for seed in range(20):
        student, teacher = (_normal(2, 50, seed=x, dtype=torch.float32) for x in (seed, seed + 99))
        known = top_k(teacher, 50)
        wanted = kd_loss(student, teacher, 1.0)
        loss = topk_kd_loss(student, known.ids, known.logprobs, backend=backend)
        torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-6)
        bare = TopKTeacher(known.ids, known.logprobs)
        loss = linear_kd_loss(student, torch.eye(50), bare, backend=backend)
        torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-6)

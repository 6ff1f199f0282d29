"""The upstream gradient: any value, any strides, any dtype, every reduction."""

from __future__ import annotations

from collections.abc import Callable

import torch
from cases import (
    ROW_LOSSES,
    Case,
    alone_if_interpreted,
    each_emulated as each,
    reductions,
    same_bits,
    value_and_grad,
)
from inputs import make
from oracle import verify
from torch import Tensor

UPSTREAM: dict[str, Callable[[Tensor], Tensor]] = {
    "one": torch.ones_like,
    "negative": lambda loss: torch.full_like(loss, -2.5),
    "tiny": lambda loss: torch.full_like(loss, 2.0**-20),
    "expanded": lambda loss: loss.new_full((), 0.75).expand(loss.shape),
}
BY_ROW: dict[str, Callable[[Tensor], Tensor]] = {
    "distinct": lambda loss: torch.linspace(-2, 3, loss.numel()).to(loss),
    "strided": lambda loss: torch.linspace(-2, 3, 2 * loss.numel()).to(loss)[::2],
    "reversed_storage": lambda loss: torch.linspace(-2, 3, loss.numel()).to(loss).flip(0),
    "some_zero": lambda loss: (torch.arange(loss.numel()) % 2).to(loss),
}


def _inputs(case: Case, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    return make("gaussian", *case.pick((7, 33), (4, 9)), dtype=dtype, device=case.device)


def _loss_shape(case: Case, target: Tensor, reduction: str) -> Tensor:
    return torch.empty(target.shape if reduction == "none" else (), device=case.device)


@each(upstream=UPSTREAM, shared=("upstream",))
def test_upstream_scales_the_gradient(case: Case, upstream: Callable[[Tensor], Tensor]) -> None:
    student, teacher, target = _inputs(case)
    for reduction in reductions(case.spec):
        given = upstream(_loss_shape(case, target, reduction))
        before = given.clone()
        verify(case, student, teacher, target, reduction=reduction, upstream=given)
        assert same_bits(given, before)


@each(ROW_LOSSES, upstream=BY_ROW, shared=("upstream",))
def test_upstream_by_row(case: Case, upstream: Callable[[Tensor], Tensor]) -> None:
    student, teacher, target = _inputs(case)
    given = upstream(_loss_shape(case, target, "none"))
    _, gradient = verify(case, student, teacher, target, reduction="none", upstream=given)
    stopped = given == 0
    assert same_bits(gradient[stopped].abs(), torch.zeros_like(gradient[stopped]))


@each(
    dtype={"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16},
    shared=("dtype",),
)
def test_zero_upstream_gives_exact_zero(case: Case, dtype: torch.dtype) -> None:
    student, teacher, target = _inputs(case, dtype)
    for reduction in reductions(case.spec):
        zero = torch.zeros_like(_loss_shape(case, target, reduction))
        _, gradient = value_and_grad(
            case, student, teacher, target, reduction=reduction, upstream=zero
        )
        assert not gradient.any() and gradient.dtype == dtype


@each(ROW_LOSSES)
def test_rows_of_tokens_take_a_strided_upstream(case: Case) -> None:
    """(B, S) upstream that is a transposed view, as a padded loss mask is."""
    student, teacher, target = make("gaussian", 6, 9, device=case.device)
    student, teacher = student.view(2, 3, 9), teacher.view(2, 3, 9)
    given = torch.linspace(-1, 2, 6, device=case.device).view(3, 2).t()
    assert not given.is_contiguous()
    verify(case, student, teacher, target.view(2, 3), reduction="none", upstream=given)


@each(keep=alone_if_interpreted)
def test_the_usual_ways_to_call_backward_agree(case: Case) -> None:
    """``sum().backward()`` sends stride 0; a product sends a number; two losses add up."""
    student, teacher, target = _inputs(case)
    for reduction in reductions(case.spec):

        def gradient(
            combine: Callable[[Tensor], Tensor], factor: float, reduction: str = reduction
        ) -> Tensor:
            s = student.clone().requires_grad_()
            combine(case(s, teacher, target, reduction=reduction)).backward()
            assert s.grad is not None
            return s.grad / factor

        expected = gradient(lambda loss: loss.sum(), 1.0)
        for combine, factor in (
            (lambda loss: (loss * 2.5).sum(), 2.5),
            (lambda loss: loss.double().sum() * -4, -4.0),
            (lambda loss: loss.sum() + 3 * loss.sum(), 4.0),
        ):
            torch.testing.assert_close(gradient(combine, factor), expected)


@each(keep=alone_if_interpreted)
def test_gradients_of_two_losses_accumulate(case: Case) -> None:
    student, teacher, target = _inputs(case)
    for reduction in reductions(case.spec):
        _, once = value_and_grad(
            case,
            student,
            teacher,
            target,
            reduction=reduction,
            upstream=torch.ones_like(_loss_shape(case, target, reduction)),
        )
        s = student.clone().requires_grad_()
        for _ in range(2):
            case(s, teacher, target, reduction=reduction).sum().backward()
        assert s.grad is not None
        torch.testing.assert_close(s.grad, 2 * once)

"""``torch.func`` transforms and forward-mode derivatives, of every loss: right, or an error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from every import every, every_spec, example, gradient
from torch import Tensor

from kdkernels.registry import LossSpec

TOLERANCE: dict[str, Any] = {"rtol": 1e-7, "atol": 1e-10}


def _allowed(spec: LossSpec, backend: str | None) -> bool:
    return backend in (None, "reference")


def _refused() -> Any:
    return pytest.raises(ValueError, match=r"backend must be able to run \w+, got .* torch\.func")


@every()
def test_forward_mode(spec: LossSpec, backend: str | None) -> None:
    """jvp and dual numbers equal the gradient along the tangent."""
    case = example(spec, torch.float64)
    function = case.function(backend=backend)
    tangent = torch.randn(case.student.shape, dtype=torch.float64)
    if not _allowed(spec, backend):
        with _refused():
            torch.func.jvp(function, (case.student,), (tangent,))
        with forward_ad.dual_level(), _refused():
            function(forward_ad.make_dual(case.student, tangent))
        return
    expected = (gradient(function, case.student) * tangent).sum()
    assert expected.abs() > 1e-9
    value, given = torch.func.jvp(function, (case.student,), (tangent,))
    torch.testing.assert_close(value, function(case.student), **TOLERANCE)
    torch.testing.assert_close(given, expected, **TOLERANCE)
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(function(forward_ad.make_dual(case.student, tangent)))
    assert dual.tangent is not None
    torch.testing.assert_close(dual.tangent, expected, **TOLERANCE)


@every()
def test_reverse_transforms(spec: LossSpec, backend: str | None) -> None:
    """grad, vjp and jacrev equal autograd; functional_call is how a model is differentiated."""
    case = example(spec, torch.float64)
    function = case.function(backend=backend)
    if not _allowed(spec, backend):
        with _refused():
            torch.func.grad(function)(case.student)
        return
    expected = gradient(function, case.student)
    torch.testing.assert_close(torch.func.grad(function)(case.student), expected, **TOLERANCE)
    _, pull = torch.func.vjp(function, case.student)
    torch.testing.assert_close(pull(torch.ones((), dtype=torch.float64))[0], expected, **TOLERANCE)
    torch.testing.assert_close(torch.func.jacrev(function)(case.student), expected, **TOLERANCE)
    model = torch.nn.Linear(1, 1, bias=False).double()

    def of_parameters(parameters: dict[str, Tensor]) -> Tensor:
        flat = torch.func.functional_call(model, parameters, (case.student.reshape(-1, 1),))
        return function(flat.view(case.student.shape))

    parameters = {k: v.detach() for k, v in model.named_parameters()}
    given = torch.func.grad(of_parameters)(parameters)["weight"]
    inner = gradient(function, parameters["weight"] * case.student)
    torch.testing.assert_close(given.sum(), (inner * case.student).sum(), **TOLERANCE)


@every_spec()
def test_vectorised(spec: LossSpec) -> None:
    """vmap over batches, and over the gradient of each: as a loop."""
    case = example(spec, torch.float64)
    batches = torch.stack([case.student, case.student.flip(0) / 2])
    values = torch.vmap(case.of)(batches)
    torch.testing.assert_close(values, torch.stack([case.of(x) for x in batches]), **TOLERANCE)
    given = torch.vmap(torch.func.grad(case.of))(batches)
    expected = torch.stack([gradient(case.of, x) for x in batches])
    torch.testing.assert_close(given, expected, **TOLERANCE)


@every()
def test_batched_upstream_gradients(spec: LossSpec, backend: str | None) -> None:
    """``is_grads_batched`` gives each gradient of the batch, also where rows have their own."""
    reductions = ("mean", "none") if spec.by_row else ("mean",)
    for reduction in reductions:
        for dtype in (torch.float32, torch.float16):
            case = example(spec, dtype)
            options: dict[str, Any] = {"reduction": reduction, "backend": backend}
            leaf = case.student.clone().requires_grad_()
            loss = case.of(leaf, **options)
            upstream = torch.randn(3, *loss.shape).to(loss.dtype)
            (given,) = torch.autograd.grad(
                loss, leaf, upstream, is_grads_batched=True, retain_graph=True
            )
            for one, expected in zip(upstream, given, strict=True):
                (single,) = torch.autograd.grad(loss, leaf, one, retain_graph=True)
                wide = 1e-5 if dtype == torch.float32 else 2e-3
                torch.testing.assert_close(single, expected, rtol=wide, atol=wide * 1e-2)


@every()
def test_double_backward_is_right_or_raises(spec: LossSpec, backend: str | None) -> None:
    """The derivative of a gradient's square: that of the reference, or an error; never silence."""
    case = example(spec, torch.float64)

    def of_gradient(name: str | None) -> Tensor:
        leaf = case.student.clone().requires_grad_()
        loss = case.of(leaf, backend=name)
        (first,) = torch.autograd.grad(loss, leaf, create_graph=True)
        (second,) = torch.autograd.grad(
            (first * torch.arange(first.numel()).view_as(first)).sum(), leaf
        )
        return second

    expected = of_gradient("reference")
    try:
        given = of_gradient(backend)
    except RuntimeError as error:
        assert "cannot be differentiated twice" in str(error) and backend != "reference"
    else:
        torch.testing.assert_close(given, expected, rtol=1e-6, atol=1e-9)

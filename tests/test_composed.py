"""The written gradients of kdkernels.composed: the reference's numbers, at every edge."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from kdkernels import functional as K, use_backend
from kdkernels.composed import attention as attention_module, pkd as pkd_module
from kdkernels.registry import SPECS

WRITTEN = {spec.name: spec for spec in SPECS.values() if spec.composed is not None}
LAYOUTS = ("plain", "channels_last", "transposed", "mixed", "expanded")
each = pytest.mark.parametrize("name", WRITTEN)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def both(
    name: str, student: Tensor, teacher: Tensor, **options: Any
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Value and gradient as written and by the reference, which are two pieces of code."""
    results = []
    for backend in (None, "reference"):
        leaf = student.detach().requires_grad_()
        loss = WRITTEN[name].function(leaf, teacher, backend=backend, **options)
        results.append((loss.detach(), *torch.autograd.grad(loss, leaf), loss.grad_fn))
    (*mine, mine_fn), (*true, true_fn) = results
    assert type(mine_fn) is not type(true_fn) or student.dtype != teacher.dtype
    return tuple(mine), tuple(true)


def assert_same(pair: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]], rtol: float) -> None:
    (loss, gradient), (true_loss, true_gradient) = pair
    assert loss.dtype == true_loss.dtype and gradient.dtype == true_gradient.dtype
    assert (loss - true_loss).abs() <= rtol * true_loss.abs()
    assert (gradient - true_gradient).double().norm() <= rtol * true_gradient.double().norm()


def laid(layout: str, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    last = torch.channels_last
    if layout == "channels_last":
        return student.to(memory_format=last), teacher.to(memory_format=last)
    if layout == "transposed":
        return student.transpose(2, 3).contiguous().transpose(2, 3), teacher
    if layout == "mixed":
        return student, teacher.double().to(memory_format=last)
    if layout == "expanded":
        return student, teacher[:1].expand_as(teacher)
    return student, teacher


@each
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("block", (1, 100, 1 << 18))
def test_layouts_and_blocks(
    name: str, layout: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One block, many, the last one not full: for the values and for every reduction."""
    for module in (attention_module, pkd_module):
        monkeypatch.setattr(module, "BLOCK", block)
    student, teacher = laid(layout, draw(3, 5, 4, 6), draw(3, 5, 4, 6, seed=1))
    for options in ({}, {"reduction": "sum", "loss_weight": 3.0}, *WRITTEN[name].samples):
        assert_same(both(name, student, teacher, **options), 1e-5)


@pytest.mark.parametrize("p", (1.0, 1.5, 2.0, 4.0))
def test_attention_powers_and_zeros(p: float) -> None:
    """Zeros have a sign of 0, a sample of zeros has the map 0 and moves nothing but itself."""
    student, teacher = draw(4, 5, 3, 3, dtype=torch.float64), draw(4, 7, 3, 3, seed=1).double()
    student[:, 2] = 0
    assert_same(both("attention", student, teacher, p=p), 1e-12)
    student[1] = 0
    (_, gradient), (_, true) = both("attention", student, teacher, p=p)
    assert gradient.isfinite().all() and torch.allclose(gradient, true)


@pytest.mark.parametrize("shape", ((0, 4, 3, 3), (2, 4, 1, 1), (1, 1, 5, 5)))
def test_attention_small_batches(shape: tuple[int, ...]) -> None:
    (loss, gradient), true = both("attention", draw(*shape), draw(*shape, seed=1))
    assert loss == true[0] or torch.allclose(loss, true[0], rtol=1e-5)
    assert gradient.shape == shape and torch.allclose(gradient, true[1], atol=1e-6)


def test_pkd_constant_channel() -> None:
    """It becomes zeros: the student's leaves the teacher's spread, and the reverse."""
    student, teacher = draw(3, 4, 5, 5), draw(3, 4, 5, 5, seed=1)
    student[:, 0], teacher[:, 1] = 2.0, -3.0
    student[:, 2] = teacher[:, 2] = 0.5
    pair = both("pkd", student, teacher)
    assert_same(pair, 1e-5)
    assert pair[0][1].isfinite().all()
    assert not pair[0][1][:, 2].any()


@pytest.mark.parametrize("size", (1e-25, 1e-8, 1e8, 1e25))
def test_pkd_squares_beyond_float32(size: float) -> None:
    """Channels whose squares float32 cannot hold; beside a channel that it can."""
    student, teacher = draw(3, 2, 5, 5), draw(3, 2, 5, 5, seed=1)
    student[:, 0] *= size
    (loss, gradient), (true_loss, true_gradient) = both("pkd", student, teacher)
    assert torch.allclose(loss, true_loss, rtol=1e-5)
    for channel in range(2):
        # Scaled by the largest, because the squares of the channel's gradient underflow too.
        scale = true_gradient[:, channel].abs().max().clamp(min=1e-45)
        difference = (gradient - true_gradient)[:, channel].abs().max()
        assert difference <= 1e-5 * scale


@pytest.mark.parametrize("value", (float("nan"), float("inf")))
def test_pkd_is_not_silent(value: float) -> None:
    student = draw(3, 2, 5, 5)
    student[0, 0, 0, 0] = value
    (loss, gradient), true = both("pkd", student, draw(3, 2, 5, 5, seed=1))
    assert loss.isnan() and torch.equal(gradient.isnan(), true[1].isnan())


@each
def test_accurate_near_zero(name: str) -> None:
    """Features that nearly agree, far from the origin: float64's loss and gradient."""
    teacher = draw(8, 6, 20, 20) + 100
    student = teacher + 1e-3 * draw(8, 6, 20, 20, seed=1)
    leaf = student.requires_grad_()
    loss = WRITTEN[name].function(leaf, teacher)
    (gradient,) = torch.autograd.grad(loss, leaf)
    wide = leaf.detach().double().requires_grad_()
    true = WRITTEN[name].reference(wide, teacher.double())
    (true_gradient,) = torch.autograd.grad(true, wide)
    assert (loss - true).abs() < (1e-4 if name == "pkd" else 1e-3) * true
    limit = 1e-3 if name == "pkd" else 1e-2
    assert (gradient - true_gradient).norm() < limit * true_gradient.norm()


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=str)
def test_pkd_resizes_the_student(dtype: torch.dtype) -> None:
    (loss, gradient), true = both("pkd", draw(2, 3, 4, 4, dtype=dtype), draw(2, 3, 8, 6, seed=1))
    assert torch.allclose(loss, true[0], rtol=1e-5)
    assert gradient.dtype == dtype and torch.allclose(gradient, true[1], rtol=1e-2, atol=1e-5)


@each
def test_float16_survives_a_loss_scale(name: str) -> None:
    """Gradients below float16's smallest number arrive when the loss is scaled."""
    student = draw(16, 8, 16, 16).half().requires_grad_()
    teacher = draw(16, 8, 16, 16, seed=1)
    loss = WRITTEN[name].function(student, teacher, loss_weight=1e-3)
    (gradient,) = torch.autograd.grad(loss * 65536.0, student)
    wide = student.detach().double().requires_grad_()
    true = 65.536 * WRITTEN[name].reference(wide, teacher.double())
    (expected,) = torch.autograd.grad(true, wide)
    assert (gradient.double() - expected).norm() < 1e-2 * expected.norm()


@each
def test_no_silent_double_backward(name: str) -> None:
    student, teacher = draw(2, 3, 4, 4).requires_grad_(), draw(2, 3, 4, 4, seed=1)
    loss = WRITTEN[name].function(student, teacher)
    (gradient,) = torch.autograd.grad(loss, student, create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        torch.autograd.grad(gradient.square().sum(), student)
    loss = WRITTEN[name].function(student, teacher, backend="reference")
    (gradient,) = torch.autograd.grad(loss, student, create_graph=True)
    assert torch.autograd.grad(gradient.square().sum(), student)[0].any()


@each
def test_reference_is_the_reference(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request by argument or for a block runs the specification, whatever is composed."""

    def wrong(*args: Any, **options: Any) -> Any:
        raise AssertionError("the written form ran")

    teacher = draw(2, 3, 4, 4, seed=1)
    spec = copy.copy(WRITTEN[name])
    monkeypatch.setattr(f"kdkernels.losses.{name}.{name.upper()}", spec)
    object.__setattr__(spec, "composed", wrong)
    student = draw(2, 3, 4, 4)
    spec.function(student, teacher, backend="reference")
    with use_backend("reference"):
        spec.function(student, teacher)
    with pytest.raises(AssertionError, match="written form"):
        spec.function(student, teacher)


@each
def test_functorch_and_fake_tensors_take_the_reference(name: str) -> None:
    function = WRITTEN[name].function
    student, teacher = draw(2, 3, 4, 4), draw(2, 3, 4, 4, seed=1)
    gradient = torch.func.grad(lambda s: function(s, teacher))(student)
    assert_same((both(name, student, teacher)[0], (function(student, teacher), gradient)), 1e-5)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = function(mode.from_tensor(student), mode.from_tensor(teacher))
    assert fake.shape == () and fake.dtype == torch.float32


def test_no_gradient_costs_none() -> None:
    for name, spec in WRITTEN.items():
        assert spec.composed is not None
        options = {"p": 2.0} if name == "attention" else {}
        inputs = draw(2, 3, 4, 4), draw(2, 3, 4, 4, seed=1)
        loss, gradient = spec.composed(*inputs, 1.0, 1, False, **options)
        assert gradient is None and torch.equal(loss, K.__dict__[spec.function.__name__](*inputs))

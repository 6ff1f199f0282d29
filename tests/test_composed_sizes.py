"""Features of any size, and of every shape that networks give them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from batches import EMBEDDING, Call, batch, calls, graded, leaves
from test_embedding_losses import FORMULAS
from torch import Tensor

from kdkernels import functional as K
from kdkernels.registry import SPECS

POWERS = (1.0, 1.5, 2.0, 3.0, 4.0, 8.0)
SIZES = (1e-5, 1.0, 1e5)
FORMS = pytest.mark.parametrize("form", ("written", "reference", "compiled"))


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def attention_in_long_double(student: Tensor, teacher: Tensor, p: float) -> tuple[Any, np.ndarray]:
    """The definition and its derivative, in NumPy's widest type (80 bits reach 1e4932)."""
    f = student.double().numpy().astype(np.longdouble)
    g = teacher.double().numpy().astype(np.longdouble)
    maps, norms = [], []
    for x in (f, g):
        energy = (np.abs(x) ** p).mean(1)
        norm = np.sqrt((energy**2).sum((1, 2), keepdims=True))
        norms.append(norm)
        maps.append(energy / np.maximum(norm, np.longdouble(1e-12)))
    gap = maps[0] - maps[1]
    slope = 2 * gap / gap.size
    along = (maps[0] * slope).sum((1, 2), keepdims=True)
    along = np.where(norms[0] >= 1e-12, along, 0)
    by_energy = (slope - maps[0] * along) / np.maximum(norms[0], np.longdouble(1e-12))
    gradient = by_energy[:, None] * p / f.shape[1] * np.abs(f) ** (p - 1) * np.sign(f)
    return (gap**2).mean(), gradient


def function_of(form: str, p: float) -> Callable[[Tensor, Tensor], Tensor]:
    def loss(s: Tensor, t: Tensor) -> Tensor:
        backend = "reference" if form == "reference" else None
        return K.attention_transfer_loss(s, t, p, backend=backend)

    return torch.compile(loss, fullgraph=True, backend="aot_eager") if form == "compiled" else loss


@FORMS
@pytest.mark.parametrize("p", POWERS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16), ids=str)
def test_attention_at_any_size(form: str, p: float, dtype: torch.dtype) -> None:
    if np.finfo(np.longdouble).maxexp <= 1024:
        pytest.skip("long double is not wider than double here")
    torch._dynamo.reset()
    function = function_of(form, p)
    for size in (*SIZES, 1e-12, 1e20):
        for other in (1.0, size):
            student, teacher = (size * draw(3, 4, 5, 6)).to(dtype), other * draw(3, 7, 5, 6, seed=1)
            loss, gradient = graded(function, SPECS["attention"], (student, teacher))
            value, slope = attention_in_long_double(student, teacher, p)
            limit = 1e-10 if dtype == torch.float64 and other == 1.0 else 2e-5
            smallest = torch.finfo(loss.dtype).smallest_normal
            assert abs(loss.item() - value) <= limit * value + smallest, (size, other)
            limit = 1e-2 if dtype == torch.bfloat16 else limit
            smallest = torch.finfo(dtype).smallest_normal
            true = np.sqrt((slope**2).sum())
            error = gradient.double().numpy().astype(np.longdouble) - slope
            bound = limit * true + 10 * math.sqrt(error.size) * smallest
            assert np.sqrt((error**2).sum()) <= bound, (size, other)


@pytest.mark.parametrize("p", (2.0, 4.0, 8.0))
def test_attention_of_large_features_is_not_flat(p: float) -> None:
    """The map does not change with the features' size, and the gradient goes as one over it."""
    student, teacher = draw(3, 4, 5, 6), draw(3, 7, 5, 6, seed=1)
    for backend in (None, "reference"):

        def loss(s: Tensor, t: Tensor, backend: str | None = backend) -> Tensor:
            return K.attention_transfer_loss(s, t, p, backend=backend)

        spec = SPECS["attention"]
        value, gradient = graded(loss, spec, (student, teacher))
        for size in (2.0**17, 2.0**60, 2.0**100):
            large, flat = graded(loss, spec, (size * student, size * teacher))
            torch.testing.assert_close(large, value, rtol=1e-5, atol=0)
            torch.testing.assert_close(flat * size, gradient, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("p", (1.0, 2.0, 4.0))
def test_a_dead_sample_is_differentiated_twice(p: float) -> None:
    """Zeros have the map 0 and leave the second derivatives of the others alone."""
    student, teacher = draw(3, 4, 2, 2, dtype=torch.float64), draw(3, 5, 2, 2, seed=1).double()

    def hessian(s: Tensor) -> Tensor:
        s = s.detach().requires_grad_()
        loss = K.attention_transfer_loss(s, teacher, p, backend="reference", reduction="sum")
        (gradient,) = torch.autograd.grad(loss, s, create_graph=True)
        (second,) = torch.autograd.grad(gradient.square().sum(), s)
        return second

    whole = hessian(student)
    student[1] = 0
    dead = hessian(student)
    assert dead.isfinite().all() and torch.allclose(dead[[0, 2]], whole[[0, 2]])


@calls([spec for spec in EMBEDDING if spec.name not in ("attention", "iekd")], interpreted=False)
@pytest.mark.parametrize("size", SIZES)
def test_every_loss_at_any_size(call: Call, size: float) -> None:
    """float32 against the formulas in float64; IE-KD and attention transfer have their own."""
    assert_formula(call, size, 2e-4)


@calls([SPECS["iekd"]], interpreted=False)
@pytest.mark.parametrize("size", (1e-9, 1e-5, 1e5, 1e18))
def test_iekd_at_any_size(call: Call, size: float) -> None:
    """Norms from far above the floor of 1e-12 to squares at the end of float32."""
    assert_formula(call, size, 2e-4)


@pytest.mark.parametrize("size", (1e-9, 1e25, 1e35))
def test_iekd_reference_beyond_the_squares_of_float32(size: float) -> None:
    assert_formula(Call(SPECS["iekd"], "reference"), size, 2e-4)


def assert_formula(call: Call, size: float, limit: float) -> None:
    spec = call.spec
    for seed, sample in enumerate(spec.samples):
        options = {k: v for k, v in sample.items() if k != "loss_weight"}
        tensors = tuple(
            size * x if i < leaves(spec) or spec.name == "hint" else x
            for i, x in enumerate(batch(spec, seed=seed))
        )
        wide = tuple(x.double() if x.is_floating_point() else x for x in tensors)
        true = graded(FORMULAS[spec.name], spec, wide, **options)
        got = graded(call, spec, tensors, **options)
        # IE-KD's two parts cancel: its value is judged by their size.
        scale = 100.0 if spec.name == "iekd" else true[0].abs().item()
        assert (got[0].double() - true[0]).abs() <= limit * scale, sample
        for gradient, expected in zip(got[1:], true[1:], strict=True):
            # Scaled, because squares of small gradients underflow in a norm.
            unit = max(expected.abs().max().item(), 1e-300)
            error = ((gradient.double() - expected) / unit).norm()
            assert error <= limit * (expected / unit).norm(), sample

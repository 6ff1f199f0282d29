"""Gradients against finite differences in float64; a second differentiation raises.

Where a weight computed from the student counts as a constant, the gradient is by design not the
derivative of the value: those losses are differentiated with the weight switched off, and
``test_losses.py`` compares the gradient with the reference's at all settings.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from batches import Call, batch, calls, leaves
from cases import (
    LOSSES,
    SOFTMAX,
    Case,
    alone_if_interpreted,
    each_emulated as each,
    each_sample_emulated as each_sample,
    passes,
    reductions,
    value_and_grad,
)
from inputs import make
from layouts import LAYOUTS, target_for
from torch import Tensor


def _weight_off(case: Case) -> dict[str, float]:
    """The option that makes the gradient the derivative of the value, where one is needed."""
    return {case.spec.constant_weight: 0.0} if case.spec.constant_weight else {}


def _gradcheck(
    case: Case, student: Tensor, teacher: Tensor, target: Tensor, fast: bool, **options: Any
) -> None:
    if case.masks:
        options["target"] = target
    options |= _weight_off(case)

    def function(s: Tensor) -> Tensor:
        return case(s, teacher, **options)

    # Backward runs twice and must agree to the bit (nondet_tol).
    torch.autograd.gradcheck(
        function,
        (student.detach().requires_grad_(),),
        fast_mode=fast,
        nondet_tol=0.0,
        atol=1e-6,
        rtol=1e-4,
    )


def _few_if_slow(case: Case, sample: int) -> bool:
    return alone_if_interpreted(case) and (sample == 0 or not (case.interpreted or case.emulated))


@each_sample(keep=_few_if_slow)
def test_gradcheck(case: Case, options: dict[str, Any]) -> None:
    rows, classes = case.pick((3, 13), (2, 7))
    student, teacher, target = make("gaussian", rows, classes, dtype=torch.float64)
    student, teacher, target = (x.to(case.device) for x in (student / 3, teacher / 3, target))
    # Element by element for the reference, and for the kernels with the first sample; along random
    # directions for their other samples, whose gradient is also compared with the reference's.
    first = options == dict(case.spec.samples[0])
    fast = case.interpreted or case.emulated or not (first or case.backend == "reference")
    for reduction in passes(case.spec) if first else passes(case.spec)[-1:]:
        kwargs = {**options, "reduction": reduction}
        _gradcheck(case, student, teacher, target, fast, **kwargs)


@each(layout=("transposed", "image", "tokens_shifted"), shared=("layout",))
def test_gradcheck_of_layouts(case: Case, layout: str) -> None:
    student, teacher, target = make("gaussian", 12, case.pick(33, 5), dtype=torch.float64)
    student, teacher = (LAYOUTS[layout](x.to(case.device) / 3) for x in (student, teacher))
    target = target_for(student, target.to(case.device))
    _gradcheck(case, student, teacher, target, True)


@each(
    [s for s in LOSSES if s.takes_target],
    keep=lambda case: case.masks and alone_if_interpreted(case),
)
def test_gradcheck_with_ignored_rows(case: Case) -> None:
    student, teacher, target = make("gaussian", 4, 9, dtype=torch.float64, device=case.device)
    target[1] = -100
    for reduction in reductions(case.spec):
        _gradcheck(case, student / 3, teacher / 3, target, True, reduction=reduction)


@each(
    [s for s in LOSSES if s.smooth], keep=alone_if_interpreted
)  # a step of a difference would cross jumps
def test_many_classes(case: Case) -> None:
    """More classes than any block, in a few directions."""
    classes = 2049 if case.emulated else case.pick(5003, 130)
    # Two sigmoids may be so near that their columns' correlation turns within a longer step.
    length = 1e-5 if case.spec.by_row or case.spec in SOFTMAX else 1e-7
    student, teacher, target = make("gaussian", 2, classes, dtype=torch.float64, device=case.device)
    for reduction in reductions(case.spec):
        options = {"reduction": reduction, **_weight_off(case)}
        _, gradient = value_and_grad(case, student, teacher, target, **options)
        for seed in range(3):
            step = torch.randn(student.shape, generator=torch.Generator().manual_seed(seed)).to(
                student
            )
            weights = (torch.arange(1, 3).to(student) / 4 - 1) if reduction == "none" else 1.0
            high, low = (
                (case(student + sign * length * step, teacher, target, **options) * weights).sum()
                for sign in (1, -1)
            )
            slope = (high - low) / (2 * length)
            torch.testing.assert_close((gradient * step).sum(), slope, rtol=1e-5, atol=1e-8)


@each(kernels=True, keep=alone_if_interpreted)
def test_double_backward_raises(case: Case) -> None:
    """Wrong second derivatives must not come silently."""
    student, teacher, target = make("gaussian", 3, 5, dtype=torch.float64, device=case.device)
    student.requires_grad_()
    for reduction in reductions(case.spec):
        loss = case(student, teacher, target, reduction=reduction).sum()
        (gradient,) = torch.autograd.grad(loss, student, create_graph=True)
        assert gradient.requires_grad
        with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
            gradient.square().sum().backward()


@calls()
def test_second_derivatives_are_right_or_refused(call: Call) -> None:
    """From the reference they are right; elsewhere right or an error, never silently wrong."""
    spec = call.spec
    off = {spec.constant_weight: 0.0} if spec.constant_weight else {}
    count = leaves(spec)
    for seed, sample in enumerate(call.samples):
        options = {**sample, **off}
        tensors = batch(spec, torch.float64, seed)
        students = tuple(x.clone().requires_grad_() for x in tensors[:count])

        def function(
            *args: Tensor,
            held: tuple[Tensor, ...] = tensors[count:],
            options: dict[str, Any] = options,
        ) -> Tensor:
            return call(*args, *held, **options)

        once = torch.autograd.grad(function(*students).sum(), students)
        again = torch.autograd.grad(function(*students).sum(), students, create_graph=True)
        for a, b in zip(once, again, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
        try:
            torch.autograd.grad(sum(g.square().sum() for g in again), students)
        except RuntimeError as error:
            assert "cannot be differentiated twice" in str(error)
            assert call.backend != "reference", f"{spec.name}: the reference must not refuse"
            continue
        # Of a function of the gradient and of the upstream gradient, in all directions with the
        # first sample, and along random ones with the others.
        assert torch.autograd.gradgradcheck(function, students, fast_mode=seed > 0)


@calls()
def test_the_upstream_gradient_is_not_forgotten(call: Call) -> None:
    """A loss inside a function: the second derivative by way of the first, or an error."""
    spec = call.spec
    count = leaves(spec)
    tensors = batch(spec, torch.float64, 1)
    options = {spec.constant_weight: 0.0} if spec.constant_weight else {}
    students = tuple(x.clone().requires_grad_() for x in tensors[:count])

    def function(*args: Tensor) -> Tensor:
        loss = call(*args, *tensors[count:], **options).sum()
        return (loss / 100).sin() * args[0].mean()

    gradients = torch.autograd.grad(function(*students), students, create_graph=True)
    try:
        torch.autograd.grad(sum(g.sum() for g in gradients), students)
    except RuntimeError as error:
        assert "cannot be differentiated twice" in str(error) and call.backend != "reference"
    else:
        assert torch.autograd.gradgradcheck(function, students)

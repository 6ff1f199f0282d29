"""What a loss keeps for its backward pass: seen when it changes, allowed to come from anywhere."""

from __future__ import annotations

import contextlib
import inspect
import itertools
from typing import Any

import torch
from every import every, example, gradient
from torch.utils.checkpoint import checkpoint

from kdkernels.registry import SPECS, LossSpec

DTYPES = {"float32": torch.float32, "float16": torch.float16}


def _change(tensor: torch.Tensor) -> None:
    if tensor.is_floating_point():
        tensor.mul_(0.5)
    else:
        tensor.copy_((tensor + 1) % (int(tensor.max()) + 1))


PASSES = [(dtype, again) for dtype in DTYPES.values() for again in (False, True)]
"""Whether it is the second backward pass; interpreted, the first and the last of these."""


@every()
def test_a_changed_input_is_no_wrong_gradient(spec: LossSpec, backend: str | None) -> None:
    """Any tensor changed between the passes: the old gradient (it was stored) or torch's error."""
    reductions = ("mean", "none") if spec.by_row else ("mean",)
    passes = PASSES[:: len(PASSES) - 1] if backend == "triton" else PASSES
    for reduction, (dtype, again) in itertools.product(reductions, passes):
        for index in range(len(example(spec).tensors)):
            case = example(spec, dtype)
            options: dict[str, Any] = {"reduction": reduction, "backend": backend}
            expected = gradient(case.function(**options), case.student)
            leaf = case.student.clone().requires_grad_()
            given = leaf * 1  # not a leaf, so that it may be changed in place
            loss = case.of(given, **options).sum()
            if again:
                torch.autograd.grad(loss, leaf, retain_graph=True)
            with torch.no_grad():
                _change(given if index == 0 else case.tensors[index])
            with contextlib.suppress(RuntimeError):  # "modified by an inplace operation"
                (found,) = torch.autograd.grad(loss, leaf)
                torch.testing.assert_close(found, expected)


@every()
def test_recomputed_by_a_checkpoint(spec: LossSpec, backend: str | None) -> None:
    """Which gives every kept tensor once; also where the gradient is part of a graph."""
    for dtype in DTYPES.values():
        for reduction in ("mean", "none") if spec.by_row else ("mean",):
            case = example(spec, dtype)
            options: dict[str, Any] = {"reduction": reduction, "backend": backend}
            expected = gradient(case.function(**options), case.student)
            leaf = case.student.clone().requires_grad_()
            for graph in (False, True):
                loss = checkpoint(case.function(**options), leaf, use_reentrant=False)
                (found,) = torch.autograd.grad(loss.sum(), leaf, create_graph=graph)
                torch.testing.assert_close(found, expected)


@every()
def test_constants_made_in_inference_mode(spec: LossSpec, backend: str | None) -> None:
    """A cached teacher is a tensor of ``torch.inference_mode()``; so may be the labels."""
    for dtype in DTYPES.values():
        for reduction in ("mean", "none") if spec.by_row else ("mean",):
            case = example(spec, dtype)
            options: dict[str, Any] = {"reduction": reduction, "backend": backend}
            leaf = case.student.clone().requires_grad_()
            expected = gradient(case.function(**options), case.student)
            with torch.inference_mode():
                case.tensors[1:] = [x.clone() for x in case.tensors[1:]]
            loss = case.of(leaf, **options).sum()
            for _ in range(2):
                (found,) = torch.autograd.grad(loss, leaf, retain_graph=True)
                torch.testing.assert_close(found, expected)


def _keywords(spec: LossSpec, rows: torch.Size) -> dict[str, torch.Tensor]:
    """The tensors that a loss takes besides its inputs, as far as it takes them."""
    given = {"loss_weight": torch.tensor(0.5)}
    if spec.by_row:
        weight = torch.linspace(0.5, 2.0, rows.numel()).reshape(rows)
        given |= {"token_weight": weight, "temperature": 1.0 + weight}
        given["num_items_in_batch"] = torch.tensor(3.0)
    if spec.family == "sparse":
        given["log_rest"] = -weight
    return given


@every()
def test_keywords_made_in_inference_mode(spec: LossSpec, backend: str | None) -> None:
    case = example(spec)
    for name, value in _keywords(spec, case.student.shape[:1]).items():
        names = list(inspect.signature(spec.function).parameters)
        if name not in names[len(case.tensors) :]:  # given by position already
            continue
        expected = gradient(case.function(backend=backend, **{name: value}), case.student)
        with torch.inference_mode():
            kept = value.clone()
        leaf = case.student.clone().requires_grad_()
        loss = case.of(leaf, backend=backend, **{name: kept}).sum()
        torch.testing.assert_close(torch.autograd.grad(loss, leaf)[0], expected)


def test_a_learned_temperature_beside_a_teacher_of_inference_mode() -> None:
    case = example(SPECS["kd"])
    student, teacher = case.tensors[:2]
    heat = torch.tensor(2.0, requires_grad=True)
    (expected,) = torch.autograd.grad(case.spec.function(student, teacher, heat), heat)
    with torch.inference_mode():
        teacher = teacher.clone()
    (found,) = torch.autograd.grad(case.spec.function(student, teacher, heat), heat)
    assert torch.equal(found, expected)

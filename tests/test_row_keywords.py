"""The keywords that all row losses share: masks, weights of tokens, denominators of split batches.

What a keyword must equal is written with ``reduction="none"`` of the same call without it.
"""

from __future__ import annotations

import inspect
import textwrap
from typing import Any, get_type_hints

import pytest
import torch
from cases import (
    ROW_LOSSES,
    Case,
    alone_if_interpreted,
    call,
    each_emulated as each,
    same_bits,
    value_and_grad,
)
from inputs import make
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from kdkernels import _rowwise
from kdkernels.functional import mixed_kl_loss
from kdkernels.registry import LossSpec

row_losses = pytest.mark.parametrize("spec", ROW_LOSSES, ids=lambda spec: spec.name)


def _inputs(case: Case, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    student, teacher, target = make("gaussian", 7, 19, dtype=dtype, device=case.device)
    target = target.clamp(min=1)
    target[2] = target[5] = -100
    return student, teacher, target


def _weights(like: Tensor) -> Tensor:
    return torch.tensor([0.5, 2.0, float("nan"), 0.0, 1.0, float("inf"), 3.25]).to(like)


@each(
    ROW_LOSSES,
    reduction=("mean", "sum", "none"),
    dtype={"f64": torch.float64, "f32": torch.float32},
    keep=alone_if_interpreted,
)
def test_token_weight_multiplies_each_row(case: Case, reduction: str, dtype: torch.dtype) -> None:
    """Value and gradient; the mean divides by the rows; ignored rows' weights are not read."""
    student, teacher, target = _inputs(case, dtype)
    weight = _weights(student)
    rows = torch.where(target == -100, 0.0, weight.nan_to_num(0.0, 0.0))
    leaf = student.clone().requires_grad_()
    loss = case(leaf, teacher, target=target, reduction="none") * rows
    expected = {"none": loss, "sum": loss.sum(), "mean": loss.sum() / 5}[reduction]
    upstream = (
        torch.linspace(0.5, 2, 7).to(student) if reduction == "none" else torch.ones_like(expected)
    )
    (gradient,) = torch.autograd.grad(expected, leaf, upstream)
    options = {"target": target, "reduction": reduction, "token_weight": weight}
    actual = value_and_grad(case, student, teacher, upstream=upstream, **options)
    close = (
        {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-14}
    )
    torch.testing.assert_close(actual[0], expected.detach(), **close)
    torch.testing.assert_close(actual[1], gradient, **close)
    assert same_bits(actual[1][[2, 5]], torch.zeros_like(actual[1][[2, 5]]))


@each(ROW_LOSSES, layout=("dense", "strided", "half"))
def test_token_weight_in_every_traversal(case: Case, layout: str) -> None:
    """Rows side by side, rows of any stride, and gradients that are recomputed (float16)."""
    student, teacher, target = _inputs(case, torch.float32)
    weight = _weights(student).nan_to_num(1.0, 1.0)
    if layout == "dense":
        student, teacher = (x.t().contiguous()[None, :, :, None] for x in (student, teacher))
        target, weight = target[None, :, None], weight[None, :, None]
    elif layout == "strided":
        student, teacher = (x.repeat_interleave(2, 1)[:, ::2] for x in (student, teacher))
        weight = weight.repeat_interleave(2)[::2]
    else:
        student = student.half()
    options: dict[str, Any] = {"target": target, "token_weight": weight}
    ours = value_and_grad(case, student, teacher, **options)
    wide = student.double(), teacher.double()
    leaf = wide[0].requires_grad_()
    expected = call(case.spec, leaf, wide[1], backend="reference", **options)
    (gradient,) = torch.autograd.grad(expected, leaf)
    torch.testing.assert_close(ours[0].double(), expected.detach(), rtol=1e-5, atol=1e-7)
    rtol = 2e-3 if layout == "half" else 1e-4
    torch.testing.assert_close(ours[1].double(), gradient, rtol=rtol, atol=1e-6)


@each(ROW_LOSSES, keep=alone_if_interpreted)
def test_parts_of_a_batch_with_the_number_of_items_are_the_batch(case: Case) -> None:
    student, teacher, target = _inputs(case)
    for items in (5, 5.0, torch.tensor(5), torch.tensor(5.0, dtype=torch.float64)):
        whole = value_and_grad(case, student, teacher, target=target)
        total, gradients = torch.zeros((), dtype=torch.float64), []
        for part in (slice(0, 3), slice(3, 4), slice(4, 7)):
            loss, gradient = value_and_grad(
                case, student[part], teacher[part], target=target[part], num_items_in_batch=items
            )
            total, gradients = total + loss.cpu(), [*gradients, gradient]
        torch.testing.assert_close(total, whole[0].cpu(), rtol=1e-12, atol=0)
        torch.testing.assert_close(torch.cat(gradients), whole[1], rtol=1e-12, atol=1e-15)


@each([spec for spec in ROW_LOSSES if not spec.needs_target])
def test_a_bool_mask_is_a_mask(case: Case) -> None:
    student, teacher, target = _inputs(case)
    student[2] = float("nan")
    expected = value_and_grad(case, student, teacher, target=target)
    for ignore_index in (-100, 0, 1, None):
        options = {"target": target != -100, "ignore_index": ignore_index}
        actual = value_and_grad(case, student, teacher, **options)
        assert same_bits(actual[0], expected[0]) and same_bits(actual[1], expected[1])


@each(ROW_LOSSES)
def test_no_index_is_ignored(case: Case) -> None:
    student, teacher, target = make("gaussian", 7, 19, device=case.device)
    expected = value_and_grad(case, student, teacher, target=target, ignore_index=-1)
    actual = value_and_grad(case, student, teacher, target=target, ignore_index=None)
    assert same_bits(actual[0], expected[0]) and same_bits(actual[1], expected[1])
    if case.spec.needs_target and case.device == "cpu" and not case.emulated:
        with pytest.raises(ValueError, match="must be in"):
            case(student, teacher, target=target - 100, ignore_index=None)


@row_losses
def test_modules_take_them_where_they_are_called(spec: LossSpec) -> None:
    student, teacher, target = _inputs(Case(spec, "reference", "cpu"))
    options: dict[str, Any] = {"token_weight": torch.rand(7), "num_items_in_batch": 9}
    expected = spec.function(student, teacher, **{spec.target_name: target}, **options)
    assert torch.equal(spec.module()(student, teacher, target, **options), expected)


@row_losses
@pytest.mark.parametrize(
    ("name", "bad", "text"),
    [
        ("token_weight", 2.0, "a Tensor, got float"),
        ("token_weight", torch.ones(6), r"of shape \(7,\), got \(6,\)"),
        ("token_weight", torch.ones(7, dtype=torch.int64), "float64, float32, .* got torch.int64"),
        ("token_weight", torch.ones(7, device="meta"), "on the student's device cpu, got meta"),
        ("token_weight", torch.ones(7, requires_grad=True), "a constant .*"),
        ("num_items_in_batch", 0, "> 0, got 0.0"),
        ("num_items_in_batch", "5", "a number, got str"),
        ("num_items_in_batch", torch.ones(2), "a number or a 0-d Tensor, .*"),
    ],
)
def test_bad_values(spec: LossSpec, name: str, bad: Any, text: str) -> None:
    student, teacher, target = _inputs(Case(spec, "reference", "cpu"))
    with pytest.raises((ValueError, TypeError), match=f"^{name} must be {text}$"):
        call(spec, student, teacher, target=target, **{name: bad})


@row_losses
def test_the_number_of_items_is_of_a_mean(spec: LossSpec) -> None:
    student, teacher, target = _inputs(Case(spec, "reference", "cpu"))
    with pytest.raises(ValueError, match=r"^reduction must be 'mean' where num_items_in_batch"):
        call(spec, student, teacher, target=target, reduction="sum", num_items_in_batch=3)


def test_the_keywords_types_name_what_the_function_takes() -> None:
    """Type checkers read the dictionaries' types, callers the signature of ``row_loss``."""
    parameters = inspect.signature(_rowwise.row_loss).parameters.values()
    keywords = {p.name: p.annotation for p in parameters if p.kind is p.KEYWORD_ONLY}
    written = {**_rowwise.TokenOptions.__annotations__, **_rowwise.RowOptions.__annotations__}
    assert keywords.keys() == get_type_hints(_rowwise.RowOptions).keys()
    for name, annotation in keywords.items():
        assert written[name].__forward_arg__ == annotation, name


def test_forward_weight_of_each_token() -> None:
    """Adaptive KL: as many weights as rows, which may weigh together with ``token_weight``."""
    student, teacher, target = _inputs(Case(ROW_LOSSES[0], "native", "cpu"))
    weight = torch.tensor([0.5, 1.0, 0.3, 0.0, 0.25, 0.9, 0.125], dtype=torch.float64)
    tokens = torch.linspace(0.5, 2, 7, dtype=torch.float64)
    for options in ({}, {"token_weight": tokens}):
        leaf = student.clone().requires_grad_()
        loss = mixed_kl_loss(leaf, teacher, target, forward_weight=weight, **options)
        (gradient,) = torch.autograd.grad(loss, leaf)
        p, q = teacher.softmax(-1), leaf.softmax(-1)
        forward = (p * (p / q).log()).sum(-1)
        reverse = (q * (q / p).log()).sum(-1)
        by_row = (weight * forward + (1 - weight) * reverse) * options.get("token_weight", 1.0)
        expected = by_row[target != -100].mean()
        torch.testing.assert_close(loss.detach(), expected.detach())
        torch.testing.assert_close(gradient, torch.autograd.grad(expected, leaf)[0])


def test_adaptive_kl_is_written_out_and_runs() -> None:
    """The recipe in the docstring of ``mixed_kl_loss``."""
    lines = (mixed_kl_loss.__doc__ or "").split("::\n")[1].split("Args:")[0]
    student_logits, teacher_logits = torch.randn(2, 5, 11, dtype=torch.float64)
    names: dict[str, Any] = {
        "student_logits": student_logits.requires_grad_(),
        "teacher_logits": teacher_logits,
        "labels": None,
        "mixed_kl_loss": mixed_kl_loss,
    }
    exec(textwrap.dedent(lines), names)
    p, q = teacher_logits.softmax(-1), student_logits.detach().softmax(-1)
    expected = []
    for row in range(5):
        order = sorted(range(11), key=lambda c: -p[row, c].item())
        mass, head, tail = 0.0, 0.0, 0.0
        for c in order:
            gap = abs(p[row, c] - q[row, c]).item()
            head, tail = (head + gap, tail) if mass < 0.5 else (head, tail + gap)
            mass += p[row, c].item()
        forward = (p[row] * (p[row] / q[row]).log()).sum().item()
        reverse = (q[row] * (q[row] / p[row]).log()).sum().item()
        expected.append((head * forward + tail * reverse) / (head + tail))
    assert names["loss"].item() == pytest.approx(sum(expected) / 5)


@pytest.mark.parametrize("spec", ROW_LOSSES[:2], ids=lambda spec: spec.name)
def test_under_a_compiler_in_one_graph(spec: LossSpec) -> None:
    """Weights and counts are inputs of the graph; numbers of items that change compile twice."""
    student, teacher, target = _inputs(Case(spec, "native", "cpu"))
    counter = CompileCounter()
    module = spec.module()
    compiled = torch.compile(module, backend=counter, fullgraph=True)
    for items in (5, 6, 7, 8, 9):
        weight = torch.rand(7, dtype=torch.float64)
        given: dict[str, Any] = {"token_weight": weight, "num_items_in_batch": items}
        expected = value_and_grad(module, student, teacher, target, **given)
        actual = value_and_grad(compiled, student, teacher, target, **given)
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-15)
    assert counter.frame_count <= 2
    given = {"token_weight": weight, "num_items_in_batch": torch.tensor(5)}
    expected = value_and_grad(module, student, teacher, target, **given)
    actual = value_and_grad(compiled, student, teacher, target, **given)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-15)


@row_losses
def test_unknown_keywords_are_errors(spec: LossSpec) -> None:
    """Whatever the common keywords of other losses are."""
    student, teacher, target = _inputs(Case(spec, "reference", "cpu"))
    unknown = ["redction", *({"standardize"} - set(inspect.signature(spec.function).parameters))]
    for name in unknown:
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
            call(spec, student, teacher, target=target, **{name: True})
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
            spec.module(**{name: True})

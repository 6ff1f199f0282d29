"""The numerical contract, line 3: ignored rows are exact zeros; no rows give an attached zero."""

from __future__ import annotations

from typing import Any

import torch
from cases import LOSSES, Case, each_emulated as each, passes, reductions, same_bits, value_and_grad
from inputs import DTYPES, dtype_id, make
from layouts import LAYOUT_ROWS, LAYOUTS, as_rows, target_for
from oracle import verify
from torch import Tensor

NAN, INF = float("nan"), float("inf")
MASKABLE = [spec for spec in LOSSES if spec.takes_target]


@each(
    MASKABLE,
    ignore_index=(-100, 0, 36, 255, -(2**40)),
    whose=("student", "teacher", "both"),
    keep=lambda case, _, whose: case.masks and (not case.interpreted or whose == "both"),
    shared=("ignore_index", "whose"),
)
def test_ignored_rows_are_exact_zeros(case: Case, ignore_index: int, whose: str) -> None:
    student, teacher, target = make("gaussian", 6, 37, device=case.device)
    target = target.clamp(1, 35)
    ignored = torch.tensor([False, True, False, True, False, True], device=case.device)
    target[ignored] = ignore_index
    s, t = student.clone(), teacher.clone()
    if whose != "teacher":
        s[1], s[3] = NAN, -INF
    if whose != "student":
        t[1], t[5] = INF, NAN
    options = {"target": target, "ignore_index": ignore_index}
    for reduction in reductions(case.spec):
        loss, gradient = value_and_grad(case, s, t, **options, reduction=reduction)
        assert same_bits(gradient[ignored], torch.zeros_like(gradient[ignored]))
        clean, clean_gradient = value_and_grad(
            case, student, teacher, **options, reduction=reduction
        )
        assert same_bits(loss, clean) and same_bits(gradient, clean_gradient)
        if reduction == "none":
            assert same_bits(loss[ignored], torch.zeros_like(loss[ignored]))
            assert (loss[~ignored] != 0).all()
            continue
        kept = {**options, "target": target[~ignored]}
        without = value_and_grad(
            case, student[~ignored], teacher[~ignored], **kept, reduction=reduction
        )
        torch.testing.assert_close(loss, without[0])
        torch.testing.assert_close(gradient[~ignored], without[1])


ALIGNED = {name: layout for name, layout in LAYOUTS.items() if name != "expanded_rows"}
"""Layouts in which a row can be bad alone."""


def _dense(x: Tensor) -> Tensor:
    """(1, C, rows, 1): every vector of rows is full but the last."""
    return x.t().contiguous()[None, :, :, None]


@each(
    MASKABLE,
    layout={**ALIGNED, "dense": _dense},
    dtype={dtype_id(d): d for d in DTYPES},
    keep=lambda case, layout, dtype: (
        case.masks and (dtype == torch.float32 or (case.backend == "native" and not case.emulated))
    ),
    shared=("layout", "dtype"),
)
def test_ignored_rows_in_every_layout(case: Case, layout: Any, dtype: torch.dtype) -> None:
    """Ignored rows processed side by side with others, as ordinary numbers and as NaN."""
    rows, classes = 37 if layout is _dense else LAYOUT_ROWS, 9
    flat = make("gaussian", rows, classes, dtype=dtype, device=case.device)
    index = flat[2]
    ignored = torch.arange(rows, device=case.device) % 3 == 1
    index[ignored] = -100
    for bad in (False, True):
        if bad and layout is LAYOUTS["expanded_columns"]:
            continue  # its rows are uniform
        student, teacher = (x.clone() for x in flat[:2])
        if bad:
            student[1], student[7], teacher[4], teacher[7] = NAN, -INF, NAN, INF
        student, teacher = layout(student), layout(teacher)
        target = target_for(student, index)
        for reduction in passes(case.spec):
            loss, gradient = verify(case, student, teacher, target=target, reduction=reduction)
            gradient = as_rows(gradient)
            assert same_bits(gradient[ignored], torch.zeros_like(gradient[ignored]))
            if reduction == "none":
                loss = loss.flatten()
                assert same_bits(loss[ignored], torch.zeros_like(loss[ignored]))


@each(
    MASKABLE,
    dtype={dtype_id(d): d for d in DTYPES},
    keep=lambda case, _: case.masks and case.backend == "native" and not case.emulated,
)
def test_ignored_pixels_of_images(case: Case, dtype: torch.dtype) -> None:
    """Images of 135 pixels: spans of rows lie in one or in two, vectors are ignored as a whole or
    in part, and the teacher's pixels lie as the student's or channels last."""
    pixels = torch.arange(270, device=case.device)
    ignored = ((pixels >= 21) & (pixels < 94)) | ((pixels > 150) & (pixels % 3 == 0))
    student, teacher, index = make("gaussian", 270, 11, dtype=dtype, device=case.device)
    student[ignored], teacher[ignored] = NAN, INF
    index[ignored] = -100
    images = [x.view(2, 9, 15, 11).movedim(-1, 1) for x in (student, teacher)]
    first = images[0].contiguous()
    for second in (images[1].contiguous(), images[1]):
        loss, gradient = verify(case, first, second, target=index.view(2, 9, 15), reduction="sum")
        zeros = as_rows(gradient)[ignored]
        assert same_bits(zeros, torch.zeros_like(zeros)) and loss.isfinite()
        kept = {"target": index[~ignored], "reduction": "sum"}
        alone, slope = value_and_grad(case, student[~ignored], teacher[~ignored], **kept)
        torch.testing.assert_close(loss, alone)
        torch.testing.assert_close(as_rows(gradient)[~ignored], slope)


def _assert_attached_zero(case: Case, student: Tensor, teacher: Tensor, **options: Any) -> None:
    for reduction in reductions(case.spec):
        s = student.clone().requires_grad_()
        loss = case(s, teacher, reduction=reduction, **options)
        assert loss.requires_grad
        assert same_bits(loss.detach(), torch.zeros_like(loss))
        loss.sum().backward()
        assert s.grad is not None
        assert same_bits(s.grad, torch.zeros_like(student))


@each(
    MASKABLE,
    dtype={dtype_id(d): d for d in DTYPES},
    keep=lambda case, _: case.masks,
    shared=("dtype",),
)
def test_all_rows_ignored(case: Case, dtype: torch.dtype) -> None:
    student = torch.full((4, 7), NAN, device=case.device, dtype=dtype)
    target = torch.full((4,), -100, device=case.device)
    _assert_attached_zero(case, student, student.clone(), target=target)


@each(
    shape={"x".join(map(str, s)): s for s in ((0, 7), (2, 0, 7), (0, 7, 2, 2), (2, 7, 0, 3))},
    shared=("shape",),
)
def test_no_rows(case: Case, shape: tuple[int, ...]) -> None:
    student = torch.empty(shape, device=case.device)
    rows = shape[:1] + shape[2:] if len(shape) == 4 else shape[:-1]
    options = {}
    if case.spec.takes_target:
        options["target"] = torch.empty(rows, dtype=torch.int64, device=case.device)
    _assert_attached_zero(case, student, student.clone(), **options)

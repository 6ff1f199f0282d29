"""Logit standardisation against formulas of its own, in extended precision.

A row loss of standardised logits is the loss of z = d / (σ + 1e-7), with d the deviations from the
mean of a row, so that value and gradient by z need no standardisation; the way on from z to the
logits is written out here. The families are those whose mean is hard: far from 0, no number of the
dtype, or the row's only number. PKD standardises channels, with the same difficulties.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cases import ROW_LOSSES, Case, call, each_emulated as each, value_and_grad
from inputs import DTYPES, Draw, dtype_id
from layouts import LAYOUT_ROWS, LAYOUTS, as_rows, target_for
from torch import Tensor

from kdkernels.functional import pkd_loss

STANDARDIZABLE = [
    spec for spec in ROW_LOSSES if "standardize" in inspect.signature(spec.function).parameters
]
EPS = 1e-7

Logits = tuple[Tensor, Tensor]
ROWS: dict[str, Callable[[Draw], Logits]] = {
    "gaussian": lambda draw: (draw.normal(2.0), draw.normal(2.0)),
    "offset": lambda draw: (draw.normal(2.0) + 1000, draw.normal(2.0) - 1000),
    "constant_student": lambda draw: (draw.normal(0.0) - 3.7, draw.normal(2.0)),
    "constant_teacher": lambda draw: (draw.normal(2.0), draw.normal(0.0) - 3.7),
    "one_apart": lambda draw: (_raise(draw, draw.classes // 2, 0.01), draw.normal(2.0)),
    "first_apart": lambda draw: (_raise(draw, 0, 1e4) + draw.normal(1.0), draw.normal(2.0)),
    "last_apart": lambda draw: (draw.normal(2.0), _raise(draw, -1, 1e4) + draw.normal(1.0)),
}


def _raise(draw: Draw, index: int, height: float) -> Tensor:
    """Rows of -3.7 with one class raised."""
    logits = draw.normal(0.0) - 3.7
    logits[:, index] += height
    return logits


def _deviations(logits: Tensor) -> tuple[Any, Any]:
    """From the mean of each row, and their standard deviation (unbiased)."""
    wide = logits.cpu().double().numpy().astype(np.longdouble)
    wide = wide - wide[:, :1]
    d = wide - wide.mean(1, keepdims=True)
    return d, np.sqrt((d * d).sum(1, keepdims=True) / (d.shape[1] - 1))


def _expected(
    case: Case, student: Tensor, teacher: Tensor, target: Tensor, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Value, gradient, and the size of the terms that cancel in each row of the gradient."""
    (d, deviation), (d_teacher, deviation_teacher) = _deviations(student), _deviations(teacher)
    spread = deviation + EPS
    z = torch.from_numpy((d / spread).astype(np.float64))
    z_teacher = torch.from_numpy((d_teacher / (deviation_teacher + EPS)).astype(np.float64))

    def plain(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return call(case.spec, s, t, y, backend="reference", **options)

    value, by_z = value_and_grad(plain, z, z_teacher, target.cpu())
    g = by_z.numpy().astype(np.longdouble)
    gradient = (g - g.mean(1, keepdims=True)) / spread
    # d σ / d x = d / (σ (n - 1)), taken as 0 where σ is.
    varies = deviation > 0
    slope = d / (np.where(varies, deviation, 1) * (d.shape[1] - 1)) * varies
    gradient -= (g * d).sum(1, keepdims=True) / spread**2 * slope
    size = np.abs(g / spread).max(1, keepdims=True)
    as_double = lambda x: torch.from_numpy(x.astype(np.float64))  # noqa: E731
    return value, as_double(gradient), as_double(size)


@each(
    STANDARDIZABLE,
    rows=ROWS,
    layout=("contiguous", "transposed", "image", "every_other_column"),
    dtype={dtype_id(dtype): dtype for dtype in DTYPES},
    keep=lambda case, rows, layout, dtype: (
        not (case.interpreted or case.emulated)
        or dtype == torch.float32
        or (rows is ROWS["offset"] and layout == "image")
    ),
    shared=("rows", "layout", "dtype"),
)
def test_against_extended_precision(
    case: Case, rows: Callable[[Draw], Logits], layout: str, dtype: torch.dtype
) -> None:
    classes = 21 if case.interpreted else 203
    draw = Draw(LAYOUT_ROWS, classes, torch.Generator().manual_seed(classes))
    # A deviation of 0 makes gradients of 1e7 / temperature, which float16 cannot hold.
    weight = 1e-4 if rows is ROWS["constant_student"] else 1.0
    _compare(case, draw, rows(draw), layout, dtype, weight)


@each(
    STANDARDIZABLE,
    number=(-3.7, 0.1, 1234.567),
    layout=("contiguous", "transposed"),
    shared=("number", "layout"),
)
def test_constant_rows_of_many_lengths(case: Case, number: float, layout: str) -> None:
    """A sum over the classes, divided by their number, is the constant for some numbers only."""
    for classes in case.pick((47, 55, 56, 60, 61, 63, 100, 333, 1000), (7, 47)):
        draw = Draw(LAYOUT_ROWS, classes, torch.Generator().manual_seed(classes))
        constant = torch.full((LAYOUT_ROWS, classes), number, dtype=torch.float64)
        _compare(case, draw, (constant, draw.normal(2.0)), layout, torch.float32, 1.0)


def _compare(
    case: Case, draw: Draw, logits: Logits, layout: str, dtype: torch.dtype, weight: float
) -> None:
    student, teacher = (LAYOUTS[layout](x.to(case.device, dtype)) for x in logits)
    target = draw.index().to(case.device)
    options = {"temperature": 3.0, "loss_weight": weight}
    index = target_for(student, target)
    actual = value_and_grad(case, student, teacher, index, standardize=True, **options)

    flat = as_rows(student), as_rows(teacher)
    value, gradient, size = _expected(case, *flat, target, **options)
    working = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    torch.testing.assert_close(
        actual[0].cpu().double(), value, rtol=64 * working, atol=0, check_dtype=False
    )
    error = (as_rows(actual[1]).cpu().double() - gradient).abs()
    kind = torch.finfo(dtype)
    # Triton's interpreter truncates to bfloat16, hence a whole eps.
    rounding = kind.eps * (gradient.abs() + kind.smallest_normal)
    excess = (error - rounding) / (working * size)
    assert excess.max() <= 24, f"{excess.max():.1f} rounding errors"


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=dtype_id)
@pytest.mark.parametrize("name", ROWS)
def test_channels_against_extended_precision(
    name: str, dtype: torch.dtype, backend: str | None
) -> None:
    """PKD: half the mean of (z_S - z_T)^2, z the standardised values of a channel."""
    draw = Draw(6, 4 * 5 * 7, torch.Generator().manual_seed(3))
    student, teacher = (
        x.to(dtype).view(6, 4, 5, 7).transpose(0, 1).contiguous() for x in ROWS[name](draw)
    )
    (d, deviation), (d_teacher, deviation_teacher) = (
        _deviations(x.transpose(0, 1).flatten(1)) for x in (student, teacher)
    )
    spread = deviation + 1e-6
    gap = d / spread - d_teacher / (deviation_teacher + 1e-6)
    g = gap / gap.size
    slope = d / (np.where(deviation > 0, deviation, 1) * (d.shape[1] - 1))
    gradient = (g - g.mean(1, keepdims=True)) / spread
    gradient -= (g * d).sum(1, keepdims=True) / spread**2 * slope

    loss, actual = value_and_grad(pkd_loss, student, teacher, backend=backend)
    eps = torch.finfo(dtype).eps
    assert abs(loss.item() / float((gap**2).mean() / 2) - 1) <= 24 * eps
    error = np.abs(actual.transpose(0, 1).flatten(1).numpy().astype(np.longdouble) - gradient)
    assert (error <= 24 * eps * np.abs(g / spread).max(1, keepdims=True)).all()

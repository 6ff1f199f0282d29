"""Value and gradient of every loss and backend against the float64 reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import (
    LOSSES,
    Case,
    at_temperature,
    each_emulated as each,
    each_sample_emulated as each_sample,
    reductions,
)
from inputs import DTYPE_PAIRS, FAMILIES, dtype_id, make
from layouts import LAYOUT_PAIRS, LAYOUT_ROWS, LAYOUTS, target_for
from oracle import verify

DTYPES = {dtype_id(pair): pair for pair in DTYPE_PAIRS}
INTERPRETED_DTYPES = (DTYPES["float32-float32"], DTYPES["bfloat16-float32"])
TEACHER_LACKS = ("mask_teacher", "mask_different", "mask_target", "mask_rest_teacher")
"""Families in which some losses are infinite, without a gradient: ``test_contract.py``."""


@each(
    kernels=True,
    family=FAMILIES,
    dtypes=DTYPES,
    keep=lambda case, family, dtypes: (
        (not case.interpreted or dtypes in INTERPRETED_DTYPES)
        and not (case.spec.needs_teacher_mass and family.__name__ in TEACHER_LACKS)
    ),
)
def test_families(case: Case, family: Any, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    inputs = make(
        family.__name__,
        *case.pick((7, 67), (3, 21)),
        dtype=dtypes[0],
        teacher_dtype=dtypes[1],
        device=case.device,
    )
    for reduction in reductions(case.spec):
        verify(case, *inputs, reduction=reduction, **at_temperature(case.spec, 1.0))


@each(
    layouts={"-".join(pair): pair for pair in LAYOUT_PAIRS},
    dtype={dtype_id(d): d for d in (torch.float32, torch.bfloat16)},
    keep=lambda case, layouts, dtype: not case.interpreted or dtype == torch.float32,
)
def test_layouts(case: Case, layouts: tuple[str, str], dtype: torch.dtype) -> None:
    student, teacher, target = make(
        "gaussian", LAYOUT_ROWS, case.pick(67, 9), dtype=dtype, device=case.device
    )
    student, teacher = (
        LAYOUTS[name](x) for name, x in zip(layouts, (student, teacher), strict=True)
    )
    for reduction in reductions(case.spec):
        verify(case, student, teacher, target_for(student, target), reduction=reduction)


@each_sample(kernels=True)
@pytest.mark.parametrize(
    "family", ["gaussian", "peaked", "disagreeing", "mask_target", "mask_target_same"]
)
def test_samples(case: Case, options: dict[str, Any], family: str) -> None:
    """The options of the registry, and a temperature whose division rounds."""
    most = case.spec.domains.get("beta", (0.0, None))[1]
    if family in TEACHER_LACKS and (case.spec.needs_teacher_mass or options.get("beta") == most):
        pytest.skip("the loss is infinite, without a gradient")
    inputs = make(family, *case.pick((5, 130), (3, 21)), device=case.device)
    for reduction in reductions(case.spec):
        verify(case, *inputs, reduction=reduction, **options)
        verify(case, *inputs, reduction=reduction, **{**options, **at_temperature(case.spec, 3.0)})


SIZES = (
    (1, 2), (3, 2), (2, 2), (1, 7), (5, 8), (3, 16), (2, 31), (2, 32), (2, 33), (1, 64),
    (4, 127), (3, 255), (2, 256), (65, 257), (3, 1000), (17, 1024), (2, 2049), (2, 8191),
    (1, 32771), (2, 70001), (513, 5),
)  # fmt: skip
"""Rows and classes: every remainder of a vector, both sides of a block, many blocks."""


@each(
    kernels=True,
    size={f"{rows}x{classes}": (rows, classes) for rows, classes in SIZES},
    dtype={dtype_id(d): d for d in (torch.float32, torch.float16)},
    keep=lambda case, size, dtype: (
        not case.interpreted or (dtype == torch.float32 and size[0] <= 5 and size[1] <= 300)
    ),
)
def test_sizes(case: Case, size: tuple[int, int], dtype: torch.dtype) -> None:
    inputs = make("gaussian", *size, dtype=dtype, device=case.device)
    for reduction in reductions(case.spec):
        verify(case, *inputs, reduction=reduction)


@each([s for s in LOSSES if s.takes_target], index_dtype=("int64", "int32", "int16", "uint8"))
def test_target_dtypes_and_strides(case: Case, index_dtype: str) -> None:
    """Ignored and used rows alike, whatever integers hold the target and however they lie."""
    student, teacher, target = make("gaussian", 8, 9, device=case.device)
    target[2] = target[5] = 100
    narrow = target.to(getattr(torch, index_dtype))
    strided = torch.stack([narrow, narrow + 1], 1)[:, 0]
    assert not strided.is_contiguous()
    for reduction in reductions(case.spec):
        options = {"reduction": reduction, "ignore_index": 100}
        expected = verify(case, student, teacher, **options, target=target)
        for index in (narrow, strided):
            actual = verify(case, student, teacher, **options, target=index)
            assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))

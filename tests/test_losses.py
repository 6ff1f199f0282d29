"""Value and gradient of every loss and backend against the float64 reference."""

from __future__ import annotations

from typing import Any

import torch
from cases import (
    LOSSES,
    ROW_LOSSES,
    Case,
    at_temperature,
    each_emulated as each,
    each_sample_emulated as each_sample,
    passes,
)
from inputs import DTYPE_PAIRS, FAMILIES, dtype_id, make
from layouts import LAYOUT_PAIRS, LAYOUT_ROWS, LAYOUTS, target_for
from oracle import verify

DTYPES = {dtype_id(pair): pair for pair in DTYPE_PAIRS}
OWN_DTYPES = {name: DTYPES[name] for name in ("float64-float64", "float32-float32")}
"""What a rule computes in; the others are a matter of loads and stores."""
OTHER_DTYPES = {name: pair for name, pair in DTYPES.items() if name != "float32-float32"}
TEACHER_LACKS = ("mask_teacher", "mask_different", "mask_target", "mask_rest_teacher")
"""Families in which some losses are infinite, without a gradient: ``test_contract.py``."""


ONE_CLASS_LEFT = ("mask_all_but_one", "mask_rest_student")
"""Families in which a row of sigmoids is but scaled, which no correlation sees: the gradient is 0,
as is its sensitivity, so that there is no size to measure its rounding errors by."""


def _of_sigmoids(case: Case) -> bool:
    return case.spec.family == "correlation" and case.spec.activation == "sigmoid"


def _has_gradient(case: Case, family: Any) -> bool:
    lacks = case.spec.needs_teacher_mass and family.__name__ in TEACHER_LACKS
    return not lacks and not (_of_sigmoids(case) and family.__name__ in ONE_CLASS_LEFT)


@each(
    kernels=True,
    family=FAMILIES,
    dtypes=OWN_DTYPES,
    keep=lambda case, family, dtypes: (
        (dtypes[0] == torch.float32 or not (case.interpreted or case.emulated))
        and _has_gradient(case, family)
        and not (case.interpreted and case.spec.by_row)
    ),
)
def test_families(case: Case, family: Any, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    _verify_family(case, family, dtypes)


@each(ROW_LOSSES, kernels=True, keep=lambda case: case.interpreted)
def test_families_together(case: Case) -> None:
    """Interpreted, where a launch costs more than its rows: all families in one batch."""
    parts = [make(name, 3, 21) for name, made in FAMILIES.items() if _has_gradient(case, made)]
    inputs = [torch.cat(tensors) for tensors in zip(*parts, strict=True)]
    options = at_temperature(case.spec, 1.0)
    loss, _ = verify(case, *inputs, reduction="none", **options)
    verify(case, *(x[loss.isfinite()] for x in inputs), reduction="mean", **options)


def _other_dtypes_here(case: Case, family: Any, dtypes: tuple[torch.dtype, torch.dtype]) -> bool:
    """Where kernels are slow, one other pair of dtypes for each family of inputs."""
    if case.interpreted:
        # The interpreter cuts bfloat16 off, which shows where a row's gradients have one sign.
        half = "float16-float16" if case.spec.family == "binary" else "bfloat16-float32"
        here = dtypes == DTYPES[half]
    elif case.emulated:
        others = list(OTHER_DTYPES.values())
        here = dtypes == others[list(FAMILIES.values()).index(family) % len(others)]
    else:
        here = dtypes not in OWN_DTYPES.values()
    return here and _has_gradient(case, family)


@each(
    kernels=True,
    family=FAMILIES,
    dtypes=OTHER_DTYPES,
    keep=_other_dtypes_here,
    shared=("family", "dtypes"),
)
def test_families_in_other_dtypes(
    case: Case, family: Any, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    _verify_family(case, family, dtypes)


def _verify_family(case: Case, family: Any, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    inputs = make(
        family.__name__,
        *case.pick((7, 67), (3, 21)),
        dtype=dtypes[0],
        teacher_dtype=dtypes[1],
        device=case.device,
    )
    for reduction in passes(case.spec):
        verify(case, *inputs, reduction=reduction, **at_temperature(case.spec, 1.0))


@each(
    layouts={"-".join(pair): pair for pair in LAYOUT_PAIRS},
    dtype={dtype_id(d): d for d in (torch.float32, torch.bfloat16)},
    keep=lambda case, layouts, dtype: not case.interpreted or dtype == torch.float32,
    shared=("layouts", "dtype"),
)
def test_layouts(case: Case, layouts: tuple[str, str], dtype: torch.dtype) -> None:
    student, teacher, target = make(
        "gaussian", LAYOUT_ROWS, case.pick(67, 9), dtype=dtype, device=case.device
    )
    student, teacher = (
        LAYOUTS[name](x) for name, x in zip(layouts, (student, teacher), strict=True)
    )
    for reduction in passes(case.spec):
        verify(case, student, teacher, target_for(student, target), reduction=reduction)


SAMPLE_FAMILIES = ("gaussian", "peaked", "disagreeing", "mask_target", "mask_target_same")


def _samples_here(case: Case, sample: int, family: str) -> bool:
    """Where the loss is finite; interpreted, one family each in turn, from the ordinary one.

    An option that is 0 is a weight or an exponent, which must not make NaN of what is infinite in
    a class that is excluded: it meets the masks everywhere.
    """
    options = case.spec.samples[sample]
    infinite = case.spec.needs_teacher_mass or (
        options.get("beta") == case.spec.domains.get("beta", (0.0, None))[1]
    )
    finite = [f for f in SAMPLE_FAMILIES if not (infinite and f in TEACHER_LACKS)]
    if family not in finite:
        return False
    if family.startswith("mask") and 0.0 in options.values():
        return True
    return not case.interpreted or family == finite[sample % len(finite)]


@each_sample(kernels=True, keep=_samples_here, family=SAMPLE_FAMILIES)
def test_samples(case: Case, options: dict[str, Any], family: str) -> None:
    """The options of the registry, and a temperature whose division rounds."""
    inputs = make(family, *case.pick((5, 130), (3, 21)), device=case.device)
    for reduction in passes(case.spec):
        verify(case, *inputs, reduction=reduction, **options)
    verify(case, *inputs, reduction="sum", **{**options, **at_temperature(case.spec, 3.0)})


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
    shared=("size", "dtype"),
)
def test_sizes(case: Case, size: tuple[int, int], dtype: torch.dtype) -> None:
    rows, classes = size
    if _of_sigmoids(case) and rows == 2:  # likewise: columns of two correlate by 1 or -1
        rows = 3
    inputs = make("gaussian", rows, classes, dtype=dtype, device=case.device)
    for reduction in passes(case.spec):
        verify(case, *inputs, reduction=reduction)


@each(
    [s for s in LOSSES if s.takes_target],
    index_dtype=("int64", "int32", "int16", "uint8"),
    keep=lambda case, _: case.masks,
    shared=("index_dtype",),
)
def test_target_dtypes_and_strides(case: Case, index_dtype: str) -> None:
    """Ignored and used rows alike, whatever integers hold the target and however they lie."""
    student, teacher, target = make("gaussian", 8, 9, device=case.device)
    target[2] = target[5] = 100
    narrow = target.to(getattr(torch, index_dtype))
    strided = torch.stack([narrow, narrow + 1], 1)[:, 0]
    assert not strided.is_contiguous()
    for reduction in passes(case.spec):
        options = {"reduction": reduction, "ignore_index": 100}
        expected = verify(case, student, teacher, **options, target=target)
        for index in (narrow, strided):
            actual = verify(case, student, teacher, **options, target=index)
            assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))

"""Families of logits that have broken kernels.

A family makes ``(student, teacher)`` of shape (rows, classes), float64, to be rounded to the dtype
under test, around a target for each row. How they lie in memory is in ``layouts.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

INF = float("inf")
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
DTYPE_PAIRS = (
    *((dtype, dtype) for dtype in DTYPES),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.float64),
    (torch.float32, torch.float16),
    (torch.float16, torch.float64),
)
"""Dtypes of student and teacher."""


def dtype_id(value: object) -> str:
    names = value if isinstance(value, tuple) else (value,)
    return "-".join(str(name).removeprefix("torch.") for name in names)


@dataclass
class Draw:
    """Random numbers for one input."""

    rows: int
    classes: int
    generator: torch.Generator

    def normal(self, scale: float = 1.0) -> Tensor:
        shape = (self.rows, self.classes)
        return scale * torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def index(self) -> Tensor:
        return torch.randint(self.classes, (self.rows,), generator=self.generator)

    def peak(self, index: Tensor, height: float) -> Tensor:
        """Noise with one class of each row raised by ``height``."""
        return self.normal(0.1).scatter_add(
            1, index.unsqueeze(1), torch.full((self.rows, 1), height, dtype=torch.float64)
        )


Logits = tuple[Tensor, Tensor]
FAMILIES: dict[str, Callable[[Draw, Tensor], Logits]] = {}


def _family(function: Callable[[Draw, Tensor], Logits]) -> Callable[[Draw, Tensor], Logits]:
    FAMILIES[function.__name__] = function
    return function


@_family
def gaussian(draw: Draw, target: Tensor) -> Logits:
    return draw.normal(3.0), draw.normal(3.0)


@_family
def peaked(draw: Draw, target: Tensor) -> Logits:
    """Teacher certain of the target, p = 1 - 1e-7, student nearly so."""
    height = 16.0 + torch.log(torch.tensor(float(draw.classes))).item()
    return draw.peak(target, height - 2.0), draw.peak(target, height)


@_family
def disagreeing(draw: Draw, target: Tensor) -> Logits:
    """Both certain, of different classes."""
    return draw.peak((target + 1) % draw.classes, 16.0), draw.peak(target, 16.0)


@_family
def equal(draw: Draw, target: Tensor) -> Logits:
    student = draw.normal(3.0)
    return student, student.clone()


@_family
def nearly_equal(draw: Draw, target: Tensor) -> Logits:
    """KL about 1e-6."""
    student = draw.normal(2.0)
    return student, student + draw.normal(1.5e-3)


@_family
def close(draw: Draw, target: Tensor) -> Logits:
    """Log-probabilities some 0.2 apart, where every term of a series counts."""
    student = draw.normal(2.0)
    return student, student + 0.2 * draw.normal().clamp(-2, 2)


@_family
def offset(draw: Draw, target: Tensor) -> Logits:
    return draw.normal(2.0) + 1000.0, draw.normal(2.0) - 1000.0


@_family
def gap(draw: Draw, target: Tensor) -> Logits:
    """One class 200 above the others: q underflows to 0 in float32, log q does not."""
    return draw.peak(target, 200.0), draw.peak((target + 1) % draw.classes, 200.0)


@_family
def huge(draw: Draw, target: Tensor) -> Logits:
    return draw.normal(1e4), draw.normal(1e4)


@_family
def ties(draw: Draw, target: Tensor) -> Logits:
    """Small whole numbers: equal maxima, equal logits."""
    return draw.normal(1.0).round(), draw.normal(1.0).round()


@_family
def one_hot(draw: Draw, target: Tensor) -> Logits:
    return draw.peak(target, 104.0), draw.peak(target, 120.0)


@_family
def constant_rows(draw: Draw, target: Tensor) -> Logits:
    """Uniform student (a head that starts at zero), every other teacher row uniform too."""
    teacher = draw.normal(2.0)
    teacher[::2] = 0.5
    return torch.zeros_like(teacher), teacher


def _masked(values: Tensor, mask: Tensor) -> Tensor:
    return values.masked_fill(mask, -INF)


def _classes(draw: Draw) -> Tensor:
    return torch.arange(draw.classes).expand(draw.rows, -1)


@_family
def mask_same(draw: Draw, target: Tensor) -> Logits:
    """The class after the target is impossible for both."""
    mask = _classes(draw) == (target.unsqueeze(1) + 1) % draw.classes
    return _masked(draw.normal(3.0), mask), _masked(draw.normal(3.0), mask)


@_family
def mask_teacher(draw: Draw, target: Tensor) -> Logits:
    mask = (_classes(draw) - target.unsqueeze(1)) % 3 == 1
    return draw.normal(3.0), _masked(draw.normal(3.0), mask)


@_family
def mask_different(draw: Draw, target: Tensor) -> Logits:
    """A class impossible for the student only: KL is +inf, gradients are finite."""
    shift = (_classes(draw) - target.unsqueeze(1)) % draw.classes
    return _masked(draw.normal(3.0), shift == 1), _masked(draw.normal(3.0), shift == 2)


@_family
def mask_first_block(draw: Draw, target: Tensor) -> Logits:
    """A whole leading block of classes is impossible for both (not the last class)."""
    mask = _classes(draw) < draw.classes // 2
    return _masked(draw.normal(3.0), mask), _masked(draw.normal(3.0), mask)


@_family
def mask_last_block(draw: Draw, target: Tensor) -> Logits:
    mask = _classes(draw) > draw.classes // 2
    return _masked(draw.normal(3.0), mask), _masked(draw.normal(3.0), mask)


@_family
def mask_target(draw: Draw, target: Tensor) -> Logits:
    """The target is impossible for the teacher: p_t is exactly 0."""
    mask = _classes(draw) == target.unsqueeze(1)
    return draw.normal(3.0), _masked(draw.normal(3.0), mask)


@_family
def mask_target_same(draw: Draw, target: Tensor) -> Logits:
    mask = _classes(draw) == target.unsqueeze(1)
    return _masked(draw.normal(3.0), mask), _masked(draw.normal(3.0), mask)


@_family
def mask_all_but_one(draw: Draw, target: Tensor) -> Logits:
    mask = _classes(draw) != target.unsqueeze(1)
    return _masked(draw.normal(3.0), mask), _masked(draw.normal(3.0), mask)


@_family
def mask_rest_teacher(draw: Draw, target: Tensor) -> Logits:
    """The teacher leaves nothing but the target: a decoupled loss has no term of the others."""
    mask = _classes(draw) != target.unsqueeze(1)
    return draw.normal(3.0), _masked(draw.normal(3.0), mask)


@_family
def mask_rest_student(draw: Draw, target: Tensor) -> Logits:
    mask = _classes(draw) != target.unsqueeze(1)
    return _masked(draw.normal(3.0), mask), draw.normal(3.0)


def make(
    family: str,
    rows: int,
    classes: int,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    teacher_dtype: torch.dtype | None = None,
    device: str = "cpu",
) -> tuple[Tensor, Tensor, Tensor]:
    """Student, teacher and target of a family."""
    draw = Draw(rows, classes, torch.Generator().manual_seed(1000 * seed + 31 * rows + classes))
    target = draw.index()
    student, teacher = FAMILIES[family](draw, target)
    return (
        student.to(device, dtype),
        teacher.to(device, teacher_dtype or dtype),
        target.to(device),
    )

"""What each data set trains when the command line does not say: teachers, student, label splits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Teaching:
    """How a teacher is trained: always by cross-entropy, with a cosine to zero."""

    size: str
    """Channels of the first stage x blocks a stage."""
    images: int | None
    """A balanced part of the training split; None: all of it."""
    epochs: int
    lr: float
    batch: int


@dataclass(frozen=True)
class Split:
    """Which classes teacher and student know; None: all."""

    teacher: tuple[int, ...] | None
    student: tuple[int, ...] | None
    images_per_class: int | None
    """Images that a student sees; None: all."""
    batch: int
    epochs: int
    """Of the students; with few images more epochs, so that there are as many steps."""


@dataclass(frozen=True)
class Setup:
    teachers: Mapping[str, Teaching]
    """From weak to strong."""
    student: str
    lr: float
    weight_decay: float
    splits: Mapping[str, Split]
    threads: int = 1
    """Of the students: networks so small gain little from more, and a busy machine costs less;
    0: torch's choice."""
    teacher_threads: int = 1
    evaluate_every: int = 1
    """Epochs between evaluations; the last epoch is always evaluated."""
    methods: tuple[str, ...] = ("ce", "kd", "dkd", "aekt", "dist", "iekd")
    seeds: tuple[int, ...] = field(default=(0, 1, 2, 3, 4))


SETUPS = {
    # Few labels, so that a teacher has something to add, and real images on which teachers differ.
    "fashion-mnist": Setup(
        teachers={
            "weak": Teaching("8x1", 2000, epochs=10, lr=0.1, batch=128),
            "medium": Teaching("16x1", 10000, epochs=6, lr=0.1, batch=128),
            "strong": Teaching("16x2", 20000, epochs=4, lr=0.1, batch=128),
        },
        student="8x1",
        lr=0.05,
        weight_decay=5e-4,
        splits={
            "same": Split(None, None, 30, batch=50, epochs=50),
            "overlap": Split(tuple(range(7)), tuple(range(3, 10)), 10, batch=35, epochs=150),
            # Each class of the student has a relative among the teacher's.
            "disjoint": Split((0, 2, 3, 7, 8), (1, 4, 5, 6, 9), 5, batch=25, epochs=300),
        },
        teacher_threads=2,
        evaluate_every=50,  # 10000 images take as long as five epochs of training
    ),
    "digits": Setup(
        teachers={
            "weak": Teaching("8x1", 200, epochs=20, lr=0.05, batch=50),
            "medium": Teaching("16x1", None, epochs=20, lr=0.05, batch=50),
            "strong": Teaching("16x2", None, epochs=40, lr=0.05, batch=50),
        },
        student="4x1",
        lr=0.05,
        weight_decay=5e-4,
        splits={
            "same": Split(None, None, 20, batch=50, epochs=80),
            "overlap": Split(tuple(range(7)), tuple(range(3, 10)), 10, batch=35, epochs=160),
            "disjoint": Split(tuple(range(5)), tuple(range(5, 10)), 20, batch=50, epochs=160),
        },
    ),
    "cifar100": Setup(
        teachers={
            "weak": Teaching("16x2", None, epochs=240, lr=0.05, batch=64),
            "medium": Teaching("32x2", None, epochs=240, lr=0.05, batch=64),
            "strong": Teaching("64x3", None, epochs=240, lr=0.05, batch=64),
        },
        student="16x2",
        lr=0.05,
        weight_decay=5e-4,
        splits={
            "same": Split(None, None, None, batch=64, epochs=240),
            "overlap": Split(tuple(range(70)), tuple(range(30, 100)), None, batch=64, epochs=240),
            "disjoint": Split(tuple(range(50)), tuple(range(50, 100)), None, batch=64, epochs=240),
        },
        threads=0,
        teacher_threads=0,
    ),
}

"""What the command lines of the trainers have in common."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch

T = TypeVar("T")


def checked(parse: Callable[[str], T]) -> Callable[[str], str]:
    """For argparse: the text itself, once ``parse`` takes it, or what ``parse`` says against it."""

    def check(text: str) -> str:
        try:
            parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        return text

    return check


def positive(text: str) -> int:
    return _whole(text, 1)


def natural(text: str) -> int:
    return _whole(text, 0)


def _whole(text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"it must be a whole number from {least} on, got {text}")
    return int(text)


def share(text: str) -> float:
    """In (0, 1]."""
    return _number(text, "in (0, 1]", lambda x: 0 < x <= 1)


def dropped(text: str) -> float:
    """In [0, 1)."""
    return _number(text, "in [0, 1)", lambda x: 0 <= x < 1)


def rate(text: str) -> float:
    return _number(text, "above 0", lambda x: 0 < x < math.inf)


def decay(text: str) -> float:
    return _number(text, "from 0 on", lambda x: 0 <= x < math.inf)


def _number(text: str, expected: str, fits: Callable[[float], bool]) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not fits(number):
        raise argparse.ArgumentTypeError(f"it must be a number {expected}, got {text}")
    return number


def assignment(text: str, name: str, known: Iterable[str]) -> tuple[str, float]:
    """``OPTION=VALUE`` of the method ``name``, which has the options ``known``."""
    option, equals, value = text.partition("=")
    if option not in known or not equals:
        raise ValueError(
            f"an option of {name} must be NAME=VALUE with a name among "
            f"{', '.join(known)}, got {text}"
        )
    try:
        return option, float(value)
    except ValueError:
        raise ValueError(f"{name}'s {option} must be a number, got {value}") from None


def threads(count: int) -> None:
    """CPU threads, no more than there are; 0: as torch has it."""
    if count:
        torch.set_num_threads(min(count, os.cpu_count() or count))

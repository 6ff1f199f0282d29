"""What the command lines of the trainers have in common."""

from __future__ import annotations

import argparse
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

"""The losses as functions, ``kdkernels.functional.kd_loss`` and so on: one a registry row."""

from .losses import *  # noqa: F403
from .registry import SPECS

__all__ = sorted(spec.function.__name__ for spec in SPECS.values())

"""The losses as functions, ``kdkernels.functional.kd_loss`` and so on: one a registry row, and
those of an output layer."""

from .linear import linear_kd_loss as linear_kd_loss, linear_logprob as linear_logprob
from .losses import *  # noqa: F403
from .registry import SPECS

_OF_HEADS = ["linear_kd_loss", "linear_logprob"]
__all__ = sorted([*(spec.function.__name__ for spec in SPECS.values()), *_OF_HEADS])

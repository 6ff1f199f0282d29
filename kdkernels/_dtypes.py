"""Which dtypes losses take, in which they compute, and the constants that belong to a dtype."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})
INTEGERS = frozenset({torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8})
STANDARDIZE_EPS = 1e-7
"""Added to the standard deviation of a row, as in the published logit standardisation."""


def working_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any input is, else float32; the dtype of sums and of the loss."""
    for tensor in tensors:
        if tensor.dtype == torch.float64:
            return torch.float64
    return torch.float32

"""FitNets hint (Romero et al., ICLR 2015; 1412.6550): the specification.

    loss = mean over all elements of (S - T)^2      ('sum': the sum)

S is the regressor's output, of the teacher's shape.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def hint(student: Tensor, teacher: Tensor, *, reduction: str = "mean") -> Tensor:
    """Two tensors of one shape -> scalar."""
    total = F.mse_loss(student, teacher, reduction="sum")
    return total if reduction == "sum" else total / max(student.numel(), 1)

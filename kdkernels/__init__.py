"""kdkernels: fused knowledge-distillation losses for PyTorch.

    from kdkernels import DISTLoss
    loss = task_loss + 2.0 * DISTLoss()(student_logits, teacher_logits)

Importing the package initialises no CUDA, imports no Triton and compiles nothing.
"""

try:
    import torch
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    from . import _remedies

    raise ModuleNotFoundError(_remedies.torch_needed("none"), name="torch") from None
else:
    from . import _toolchain

    if _toolchain.release(torch.__version__) < _toolchain.release(_toolchain.OLDEST_TORCH):
        from . import _remedies

        raise ImportError(_remedies.torch_needed(torch.__version__))
    del torch

from . import functional as functional
from ._dispatch import available as available, use_backend as use_backend
from ._rowwise import LossParts as LossParts
from ._version import __version__ as __version__
from .linear import (
    FusedLinearKDLoss as FusedLinearKDLoss,
    LinearLogprob as LinearLogprob,
    linear_kd_loss as linear_kd_loss,
    linear_logprob as linear_logprob,
)
from .losses import *  # noqa: F403
from .losses.topk_kd import TopKMass as TopKMass
from .registry import SPECS

__all__ = [
    *sorted(spec.module.__name__ for spec in SPECS.values()),
    *functional.__all__,
    "FusedLinearKDLoss",
    "LinearLogprob",
    "LossParts",
    "TopKMass",
    "__version__",
    "available",
    "functional",
    "use_backend",
]

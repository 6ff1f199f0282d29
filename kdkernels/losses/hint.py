"""FitNets hint (Romero et al., ICLR 2015; 1412.6550)."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks, _embedding
from .._dtensor import gathered
from ..reference.hint import hint as reference
from ..registry import LossSpec, register
from ._base import LossModule, of_batch, weighed

_RANKS = {2: "(B, D)", 3: "(B, S, D)", 4: "(B, C, H, W)"}


@gathered
@weighed
def hint_loss(
    student_features: Tensor,
    teacher_features: Tensor,
    *,
    reduction: str = "mean",
    loss_weight: float = 1.0,
    backend: str | None = None,
) -> Tensor:
    r"""The student's feature, through a regressor, equal to the teacher's: the mean squared error.

    .. math:: L = \operatorname{mean} (S - T)^2

    The regressor (:class:`kdkernels.nn.HintRegressor`, a 1x1 convolution) is the caller's, because
    its parameters must be given to an optimiser. The paper has one half of the squared error's sum.

    Args:
        student_features: (B, D), tokens (B, S, D) or (B, C, H, W), after the regressor; float64,
            float32, float16 or bfloat16.
        teacher_features: same shape and device; own dtype; a constant.
        reduction: ``'mean'`` (alias ``'batchmean'``) over all elements, or ``'sum'``.
        loss_weight: multiplies the loss.
        backend: ``'reference'`` or None: composed of torch operations, no kernel of its own. Can be
            differentiated twice.

    Returns:
        0-d float32 (float64 if either input is).

    Raises:
        ValueError, TypeError: ``name must be <expected>, got <got>``.
    """
    _checks.batch_reduction(reduction)
    loss_weight = _checks.number("loss_weight", loss_weight)
    _embedding.tensor("student_features", student_features, _RANKS)
    _embedding.tensor("teacher_features", teacher_features, _RANKS)
    _embedding.like("teacher_features", teacher_features, student_features)
    _checks.constant("teacher_features", teacher_features)
    return _embedding.composed(
        HINT,
        student_features,
        teacher_features,
        reduction=reduction,
        loss_weight=loss_weight,
        backend=backend,
    )


class HintLoss(LossModule):
    """Module form of :func:`kdkernels.functional.hint_loss`; see there."""

    def forward(self, student_features: Tensor, teacher_features: Tensor) -> Tensor:
        return self._function(student_features, teacher_features, **self._held())


def _inputs(generator: torch.Generator, dtype: torch.dtype) -> tuple[Tensor, ...]:
    student = torch.randn(3, 4, 5, 5, generator=generator).to(dtype)
    return student, torch.randn(3, 4, 5, 5, generator=generator).to(dtype)


HINT = register(
    LossSpec(
        name="hint",
        checks={"reduction": of_batch},
        title="FitNet hint",
        paper="Romero et al., ICLR 2015 (1412.6550)",
        formula="mean (S − T)²",
        reduction="mean over all elements",
        eps="none needed",
        note="composed of torch operations",
        samples=({}, {"loss_weight": 0.5}),
        function=hint_loss,
        module=HintLoss,
        reference=reference,
        family="embedding",
        temperature="none",
        backends=("reference",),
        inputs=_inputs,
    )
)

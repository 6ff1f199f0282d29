"""DKD: Decoupled Knowledge Distillation (Zhao et al., CVPR 2022; 2203.08679)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from .. import _checks
from .._ensemble import TeacherLogits
from .._rowwise import RowOptions, row_loss
from ..reference.dkd import dkd as reference
from ..registry import LossSpec, register
from ._base import RowLoss, row_function

if TYPE_CHECKING:
    from typing_extensions import Unpack


@row_function(RowOptions)
def dkd_loss(
    student_logits: Tensor,
    teacher_logits: TeacherLogits,
    target: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float | Tensor = 4.0,
    *,
    labels: Tensor | None = None,
    **common: Unpack[RowOptions],
) -> Tensor:
    r"""Target-class and non-target-class knowledge distillation, weighted apart.

    With t the row's target, :math:`\hat p, \hat q` the softmax over the classes other than t:

    .. math:: L = T^2 \frac1N \sum_n \Big[
              \alpha\, \mathrm{KL}\big([p_t, 1-p_t] \,\|\, [q_t, 1-q_t]\big)
              + \beta \sum_{i \ne t} \hat p_i \log\frac{\hat p_i}{\hat q_i} \Big]

    :math:`\log(1 - q_t)` is a difference of logsumexps, so a confident student or teacher gives no
    inf or NaN where the published code does. ``KD = TCKD + (1 - p_t) NCKD``.

    In practice: beta = 8 on top of :math:`T^2 = 16` makes the first gradients about ten times those
    of cross-entropy. Warm the weight up, as the published code does, and clip; with few images
    beta = 1 is the safer choice.

    T^2 is in.

    Args:
        target: class indices, (N,), (B, S) or (N, H, W). Out of range: ValueError on the CPU; on a
            GPU, where a check would synchronise, that row is NaN. Or probabilities in the logits'
            shape (mixup, label smoothing), a constant: the loss is then its expectation over t, and
            so is the cross-entropy of ``hard_weight``. No row is ignored then.
        alpha: weight of the target-class term, >= 0.
        beta: weight of the non-target-class term, >= 0 (published: 8, 6 or 2 on CIFAR-100, 0.5 on
            ImageNet).
    """
    index, options = _checks.given(target, labels), (alpha, beta)
    return row_loss(DKD, student_logits, teacher_logits, index, options, temperature, **common)


class DKDLoss(RowLoss):
    """Module form of :func:`kdkernels.functional.dkd_loss`; see there.

    ``DKDLoss(alpha=1.0, beta=8.0, temperature=4.0)(student_logits, teacher_logits, target)``
    """


DKD = register(
    LossSpec(
        name="dkd",
        title="DKD",
        paper="Zhao et al., CVPR 2022 (2203.08679)",
        function=dkd_loss,
        module=DKDLoss,
        reference=reference,
        family="decoupled",
        formula="T² · mean [α·TCKD + β·NCKD]",
        temperature="T² in",
        reduction="mean over rows",
        eps="none needed",
        needs_target=True,
        options={"alpha": _checks.non_negative, "beta": _checks.non_negative},
        takes_target=True,
        samples=(
            {},
            {"alpha": 0.5, "beta": 2.0, "temperature": 1.0},
            {"alpha": 0.0, "loss_weight": 0.25},
            {"beta": 0.0, "temperature": 2.0},
            {"standardize": True, "temperature": 2.0},
        ),
        laws=("non_negative", "zero_iff_equal", "shift", "temperature_scaling", "masked_class"),
    )
)

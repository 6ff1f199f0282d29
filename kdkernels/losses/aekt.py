"""AEKT: Adaptive Explicit Knowledge Transfer (Park & Lee, 2024; 2409.01679), reconstructed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from .. import _checks
from .._ensemble import TeacherLogits
from .._rowwise import RowOptions, row_loss
from ..reference.aekt import aekt as reference
from ..registry import LossSpec, register
from ._base import RowLoss, row_function

if TYPE_CHECKING:
    from typing_extensions import Unpack


@row_function(RowOptions)
def aekt_loss(
    student_logits: Tensor,
    teacher_logits: TeacherLogits,
    target: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float | Tensor = 4.0,
    kappa: float = 1.0,
    ratio_max: float = 10.0,
    *,
    labels: Tensor | None = None,
    **common: Unpack[RowOptions],
) -> Tensor:
    r"""Target-class knowledge weighted by the teacher/student ratio, the rest as in DKD.

    **Reconstructed from the abstract; the paper's exact formula was not available.** With TCKD and
    NCKD as in :func:`kdkernels.functional.dkd_loss`:

    .. math:: L = T^2 \frac1N \sum_n \big[ \alpha\, w_n^\kappa\, \mathrm{TCKD}_n
              + \beta\, \mathrm{NCKD}_n \big],\qquad
              w_n = \min(p_t / q_t, \text{ratio\_max})

    w is a constant in the gradient: where the student is less sure of the target than the teacher
    (w > 1) the explicit term pulls harder, where it is surer (w < 1) it holds back less.
    ``kappa=0`` is exactly DKD. The paper keeps the logits of the distillation apart from those of
    the classification: see :class:`kdkernels.nn.TaskSerialization`.

    In practice: beta = 8 is DKD's, and needs a warm-up, clipping, or a lower value with few images,
    as there.

    T^2 is in.

    Args:
        target: class indices, (N,), (B, S) or (N, H, W). Out of range: ValueError on the CPU; on a
            GPU, where a check would synchronise, that row is NaN. Or probabilities in the logits'
            shape (mixup, label smoothing), a constant: the loss is then its expectation over t, and
            so is the cross-entropy of ``hard_weight``. No row is ignored then.
        alpha: weight of the explicit term, >= 0.
        beta: weight of the implicit term, >= 0.
        kappa: exponent of the ratio, >= 0.
        ratio_max: bound of the ratio, > 0.
    """
    index, options = _checks.given(target, labels), (alpha, beta, kappa, ratio_max)
    return row_loss(AEKT, student_logits, teacher_logits, index, options, temperature, **common)


class AEKTLoss(RowLoss):
    """Module form of :func:`kdkernels.functional.aekt_loss`; see there (reconstructed).

    ``AEKTLoss(alpha=1.0, beta=8.0, temperature=4.0, kappa=1.0, ratio_max=10.0)(student_logits,
    teacher_logits, target)``
    """


AEKT = register(
    LossSpec(
        name="aekt",
        title="AEKT",
        paper="Park & Lee, 2024 (2409.01679)",
        function=aekt_loss,
        module=AEKTLoss,
        reference=reference,
        family="decoupled",
        formula="T² · mean [α·min(p_t/q_t, r)^κ·TCKD + β·NCKD]",
        temperature="T² in",
        reduction="mean over rows",
        eps="none needed",
        needs_target=True,
        options={
            "alpha": _checks.non_negative,
            "beta": _checks.non_negative,
            "kappa": _checks.non_negative,
            "ratio_max": _checks.positive,
        },
        takes_target=True,
        constant_weight="kappa",
        note="reconstructed from the abstract; the paper's exact formula was not available",
        samples=(
            {},
            {"kappa": 0.0},
            {"alpha": 0.5, "beta": 2.0, "temperature": 1.0, "kappa": 0.5, "ratio_max": 1.5},
            {"kappa": 2.0, "loss_weight": 0.25, "ratio_max": 100.0},
            {"standardize": True, "temperature": 2.0},
        ),
        laws=("non_negative", "zero_iff_equal", "shift", "temperature_scaling", "masked_class"),
    )
)

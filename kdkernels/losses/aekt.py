"""AEKT: Adaptive Explicit Knowledge Transfer (Park & Lee, 2024; 2409.01679), reconstructed."""

from __future__ import annotations

from torch import Tensor

from .. import _checks
from .._rowwise import row_loss
from ..reference.aekt import aekt as reference
from ..registry import LossSpec, register
from ._base import RowLoss, weighed


@weighed
def aekt_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
    kappa: float = 1.0,
    ratio_max: float = 10.0,
    *,
    labels: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    loss_weight: float = 1.0,
    standardize: bool = False,
    backend: str | None = None,
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

    Args:
        student_logits: (N, C), (B, S, V) with classes last, or (N, C, H, W); float64, float32,
            float16 or bfloat16; any strides.
        teacher_logits: same shape and device; own dtype and strides; a constant.
        target: class indices, (N,), (B, S) or (N, H, W). Out of range: ValueError on the CPU; on a
            GPU, where a check would synchronise, that row is NaN.
        alpha: weight of the explicit term, >= 0.
        beta: weight of the implicit term, >= 0.
        temperature: T > 0.
        kappa: exponent of the ratio, >= 0.
        ratio_max: bound of the ratio, > 0.
        labels: another name of ``target``, for those who pass it by that keyword.
        ignore_index: rows with this target contribute exact zeros, even if they hold NaN.
        reduction: ``'mean'`` (alias ``'batchmean'``) over the rows that are not ignored, ``'sum'``,
            or ``'none'`` (one value a row).
        loss_weight: multiplies the loss inside the kernel.
        standardize: logit standardisation (Sun et al., CVPR 2024) of both inputs first.
        backend: ``'native'``, ``'triton'``, ``'reference'``; None chooses.

    Returns:
        float32 (float64 for float64 inputs); 0-d, or one value a row for ``'none'``. T^2 is in.

    Raises:
        ValueError, TypeError: ``name must be <expected>, got <got>``.
    """
    temperature = _checks.temperature(temperature)
    loss_weight = _checks.number("loss_weight", loss_weight)
    return row_loss(
        AEKT,
        student_logits,
        teacher_logits,
        _checks.given(target, labels),
        options={
            "alpha": _checks.non_negative("alpha", alpha),
            "beta": _checks.non_negative("beta", beta),
            "kappa": _checks.non_negative("kappa", kappa),
            "ratio_max": _checks.positive("ratio_max", ratio_max),
        },
        temperature=temperature,
        scale=loss_weight * temperature * temperature,
        standardize=standardize,
        ignore_index=ignore_index,
        reduction=reduction,
        backend=backend,
    )


class AEKTLoss(RowLoss):
    """Module form of :func:`kdkernels.functional.aekt_loss`; see there (reconstructed).

    ``AEKTLoss(alpha=1.0, beta=8.0, temperature=4.0, kappa=1.0, ratio_max=10.0)(student_logits,
    teacher_logits, target)``
    """

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float = 8.0,
        temperature: float = 4.0,
        kappa: float = 1.0,
        ratio_max: float = 10.0,
        *,
        ignore_index: int = -100,
        reduction: str = "mean",
        loss_weight: float = 1.0,
        standardize: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__(
            ignore_index=ignore_index,
            reduction=reduction,
            loss_weight=loss_weight,
            standardize=standardize,
            backend=backend,
        )
        self.alpha = _checks.non_negative("alpha", alpha)
        self.beta = _checks.non_negative("beta", beta)
        self.temperature = _checks.temperature(temperature)
        self.kappa = _checks.non_negative("kappa", kappa)
        self.ratio_max = _checks.positive("ratio_max", ratio_max)

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        target: Tensor | None = None,
        *,
        labels: Tensor | None = None,
    ) -> Tensor:
        return aekt_loss(
            student_logits,
            teacher_logits,
            target,
            self.alpha,
            self.beta,
            self.temperature,
            self.kappa,
            self.ratio_max,
            labels=labels,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            loss_weight=self.loss_weight,
            standardize=self.standardize,
            backend=self.backend,
        )


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

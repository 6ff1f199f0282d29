"""KD: Distilling the Knowledge in a Neural Network (Hinton, Vinyals, Dean, 2015; 1503.02531)."""

from __future__ import annotations

from torch import Tensor

from .. import _checks
from .._rowwise import row_loss
from ..reference.kd import kd as reference
from ..registry import LossSpec, register
from ._base import RowLoss, weighed


@weighed
def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 4.0,
    *,
    target: Tensor | None = None,
    labels: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    loss_weight: float = 1.0,
    standardize: bool = False,
    backend: str | None = None,
) -> Tensor:
    r"""Temperature-scaled Kullback-Leibler divergence from teacher to student.

    Equal to, without any copy of the logits::

        F.kl_div(F.log_softmax(student_logits / T, -1), F.log_softmax(teacher_logits / T, -1),
                 reduction="batchmean", log_target=True) * T * T

    .. math:: L = T^2 \frac1N \sum_n \sum_c p_{nc} \log\frac{p_{nc}}{q_{nc}},\qquad
              \frac{\partial L}{\partial z_{nc}} = \frac TN (q_{nc} - p_{nc})

    Args:
        student_logits: (N, C), (B, S, V) with classes last, or (N, C, H, W); float64, float32,
            float16 or bfloat16; any strides.
        teacher_logits: same shape and device; own dtype and strides; a constant.
        temperature: T > 0, in units of the logits.
        target: optional class indices, (N,), (B, S) or (N, H, W); used only as a mask.
        labels: another name of ``target``, for those who pass it by that keyword.
        ignore_index: rows with this target contribute exact zeros, even if they hold NaN.
        reduction: ``'mean'`` (alias ``'batchmean'``) over the rows that are not ignored, ``'sum'``,
            or ``'none'`` (one value a row). Never over classes.
        loss_weight: multiplies the loss inside the kernel.
        standardize: logit standardisation (Sun et al., CVPR 2024): each row of both inputs is
            ``(x - mean) / (std + 1e-7)`` first.
        backend: ``'native'``, ``'triton'``, ``'reference'``; None chooses.

    Returns:
        float32 (float64 for float64 inputs); 0-d, or one value a row for ``'none'``. T^2 is in.

    Raises:
        ValueError, TypeError: ``name must be <expected>, got <got>``.
    """
    temperature = _checks.temperature(temperature)
    loss_weight = _checks.number("loss_weight", loss_weight)
    return row_loss(
        KD,
        student_logits,
        teacher_logits,
        _checks.given(target, labels),
        options={},
        temperature=temperature,
        scale=loss_weight * temperature * temperature,
        standardize=standardize,
        ignore_index=ignore_index,
        reduction=reduction,
        backend=backend,
    )


class KDLoss(RowLoss):
    """Module form of :func:`kdkernels.functional.kd_loss`; see there.

    ``KDLoss(temperature=4.0)(student_logits, teacher_logits)``; a third argument ``target`` masks
    the rows whose class index is ``ignore_index``.
    """

    def __init__(
        self,
        temperature: float = 4.0,
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
        self.temperature = _checks.temperature(temperature)

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        target: Tensor | None = None,
        *,
        labels: Tensor | None = None,
    ) -> Tensor:
        return kd_loss(
            student_logits,
            teacher_logits,
            self.temperature,
            target=target,
            labels=labels,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            loss_weight=self.loss_weight,
            standardize=self.standardize,
            backend=self.backend,
        )


KD = register(
    LossSpec(
        name="kd",
        title="KD",
        paper="Hinton et al., 2015 (1503.02531)",
        function=kd_loss,
        module=KDLoss,
        reference=reference,
        family="divergence",
        formula="T² · mean KL(p‖q)",
        temperature="T² in",
        reduction="mean over rows",
        eps="none needed",
        takes_target=True,
        samples=(
            {},
            {"temperature": 1.0},
            {"temperature": 0.5, "loss_weight": 0.25},
            {"standardize": True, "temperature": 2.0},
        ),
        laws=("non_negative", "zero_iff_equal", "shift", "temperature_scaling", "masked_class"),
    )
)

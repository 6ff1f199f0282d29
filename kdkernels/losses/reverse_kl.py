"""Reverse KL of token distributions (MiniLLM, GKD, TRL)."""

from __future__ import annotations

from torch import Tensor

from .. import _checks
from .._rowwise import row_loss
from ..reference.reverse_kl import reverse_kl as reference
from ..registry import LossSpec, register
from ._base import TokenLoss, weighed


@weighed
def reverse_kl_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    temperature: float = 1.0,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    loss_weight: float = 1.0,
    backend: str | None = None,
) -> Tensor:
    r"""Kullback-Leibler divergence from student to teacher, which seeks the teacher's modes.

    .. math:: L = \frac1N \sum_n \sum_c q_{nc} \log\frac{q_{nc}}{p_{nc}},\qquad
              \frac{\partial L}{\partial z_{nc}} = \frac1{TN} q_{nc}
              \Bigl(\log\frac{q_{nc}}{p_{nc}} - L_n\Bigr)

    with p and q the softmaxes of both inputs over T. **There is no T^2**, as in the trainers of
    language models: multiply by it, or pass it as ``loss_weight``, where gradients of different
    temperatures are to be of one size.

    A class that both exclude with -inf costs nothing, nor do probabilities that underflow. One that
    only the teacher excludes makes the loss infinite, and the gradient is not finite.

    Args:
        student_logits: (N, C), (B, S, V) with classes last, or (N, C, H, W); float64, float32,
            float16 or bfloat16; any strides.
        teacher_logits: same shape and device; own dtype and strides; a constant.
        labels: optional class indices, (N,), (B, S) or (N, H, W); used only as a mask.
        temperature: T > 0, in units of the logits.
        ignore_index: rows with this label contribute exact zeros, even if they hold NaN.
        reduction: ``'mean'`` (alias ``'batchmean'``) over the rows that are not ignored, ``'sum'``,
            or ``'none'`` (one value a row). Never over classes.
        loss_weight: multiplies the loss inside the kernel.
        backend: ``'native'``, ``'triton'``, ``'reference'``; None chooses.

    Returns:
        float32 (float64 for float64 inputs); 0-d, or one value a row for ``'none'``. T^2 is not in.

    Raises:
        ValueError, TypeError: ``name must be <expected>, got <got>``.
    """
    return row_loss(
        REVERSE_KL,
        student_logits,
        teacher_logits,
        labels,
        options={},
        temperature=_checks.temperature(temperature),
        scale=_checks.number("loss_weight", loss_weight),
        standardize=False,
        ignore_index=ignore_index,
        reduction=reduction,
        backend=backend,
        target_name="labels",
    )


class ReverseKLLoss(TokenLoss):
    """Module form of :func:`kdkernels.functional.reverse_kl_loss`; see there.

    ``ReverseKLLoss()(student_logits, teacher_logits, labels)``; ``labels`` masks the rows whose
    class index is ``ignore_index``, and may be left out.
    """

    def __init__(
        self,
        temperature: float = 1.0,
        *,
        ignore_index: int = -100,
        reduction: str = "mean",
        loss_weight: float = 1.0,
        backend: str | None = None,
    ) -> None:
        super().__init__(
            ignore_index=ignore_index,
            reduction=reduction,
            loss_weight=loss_weight,
            backend=backend,
        )
        self.temperature = _checks.temperature(temperature)

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None = None
    ) -> Tensor:
        return reverse_kl_loss(
            student_logits,
            teacher_logits,
            labels,
            self.temperature,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            loss_weight=self.loss_weight,
            backend=self.backend,
        )


REVERSE_KL = register(
    LossSpec(
        name="reverse_kl",
        title="Reverse KL",
        paper="Gu et al., 2024 (2306.08543)",
        function=reverse_kl_loss,
        module=ReverseKLLoss,
        reference=reference,
        family="divergence",
        formula="mean KL(q‖p)",
        temperature="T² out",
        reduction="mean over rows",
        eps="none needed",
        takes_target=True,
        target_name="labels",
        t_squared=False,
        needs_teacher_mass=True,
        samples=({}, {"temperature": 2.0}, {"temperature": 0.5, "loss_weight": 0.25}),
        laws=("non_negative", "zero_iff_equal", "shift", "temperature_scaling", "masked_class"),
    )
)

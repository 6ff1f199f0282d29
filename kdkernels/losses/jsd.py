"""Generalised Jensen-Shannon divergence (GKD: Agarwal et al., 2024; 2306.13649)."""

from __future__ import annotations

from torch import Tensor

from .. import _checks
from .._rowwise import row_loss
from ..reference.jsd import jsd as reference
from ..registry import LossSpec, register
from ._base import TokenLoss, weighed
from .kd import KD
from .reverse_kl import REVERSE_KL


@weighed
def jsd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    loss_weight: float = 1.0,
    backend: str | None = None,
) -> Tensor:
    r"""Generalised Jensen-Shannon divergence, between KL (``beta=0``) and reverse KL (``beta=1``).

    .. math:: L = \frac1N \sum_n \beta\,\mathrm{KL}(p_n \| m_n)
              + (1 - \beta)\,\mathrm{KL}(q_n \| m_n),\qquad m = \beta p + (1 - \beta) q

    .. math:: \frac{\partial L}{\partial z_{nc}} = \frac{1 - \beta}{TN} q_{nc} \Bigl(
              \log\frac{q_{nc}}{m_{nc}} - \sum_k q_{nk} \log\frac{q_{nk}}{m_{nk}} \Bigr)

    with p and q the softmaxes of both inputs over T. As in TRL, ``beta=0`` is KL(p || q) and
    ``beta=1`` is KL(q || p). They are not the limits of the formula, which tends to 0 at both ends:
    L / beta tends to KL(p || q), and L / (1 - beta) to KL(q || p). **There is no T^2**, as in the
    trainers of language models.

    Between the ends the loss is finite whatever either side excludes, log 2 at most.

    Args:
        student_logits: (N, C), (B, S, V) with classes last, or (N, C, H, W); float64, float32,
            float16 or bfloat16; any strides.
        teacher_logits: same shape and device; own dtype and strides; a constant.
        labels: optional class indices, (N,), (B, S) or (N, H, W); used only as a mask.
        beta: the teacher's weight in the mixture, in [0, 1].
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
    beta = _checks.fraction("beta", beta)
    spec, options = JSD, {"beta": beta}
    if beta == 0.0 or beta == 1.0:
        spec, options = (KD if beta == 0.0 else REVERSE_KL), {}
    return row_loss(
        spec,
        student_logits,
        teacher_logits,
        labels,
        options=options,
        temperature=_checks.temperature(temperature),
        scale=_checks.number("loss_weight", loss_weight),
        standardize=False,
        ignore_index=ignore_index,
        reduction=reduction,
        backend=backend,
        target_name="labels",
    )


class JSDLoss(TokenLoss):
    """Module form of :func:`kdkernels.functional.jsd_loss`; see there.

    ``JSDLoss(beta=0.5)(student_logits, teacher_logits, labels)``; ``labels`` masks the rows whose
    class index is ``ignore_index``, and may be left out.
    """

    def __init__(
        self,
        beta: float = 0.5,
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
        self.beta = _checks.fraction("beta", beta)
        self.temperature = _checks.temperature(temperature)

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None = None
    ) -> Tensor:
        return jsd_loss(
            student_logits,
            teacher_logits,
            labels,
            self.beta,
            self.temperature,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            loss_weight=self.loss_weight,
            backend=self.backend,
        )


JSD = register(
    LossSpec(
        name="jsd",
        title="JSD",
        paper="Agarwal et al., 2024 (2306.13649)",
        function=jsd_loss,
        module=JSDLoss,
        reference=reference,
        family="divergence",
        formula="mean(β·KL(p‖m) + (1−β)·KL(q‖m)), m = βp + (1−β)q; β = 0: KL(p‖q), 1: KL(q‖p)",
        temperature="T² out",
        reduction="mean over rows",
        eps="none needed",
        takes_target=True,
        target_name="labels",
        t_squared=False,
        domains={"beta": (0.0, 1.0)},
        samples=(
            {},
            {"beta": 0.1, "temperature": 2.0},
            {"beta": 0.9, "temperature": 0.5, "loss_weight": 0.25},
            {"beta": 0.0},
            {"beta": 1.0, "temperature": 2.0},
        ),
        laws=("non_negative", "zero_iff_equal", "shift", "temperature_scaling", "masked_class"),
        perturb={"beta": 0.2},
    )
)

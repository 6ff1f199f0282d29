"""The alpha-beta divergence of token distributions (ABKD: Wang et al., ICML 2025; 2505.04560)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from .. import _checks
from .._ensemble import TeacherLogits
from .._rowwise import TokenOptions, row_loss
from ..reference.alpha_beta import alpha_beta as reference
from ..registry import LossSpec, register
from ._base import TokenLoss, row_function

if TYPE_CHECKING:
    from typing_extensions import Unpack


@row_function(TokenOptions)
def alpha_beta_loss(
    student_logits: Tensor,
    teacher_logits: TeacherLogits,
    labels: Tensor | None = None,
    alpha: float = 0.2,
    beta: float = 0.7,
    temperature: float | Tensor = 1.0,
    **common: Unpack[TokenOptions],
) -> Tensor:
    r"""A family between KL (``alpha=1, beta=0``) and reverse KL (``alpha=0, beta=1``).

    .. math:: L = \frac1N \sum_n \sum_c \frac1{\alpha\beta} \Bigl( \frac\alpha{\alpha+\beta}
              p_{nc}^{\alpha+\beta} + \frac\beta{\alpha+\beta} q_{nc}^{\alpha+\beta}
              - p_{nc}^\alpha q_{nc}^\beta \Bigr)

    with p and q the softmaxes of teacher and student over T, and the limits where alpha or beta is
    0. Both 1/2 is four times the squared Hellinger distance, both 1 half the squared Euclidean one,
    and ``alpha + beta = 1`` are the alpha-divergences. Together they must be 1/2 at least: to a
    small power even a probability that underflows in float32 counts. **There is no T^2**, as in the
    published code.

    Args:
        alpha: exponent of the teacher's probabilities, in [0, 1]; with beta at least 0.5.
        beta: exponent of the student's, in [0, 1].
    """
    return row_loss(
        ALPHA_BETA, student_logits, teacher_logits, labels, (alpha, beta), temperature, **common
    )


def _together(alpha: float, beta: float) -> None:
    if alpha + beta < 0.5:
        raise _checks.fail("alpha + beta", "at least 0.5", alpha + beta)


class AlphaBetaLoss(TokenLoss):
    """Module form of :func:`kdkernels.functional.alpha_beta_loss`; see there.

    ``AlphaBetaLoss(alpha=0.2, beta=0.7)(student_logits, teacher_logits, labels)``;
    ``labels`` is a mask and may be left out.
    """


ALPHA_BETA = register(
    LossSpec(
        name="alpha_beta",
        title="Alpha-beta",
        paper="Wang et al., ICML 2025 (2505.04560)",
        function=alpha_beta_loss,
        module=AlphaBetaLoss,
        reference=reference,
        family="divergence",
        formula="mean 1/(αβ)·Σ[α/(α+β)·p^(α+β) + β/(α+β)·q^(α+β) − p^α·q^β]",
        temperature="T² out",
        reduction="mean over rows",
        eps="none needed",
        takes_target=True,
        target_name="labels",
        t_squared=False,
        options={"alpha": _checks.fraction, "beta": _checks.fraction},
        together=_together,
        exchanged=lambda alpha, beta: ("alpha_beta", (beta, alpha)),
        samples=(
            {},
            {"alpha": 0.5, "beta": 0.5, "temperature": 2.0},
            {"alpha": 0.8, "beta": 0.01, "temperature": 0.5, "loss_weight": 0.25},
            {"alpha": 1.0, "beta": 1.0},
        ),
        laws=("non_negative", "zero_iff_equal", "shift", "temperature_scaling", "masked_class"),
        perturb={"alpha": 0.6, "beta": 0.3},
    )
)

"""Generalised Jensen-Shannon divergence (GKD: Agarwal et al., 2024; 2306.13649)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from .. import _checks
from .._ensemble import TeacherLogits
from .._rowwise import TokenOptions, row_loss
from ..reference.mixture import jsd as reference
from ..registry import End, LossSpec, register
from ._base import TokenLoss, row_function
from .kd import KD_OF_TOKENS
from .reverse_kl import REVERSE_KL

if TYPE_CHECKING:
    from typing_extensions import Unpack


@row_function(TokenOptions)
def jsd_loss(
    student_logits: Tensor,
    teacher_logits: TeacherLogits,
    labels: Tensor | None = None,
    beta: float = 0.5,
    temperature: float | Tensor = 1.0,
    **common: Unpack[TokenOptions],
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
        beta: the teacher's weight in the mixture, in [0, 1].
    """
    return row_loss(JSD, student_logits, teacher_logits, labels, (beta,), temperature, **common)


class JSDLoss(TokenLoss):
    """Module form of :func:`kdkernels.functional.jsd_loss`; see there.

    ``JSDLoss(beta=0.5)(student_logits, teacher_logits, labels)``;
    ``labels`` is a mask and may be left out.
    """


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
        options={"beta": _checks.fraction},
        ends=((0.0, End(KD_OF_TOKENS)), (1.0, End(REVERSE_KL))),
        exchanged=lambda beta: ("jsd", (1.0 - beta,)),
        rule="mixture",
        rule_numbers=lambda beta: (beta, 1.0 - beta, beta, 1.0 - beta),
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

"""Skew KL of token distributions (DistiLLM: Ko et al., 2024; 2402.03898)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from .. import _checks
from .._ensemble import TeacherLogits
from .._rowwise import TokenOptions, row_loss
from ..reference.mixture import skew_kl as reference
from ..registry import End, LossSpec, register
from ._base import TokenLoss, row_function
from .jsd import JSD
from .kd import KD_OF_TOKENS

if TYPE_CHECKING:
    from typing_extensions import Unpack


@row_function(TokenOptions)
def skew_kl_loss(
    student_logits: Tensor,
    teacher_logits: TeacherLogits,
    labels: Tensor | None = None,
    alpha: float = 0.1,
    temperature: float | Tensor = 1.0,
    **common: Unpack[TokenOptions],
) -> Tensor:
    r"""Divergence of the teacher from a mixture of both, which is finite whatever either excludes.

    .. math:: L = \frac1N \sum_n \mathrm{KL}(p_n \| m_n),\qquad m = \alpha p + (1 - \alpha) q

    with p and q the softmaxes of teacher and student over T. ``alpha=0`` is KL(p || q) and
    ``alpha=1`` is 0. **There is no T^2**, as in the trainers of language models. The student inside
    the mixture has its gradient, as in DistiLLM.

    Args:
        alpha: the teacher's own share of the mixture, in [0, 1].
    """
    return row_loss(
        SKEW_KL, student_logits, teacher_logits, labels, (alpha,), temperature, **common
    )


class SkewKLLoss(TokenLoss):
    """Module form of :func:`kdkernels.functional.skew_kl_loss`; see there.

    ``SkewKLLoss(alpha=0.1)(student_logits, teacher_logits, labels)``;
    ``labels`` is a mask and may be left out.
    """


SKEW_KL = register(
    LossSpec(
        name="skew_kl",
        title="Skew KL",
        paper="Ko et al., 2024 (2402.03898)",
        function=skew_kl_loss,
        module=SkewKLLoss,
        reference=reference,
        family="divergence",
        formula="mean KL(p‖m), m = αp + (1−α)q",
        temperature="T² out",
        reduction="mean over rows",
        eps="none needed",
        takes_target=True,
        target_name="labels",
        t_squared=False,
        options={"alpha": _checks.fraction},
        ends=((0.0, End(KD_OF_TOKENS)), (1.0, End(JSD, (0.5,), 0.0))),
        exchanged=lambda alpha: ("skew_reverse_kl", (alpha,)),
        rule="mixture",
        rule_numbers=lambda alpha: (alpha, 1.0 - alpha, 1.0, 0.0),
        samples=(
            {},
            {"alpha": 0.5, "temperature": 2.0},
            {"alpha": 0.01, "temperature": 0.5, "loss_weight": 0.25},
            {"alpha": 0.0},
        ),
        laws=("non_negative", "zero_iff_equal", "shift", "temperature_scaling", "masked_class"),
        perturb={"alpha": 0.3},
    )
)

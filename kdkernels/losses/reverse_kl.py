"""Reverse KL of token distributions (MiniLLM, GKD, TRL)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from .._ensemble import TeacherLogits
from .._rowwise import TokenOptions, row_loss
from ..reference.reverse_kl import reverse_kl as reference
from ..registry import LossSpec, register
from ._base import TokenLoss, row_function

if TYPE_CHECKING:
    from typing_extensions import Unpack


@row_function(TokenOptions)
def reverse_kl_loss(
    student_logits: Tensor,
    teacher_logits: TeacherLogits,
    labels: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    **common: Unpack[TokenOptions],
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
    """
    return row_loss(REVERSE_KL, student_logits, teacher_logits, labels, (), temperature, **common)


class ReverseKLLoss(TokenLoss):
    """Module form of :func:`kdkernels.functional.reverse_kl_loss`; see there.

    ``ReverseKLLoss()(student_logits, teacher_logits, labels)``;
    ``labels`` is a mask and may be left out.
    """


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
        exchanged=lambda: ("kd", ()),
        rule="mixed_kl",
        rule_numbers=lambda: (0.0,),
        samples=({}, {"temperature": 2.0}, {"temperature": 0.5, "loss_weight": 0.25}),
        laws=("non_negative", "zero_iff_equal", "shift", "temperature_scaling", "masked_class"),
    )
)

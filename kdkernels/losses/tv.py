"""Total variation of token distributions (DistillSpec: Zhou et al., 2023; 2310.08461)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from .._ensemble import TeacherLogits
from .._rowwise import TokenOptions, row_loss
from ..reference.tv import tv as reference
from ..registry import LossSpec, register
from ._base import TokenLoss, row_function

if TYPE_CHECKING:
    from typing_extensions import Unpack


@row_function(TokenOptions)
def tv_loss(
    student_logits: Tensor,
    teacher_logits: TeacherLogits,
    labels: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    **common: Unpack[TokenOptions],
) -> Tensor:
    r"""Total variation distance, which is one minus the acceptance rate of speculative decoding.

    .. math:: L = \frac1N \sum_n \frac12 \sum_c |p_{nc} - q_{nc}|,\qquad
              \frac{\partial L}{\partial z_{nc}} = \frac1{TN} q_{nc} \Bigl( g_{nc} -
              \sum_k q_{nk} g_{nk} \Bigr),\quad g = \tfrac12 \mathrm{sign}(q - p)

    with p and q the softmaxes of teacher and student over T. The gradient jumps where p = q, and
    takes sign(0) = 0 there and as near as rounding. **There is no T^2**, as in the trainers of
    language models. Finite whatever either side excludes, 1 at most.
    """
    return row_loss(TV, student_logits, teacher_logits, labels, (), temperature, **common)


class TVLoss(TokenLoss):
    """Module form of :func:`kdkernels.functional.tv_loss`; see there.

    ``TVLoss()(student_logits, teacher_logits, labels)``;
    ``labels`` is a mask and may be left out.
    """


TV = register(
    LossSpec(
        name="tv",
        title="Total variation",
        paper="Zhou et al., 2023 (2310.08461)",
        function=tv_loss,
        module=TVLoss,
        reference=reference,
        family="divergence",
        formula="mean ½·Σ|p − q|",
        temperature="T² out",
        reduction="mean over rows",
        eps="none needed",
        takes_target=True,
        target_name="labels",
        t_squared=False,
        smooth=False,
        exchanged=lambda: ("tv", ()),
        samples=({}, {"temperature": 2.0}, {"temperature": 0.5, "loss_weight": 0.25}),
        laws=("non_negative", "zero_iff_equal", "shift", "temperature_scaling", "masked_class"),
    )
)

"""KD of sigmoids: for heads whose labels do not exclude each other, and heads of one logit."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from .._ensemble import TeacherLogits
from .._rowwise import SigmoidOptions, row_loss
from ..reference.sigmoid_kd import sigmoid_kd as reference
from ..registry import LossSpec, register
from ._base import TokenLoss, row_function

if TYPE_CHECKING:
    from typing_extensions import Unpack


KEYWORDS = frozenset(SigmoidOptions.__annotations__)


@row_function(SigmoidOptions)
def sigmoid_kd_loss(
    student_logits: Tensor,
    teacher_logits: TeacherLogits,
    labels: Tensor | None = None,
    temperature: float | Tensor = 4.0,
    **common: Unpack[SigmoidOptions],
) -> Tensor:
    r"""KD for multi-label and binary heads: a divergence of two outcomes for each class.

    .. math:: L = T^2 \frac1N \sum_n \sum_c p_{nc} \log\frac{p_{nc}}{q_{nc}}
              + (1 - p_{nc}) \log\frac{1 - p_{nc}}{1 - q_{nc}},\qquad
              \frac{\partial L}{\partial z_{nc}} = \frac TN (q_{nc} - p_{nc})

    with p and q the sigmoids of teacher and student over T. It differs from
    ``binary_cross_entropy_with_logits`` on the teacher's sigmoids, summed over the classes and
    times T^2, by the teacher's entropy, and has its gradient; it is 0 where both agree. Of one
    class it is :func:`kdkernels.functional.kd_loss` of the two logits [z, 0]. T^2 is in. The
    classes are summed: for their mean give ``loss_weight=1 / C``.

    C may be 1. A logit of -inf or inf is the probability 0 or 1: the loss is infinite, with a
    finite gradient, where the student is certain of what the teacher is not. NaN is its own
    class's alone in the gradient. There is no cross-entropy of classes here (``hard_weight``): add
    ``binary_cross_entropy_with_logits``.
    """
    for name in common:
        if name not in KEYWORDS:  # of a softmax
            raise TypeError(f"sigmoid_kd_loss() got an unexpected keyword argument {name!r}")
    return row_loss(SIGMOID_KD, student_logits, teacher_logits, labels, (), temperature, **common)


class SigmoidKDLoss(TokenLoss):
    """Module form of :func:`kdkernels.functional.sigmoid_kd_loss`; see there.

    ``SigmoidKDLoss(temperature=4.0)(student_logits, teacher_logits, labels)``, where the labels,
    optional, say which rows are ignored.
    """


SIGMOID_KD = register(
    LossSpec(
        name="sigmoid_kd",
        title="Sigmoid KD",
        paper="Hinton et al., 2015 (1503.02531), of two outcomes a class",
        function=sigmoid_kd_loss,
        module=SigmoidKDLoss,
        reference=reference,
        family="binary",
        activation="sigmoid",
        formula="T² · mean Σ_c KL([p, 1 − p]‖[q, 1 − q]), p, q sigmoids",
        temperature="T² in",
        reduction="mean over rows",
        eps="none needed",
        takes_target=True,
        target_name="labels",
        samples=(
            {},
            {"temperature": 1.0},
            {"temperature": 0.5, "loss_weight": 0.25},
        ),
        laws=("non_negative", "zero_iff_equal", "odds", "temperature_scaling", "masked_class"),
    )
)

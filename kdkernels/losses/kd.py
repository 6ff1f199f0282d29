"""KD: Distilling the Knowledge in a Neural Network (Hinton, Vinyals, Dean, 2015; 1503.02531)."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from torch import Tensor

from .. import _checks, _resize
from .._ensemble import TeacherLogits
from .._rowwise import RowOptions, row_loss
from ..reference.kd import kd as reference, kd_by_temperature
from ..registry import LossSpec, register
from ._base import RowLoss, row_function

if TYPE_CHECKING:
    from typing_extensions import Unpack


@row_function(RowOptions)
def kd_loss(
    student_logits: Tensor,
    teacher_logits: TeacherLogits,
    temperature: float | Tensor = 4.0,
    *,
    target: Tensor | None = None,
    labels: Tensor | None = None,
    resize: str | None = None,
    **common: Unpack[RowOptions],
) -> Tensor:
    r"""Temperature-scaled Kullback-Leibler divergence from teacher to student.

    Equal to, without any copy of the logits::

        F.kl_div(F.log_softmax(student_logits / T, -1), F.log_softmax(teacher_logits / T, -1),
                 reduction="batchmean", log_target=True) * T * T

    .. math:: L = T^2 \frac1N \sum_n \sum_c p_{nc} \log\frac{p_{nc}}{q_{nc}},\qquad
              \frac{\partial L}{\partial z_{nc}} = \frac TN (q_{nc} - p_{nc})

    T^2 is in.

    Args:
        resize: ``'bilinear'`` brings the logits of a student (N, C, H', W') to the teacher's height
            and width first, in float32 (float64), as segmentation wants it; labels and weights
            have the teacher's size. None: sizes that differ raise.
    """
    if resize is not None:
        student_logits = _resize.logits(
            student_logits, teacher_logits, resize, common.get("class_dim")
        )
    index = _checks.given(target, labels)
    return row_loss(KD, student_logits, teacher_logits, index, (), temperature, **common)


class KDLoss(RowLoss):
    """Module form of :func:`kdkernels.functional.kd_loss`; see there.

    ``KDLoss(temperature=4.0)(student_logits, teacher_logits)``; a third argument ``target`` masks
    the rows whose class index is ``ignore_index``.
    """


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
        checks={"resize": _resize.check},
        by_temperature=kd_by_temperature,
        exchanged=lambda: ("reverse_kl", ()),
        samples=(
            {},
            {"temperature": 1.0},
            {"temperature": 0.5, "loss_weight": 0.25},
            {"standardize": True, "temperature": 2.0},
        ),
        laws=("non_negative", "zero_iff_equal", "shift", "temperature_scaling", "masked_class"),
    )
)

KD_OF_TOKENS = dataclasses.replace(KD, t_squared=False, target_name="labels", by_temperature=None)
"""What losses of tokens are at the end of their options: KL without T^2."""

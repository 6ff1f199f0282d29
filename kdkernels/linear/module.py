"""The Module of distillation through the output layer, bound from its function."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import _checks
from ..losses._base import LossModule, number_temperature, optional
from ..losses.topk_kd import TAILS
from ._inputs import chunk
from ._teachers import VOCABULARIES, Teacher
from .kd import DIVERGENCES, divergence_of, linear_kd_loss


class LinearLoss(LossModule):
    """A loss on hidden states and an output layer, of which it holds nothing."""

    def forward(
        self,
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher: Teacher,
        labels: Tensor | None = None,
        *,
        student_bias: Tensor | None = None,
        token_weight: Tensor | None = None,
        num_items_in_batch: float | Tensor | None = None,
    ) -> Any:
        return self._function(
            student_hidden,
            student_weight,
            teacher,
            labels,
            student_bias=student_bias,
            token_weight=token_weight,
            num_items_in_batch=num_items_in_batch,
            **self._held(),
        )


class FusedLinearKDLoss(LinearLoss):
    """Module form of :func:`kdkernels.linear_kd_loss`; see there.

    ``FusedLinearKDLoss("jsd", beta=0.1)(student_hidden, lm_head.weight, teacher, labels)``. It
    holds numbers and no weight.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        held = self._held()
        numbers = {name: held[name] for name in ("beta", "alpha", "forward_weight")}
        divergence_of(held["divergence"], **numbers)


def _given(name: str, value: Any) -> Any:
    """Checked beside the divergence."""
    return value


def _chunk_tokens(name: str, value: Any) -> Any:
    return chunk(value) or None


FusedLinearKDLoss.bind(
    linear_kd_loss,
    {
        "divergence": lambda name, value: _checks.choice(name, value, tuple(DIVERGENCES)),
        "temperature": number_temperature,
        "beta": _given,
        "alpha": _given,
        "forward_weight": _given,
        "tail": lambda name, value: _checks.choice(name, value, TAILS),
        "softcap": optional(_checks.positive),
        "logit_scale": _checks.number,
        "vocab": optional(lambda name, value: _checks.choice(name, value, VOCABULARIES)),
        "chunk_tokens": _chunk_tokens,
    },
)

"""Acceptance of speculative decoding, for draft models (Leviathan et al., 2023; 2211.17192)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import _checks
from .._ensemble import TeacherLogits
from .._rowwise import TokenOptions, row_loss
from ..reference.acceptance import LEAST, acceptance as reference, mixture
from ..registry import LossSpec, register
from ._base import TokenLoss, row_function
from .kd import KD_OF_TOKENS
from .reverse_kl import REVERSE_KL
from .tv import TV

if TYPE_CHECKING:
    from typing_extensions import Unpack

KINDS = ("log", "hybrid")
EXCHANGED = "hybrid of reverse KL"
"""The hybrid with the roles exchanged, of which only the kernels' gradient is wanted."""


@row_function(TokenOptions)
def acceptance_loss(
    student_logits: Tensor,
    teacher_logits: TeacherLogits,
    labels: Tensor | None = None,
    kind: str = "log",
    eta: float = 3.0,
    temperature: float | Tensor = 1.0,
    **common: Unpack[TokenOptions],
) -> Tensor:
    r"""Negative log acceptance rate of a draft, or KL and total variation mixed by that rate.

    .. math:: L_{\mathrm{log}} = -\frac1N \sum_n \log a_n,\qquad
              L_{\mathrm{hybrid}} = \frac1N \sum_n w_n \mathrm{KL}(p_n \| q_n)
              + (1 - w_n)\,\mathrm{TV}(p_n, q_n)

    with p and q the softmaxes of teacher (the target model) and student (the draft) over T, the
    acceptance rate :math:`a_n = \sum_c \min(p_{nc}, q_{nc})` and the constant weights
    :math:`w_n = \exp(-\eta a_n)`, one a token: KL leads where drafts are refused, total variation
    where they are accepted. The gradient of ``"log"`` is that of total variation over a. **There is
    no T^2.** Against a teacher that is certain of one class ``"log"`` is its cross-entropy.

    Published forms bound a at 1e-5, below which they have no gradient. Here a rate counts down to
    8e-28 (2e-297 in float64), so that the loss ends at 62 (683). The hybrid's gradient in half
    precision is the sum of two, each of which is rounded.

    Args:
        kind: ``'log'`` or ``'hybrid'``.
        eta: how fast the hybrid turns from KL to total variation, at least 0; of ``'log'`` unused.
    """
    if kind == "log" and torch.compiler.is_compiling():
        eta = 0.0  # a number that is held and not used would be compiled anew for every value
    options = (kind, eta)
    return row_loss(
        ACCEPTANCE, student_logits, teacher_logits, labels, options, temperature, **common
    )


def _steps(rows: Callable[..., Tensor], kind: str, eta: float) -> Tensor:
    distance = rows(TV)
    if kind != "log":
        return mixture(rows(REVERSE_KL if kind == EXCHANGED else KD_OF_TOKENS), distance, eta)
    # From total variation or from a, whichever is smaller and so exact. The gradient is that of
    # total variation over a, which the kernels give its digits where the student is certain; shards
    # of classes have a gradient of a.
    near = distance < 0.5
    a = rows(TV, 1.0, constant=True)
    if not a.requires_grad:
        a = a + (distance.detach() - distance)
    a = a.clamp(min=torch.finfo(a.dtype).tiny * LEAST)
    return torch.where(near, -torch.log1p(-torch.where(near, distance, 0.0)), -a.log())


class AcceptanceLoss(TokenLoss):
    """Module form of :func:`kdkernels.functional.acceptance_loss`; see there.

    ``AcceptanceLoss(kind="log", eta=3.0)(student_logits, teacher_logits, labels)``;
    ``labels`` is a mask and may be left out.
    """


def _kind(name: str, value: Any) -> Any:
    return _checks.choice(name, value, KINDS)


ACCEPTANCE = register(
    LossSpec(
        name="acceptance",
        title="Acceptance",
        paper="Leviathan et al., 2023 (2211.17192)",
        function=acceptance_loss,
        module=AcceptanceLoss,
        reference=reference,
        family="divergence",
        formula="mean −log Σ min(p, q)",
        temperature="T² out",
        reduction="mean over rows",
        eps="a ≥ 8e-28",
        takes_target=True,
        target_name="labels",
        t_squared=False,
        smooth=False,
        rule=TV.rule,
        steps=_steps,
        constant_weight="eta",
        exchanged=lambda kind, eta: ("acceptance", (kind if kind == "log" else EXCHANGED, eta)),
        options={"kind": _kind, "eta": _checks.non_negative},
        samples=(
            {},
            {"temperature": 2.0},
            {"kind": "hybrid"},
            {"kind": "hybrid", "eta": 1.0, "temperature": 0.5, "loss_weight": 0.25},
        ),
        laws=("non_negative", "zero_iff_equal", "shift", "temperature_scaling", "masked_class"),
        perturb={"kind": "hybrid", "eta": {"kind": "hybrid", "eta": 1.0}},
    )
)

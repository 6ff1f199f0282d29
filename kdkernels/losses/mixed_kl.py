"""KL and reverse KL weighted: symmetric and adaptive KL of token distributions."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from torch import Tensor

from .. import _checks
from .._dtypes import working_dtype
from .._ensemble import TeacherLogits, single
from .._rowwise import TokenOptions, by_group, joined, over_ranks, row_loss
from ..reference.mixed_kl import mixed_kl as reference
from ..registry import End, LossSpec, register
from ._base import TokenLoss, row_function
from .kd import KD_OF_TOKENS
from .reverse_kl import REVERSE_KL

if TYPE_CHECKING:
    from typing_extensions import Unpack


@row_function(TokenOptions)
def mixed_kl_loss(
    student_logits: Tensor,
    teacher_logits: TeacherLogits,
    labels: Tensor | None = None,
    forward_weight: float | Tensor = 0.5,
    temperature: float | Tensor = 1.0,
    **common: Unpack[TokenOptions],
) -> Tensor:
    r"""Kullback-Leibler divergence in both directions, weighted.

    .. math:: L = \frac1N \sum_n w\,\mathrm{KL}(p_n \| q_n) + (1 - w)\,\mathrm{KL}(q_n \| p_n)

    with p and q the softmaxes of both inputs over T and w the ``forward_weight``: symmetric KL
    (``0.5``, up to a factor), adaptive KL and gates by entropy (one weight a token). **There is no
    T^2**, as in the trainers of language models.

    A tensor of weights is two evaluations, one a direction, by ``token_weight``.

    Adaptive KL (Wu et al., 2024) weighs each token by its gap on the teacher's head, the likeliest
    classes up to half of the mass, and on the tail::

        p, q = teacher_logits.softmax(-1), student_logits.detach().softmax(-1)
        p, order = p.sort(-1, descending=True)
        gap, head = (p - q.gather(-1, order)).abs(), p.cumsum(-1) - p < 0.5
        weight = (gap * head).sum(-1) / gap.sum(-1)
        loss = mixed_kl_loss(student_logits, teacher_logits, labels, forward_weight=weight)

    Args:
        forward_weight: w, in [0, 1]; or a tensor of one weight a row, which is not checked.
    """
    if isinstance(forward_weight, Tensor) and forward_weight.dim():
        return _by_token(
            student_logits, teacher_logits, labels, forward_weight, temperature, common
        )
    return row_loss(
        MIXED_KL, student_logits, teacher_logits, labels, (forward_weight,), temperature, **common
    )


def _by_token(
    student: Tensor,
    teacher: TeacherLogits,
    labels: Tensor | None,
    weight: Tensor,
    temperature: float | Tensor,
    common: TokenOptions,
) -> Tensor:
    if not isinstance(teacher, Tensor):
        teacher = single(
            MIXED_KL, teacher, student, temperature, None, tp_group=common.get("tp_group"),
            teacher_grad=common.get("teacher_grad", False),
        )  # fmt: skip
    least = 2 if common.get("tp_group") is None else 0
    class_dim = _checks.logits(student, teacher, least, common.get("teacher_grad", False))
    _checks.token_weight(weight, student, class_dim, "forward_weight")
    given = common.pop("token_weight", None)
    if given is not None:
        _checks.token_weight(given, student, class_dim)
    weight = weight.to(working_dtype(student, teacher))
    group = common.pop("process_group", None)
    if group is not None:  # one number exchanged for all parts
        items = common.get("num_items_in_batch")
        reduction = by_group(group, common.get("reduction", "mean"), items, student, teacher)
        common["reduction"] = reduction
    hard = common.pop("hard_weight", 0.0)
    both = []
    for spec, part in ((KD_OF_TOKENS, weight), (REVERSE_KL, 1 - weight)):
        common["token_weight"] = part if given is None else part * given
        both.append(row_loss(spec, student, teacher, labels, (), temperature, **common))
    if hard != 0.0:
        common["token_weight"] = given
        common["loss_weight"] = 0.0
        common["hard_weight"] = hard
        both.append(row_loss(REVERSE_KL, student, teacher, labels, (), temperature, **common))
    index = common.get("ignore_index", -100)
    ignored = _checks.NO_INDEX if index is None else index
    return over_ranks(functools.reduce(joined, both), group, student, class_dim, labels, ignored)


def _exchanged(weight: float) -> tuple[str, tuple[float, ...]]:
    return ("mixed_kl", (1.0 - weight,)) if 1.0 - weight < 1.0 else ("kd", ())


class MixedKLLoss(TokenLoss):
    """Module form of :func:`kdkernels.functional.mixed_kl_loss`; see there.

    ``MixedKLLoss(forward_weight=0.5)(student_logits, teacher_logits, labels)``;
    ``labels`` is a mask and may be left out.
    """


MIXED_KL = register(
    LossSpec(
        name="mixed_kl",
        title="Mixed KL",
        paper="Wu et al., 2024 (2404.02657)",
        function=mixed_kl_loss,
        module=MixedKLLoss,
        reference=reference,
        family="divergence",
        formula="mean(w·KL(p‖q) + (1−w)·KL(q‖p))",
        temperature="T² out",
        reduction="mean over rows",
        eps="none needed",
        takes_target=True,
        target_name="labels",
        t_squared=False,
        needs_teacher_mass=True,
        options={"forward_weight": _checks.fraction},
        exchanged=_exchanged,
        ends=((1.0, End(KD_OF_TOKENS)),),
        samples=(
            {},
            {"forward_weight": 0.1, "temperature": 2.0},
            {"forward_weight": 0.9, "temperature": 0.5, "loss_weight": 0.25},
            {"forward_weight": 0.0},
        ),
        laws=("non_negative", "zero_iff_equal", "shift", "temperature_scaling", "masked_class"),
        perturb={"forward_weight": 0.2},
    )
)

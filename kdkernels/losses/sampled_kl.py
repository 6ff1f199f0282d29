"""KL divergence estimated from sampled tokens (Schulman, "Approximating KL Divergence", 2020)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Generator, Tensor

from .. import _checks
from .._rowwise import CommonOptions, row_loss
from .._tracing import readable
from ..reference.sampled_kl import estimate, sampled_kl as reference
from ..registry import SPECS, LossSpec, register
from ._base import SampledLoss, row_function

if TYPE_CHECKING:
    from typing_extensions import Unpack

ESTIMATORS = ("k1", "k2", "k3")


@row_function(CommonOptions)
def sampled_kl_loss(
    student_logits: Tensor,
    sampled_ids: Tensor,
    teacher_logprob: Tensor,
    labels: Tensor | None = None,
    estimator: str = "k2",
    **common: Unpack[CommonOptions],
) -> Tensor:
    r"""Estimates of KL from tokens that the student sampled, and their teacher's log-probabilities.

    .. math:: d_n = \log p_n(y_n) - \log q_n(y_n),\qquad
              k_1 = -d,\quad k_2 = \tfrac12 d^2,\quad k_3 = e^d - 1 - d

    with q the softmax of the student (at temperature 1) and y the sampled ids; the mean over rows.
    For y drawn from q, k1 and k3 have the *value* of the reverse KL in expectation, and k2 nearly.
    The *gradients* of the three, by which a student learns, are in expectation others:

    - k1: zero. It is a value to log, or a reward.
    - k2: that of reverse KL, :math:`\mathrm{KL}(q \| p)`. The default.
    - k3: that of forward KL, :math:`\mathrm{KL}(p \| q)`.

    The student's row is read once and no log-softmax is kept.

    Args:
        sampled_ids: the sampled classes, of the shape of the rows, any integer dtype; any value
            where a row is ignored.
        teacher_logprob: the teacher's log-probability of each, of the shape of the rows; a
            constant.
        estimator: ``'k1'``, ``'k2'`` or ``'k3'``.
    """
    _checks.tensor("student_logits", student_logits)
    teacher = student_logits.detach()  # of which nothing is used but the dtype
    alone = common.get("tp_group") is None
    class_dim = _checks.logits(student_logits, teacher, 2 if alone else 0)
    _checks.target(sampled_ids, student_logits, class_dim, "sampled_ids")
    _checks.token_weight(teacher_logprob, student_logits, class_dim, "teacher_logprob")
    _checks.allocated("sampled_ids", sampled_ids)
    if alone and readable(sampled_ids):
        _check_range(sampled_ids, student_logits.shape[class_dim], labels, common)
    options = (estimator, sampled_ids, teacher_logprob)
    if teacher_logprob.dtype == torch.float64:
        teacher = teacher.double()
    return row_loss(SAMPLED_KL, student_logits, teacher, labels, options, 1.0, **common)


def _check_range(ids: Tensor, classes: int, labels: Any, common: CommonOptions) -> None:
    """Check the ids of the rows that count; ``row_loss`` checks the labels."""
    ids = ids.long()  # a comparison in a narrow type wraps the number of classes
    bad = (ids < 0) | (ids >= classes)
    if bad.any() and isinstance(labels, Tensor) and labels.shape == ids.shape:
        ignored = common.get("ignore_index", -100)
        bad &= labels if labels.dtype == torch.bool else labels.long() != ignored
    if bad.any():
        raise _checks.fail("sampled_ids", f"in [0, {classes})", int(ids[bad][0]))


def _steps(
    rows: Callable[..., Tensor], estimator: str, sampled_ids: Tensor, teacher_logprob: Tensor
) -> Tensor:
    """The cross-entropy of the sampled ids, times -1, is their log-probability."""
    logprob = rows(SPECS["kd"], scale=0.0, hard=-1.0, index=sampled_ids)
    return estimate(logprob, teacher_logprob, estimator)


class SampledKLLoss(SampledLoss):
    """Module form of :func:`kdkernels.functional.sampled_kl_loss`; see there.

    ``SampledKLLoss(estimator="k2")(student_logits, sampled_ids, teacher_logprob, labels)``;
    ``labels`` is a mask and may be left out.
    """


def _estimator(name: str, value: Any) -> Any:
    return _checks.choice(name, value, ESTIMATORS)


def _tensor(name: str, value: Any) -> Any:
    """Checked where the logits are known."""
    return value


def _inputs(generator: Generator, dtype: torch.dtype) -> tuple[Tensor, ...]:
    student = torch.randn(6, 9, generator=generator).to(dtype)
    ids = torch.randint(9, (6,), generator=generator)
    logprob = torch.randn(6, 9, generator=generator).log_softmax(-1)
    mask = torch.randint(3, (6,), generator=generator)
    return student, ids, logprob.gather(1, ids[:, None])[:, 0].to(dtype), mask


SAMPLED_KL = register(
    LossSpec(
        name="sampled_kl",
        title="Sampled KL",
        paper="Schulman, 2020 (joschu.net/blog/kl-approx.html)",
        function=sampled_kl_loss,
        module=SampledKLLoss,
        reference=reference,
        family="sampled",
        formula="mean ½·(log p(y) − log q(y))²",
        temperature="none",
        reduction="mean over rows",
        eps="none needed",
        takes_target=True,
        target_name="labels",
        t_squared=False,
        rule="kd",
        steps=_steps,
        options={"estimator": _estimator, "sampled_ids": _tensor, "teacher_logprob": _tensor},
        samples=({}, {"estimator": "k1"}, {"estimator": "k3", "loss_weight": 0.25}),
        perturb={"estimator": "k3"},
        inputs=_inputs,
    )
)

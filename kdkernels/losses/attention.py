"""Attention transfer (Zagoruyko & Komodakis, ICLR 2017; 1612.03928)."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks, _embedding, _resize
from .._dtensor import gathered
from ..composed.attention import attention as composed
from ..reference.attention import attention_transfer as reference
from ..registry import LossSpec, register
from ._base import LossModule, of_batch, weighed


def _power(name: str, value: float) -> float:
    value = _checks.number(name, value)
    if value < 1.0:
        raise _checks.fail(name, ">= 1", value)
    return value


@gathered
@weighed
def attention_transfer_loss(
    student_features: Tensor,
    teacher_features: Tensor,
    p: float = 2.0,
    *,
    resize: str | None = None,
    reduction: str = "mean",
    loss_weight: float = 1.0,
    backend: str | None = None,
) -> Tensor:
    r"""Where the features are large: normalised spatial attention maps matched to the teacher's.

    .. math:: Q = \frac{q}{\max(\|q\|_2, 10^{-12})},\quad q = \tfrac1C \sum_c |F_c|^p,\qquad
              L = \tfrac1{B H W} \sum (Q_S - Q_T)^2

    Channels may differ, positions only with ``resize``. One call a stage; the published weight is
    1000 / 2 on the sum of three stages. A sample of zeros has the map 0. Powers are taken of
    features over the size of their sample, so that any p does with features of any size.

    Args:
        student_features: (B, C, H, W), or tokens (B, N, D) of N positions and D channels; float64,
            float32, float16 or bfloat16.
        teacher_features: (B, C', H, W), or (B, N, D'), on the same device; own dtype; a constant.
        p: power >= 1 (published: 2).
        resize: ``'bilinear'`` brings the maps (B, C, H', W') of a student to the teacher's height
            and width first, as :func:`kdkernels.functional.pkd_loss` does. None: sizes that differ
            raise.
        reduction: ``'mean'`` (alias ``'batchmean'``) over samples and positions, or ``'sum'``.
        loss_weight: multiplies the loss.
        backend: ``'reference'`` or None: composed of torch operations, no kernel of its own. None
            has a written gradient on the CPU, which cannot be differentiated again.

    Returns:
        0-d float32 (float64 if either input is).

    Raises:
        ValueError, TypeError: ``name must be <expected>, got <got>``.
    """
    p = _power("p", p)
    _resize.check("resize", resize)
    _checks.batch_reduction(reduction)
    loss_weight = _checks.number("loss_weight", loss_weight)
    student = _embedding.maps("student_features", student_features)
    teacher = _embedding.maps("teacher_features", teacher_features)
    _embedding.beside("teacher_features", teacher, student)
    rank, got = student_features.dim(), teacher_features.shape
    if resize is not None and rank == 4 == teacher_features.dim():
        student = _resize.to_teacher(student, teacher)
    batch, _, *positions = student.shape
    if teacher_features.dim() != rank or (batch, *positions) != (len(teacher), *teacher.shape[2:]):
        positions = positions[: rank - 2]
        channels = "D" if rank == 3 else "C"
        expected = _embedding.shape_of_maps(rank, batch, channels, *positions)
        if rank == 4:
            expected += " (maps of another size: resize='bilinear')"
        raise _checks.fail("teacher_features", expected, f"shape {tuple(got)}")
    _checks.constant("teacher_features", teacher)
    return _embedding.composed(
        ATTENTION,
        student,
        teacher,
        reduction=reduction,
        loss_weight=loss_weight,
        backend=backend,
        p=p,
    )


class AttentionTransferLoss(LossModule):
    """Module form of :func:`kdkernels.functional.attention_transfer_loss`; see there."""

    def forward(self, student_features: Tensor, teacher_features: Tensor) -> Tensor:
        return self._function(student_features, teacher_features, **self._held())


def _inputs(generator: torch.Generator, dtype: torch.dtype) -> tuple[Tensor, ...]:
    student = torch.randn(3, 4, 5, 5, generator=generator).to(dtype)
    return student, torch.randn(3, 6, 5, 5, generator=generator).to(dtype)


ATTENTION = register(
    LossSpec(
        name="attention",
        checks={"reduction": of_batch, "p": _power, "resize": _resize.check},
        title="AT",
        paper="Zagoruyko & Komodakis, ICLR 2017 (1612.03928)",
        formula="mean (Q_S − Q_T)², Q = n(mean_c |F_c|^p)",
        reduction="mean over samples and positions",
        eps="norms at least 1e-12",
        note="composed of torch operations",
        samples=({}, {"p": 3.0, "loss_weight": 500.0}),
        function=attention_transfer_loss,
        module=AttentionTransferLoss,
        reference=reference,
        family="embedding",
        temperature="none",
        backends=("reference",),
        composed=composed,
        inputs=_inputs,
    )
)

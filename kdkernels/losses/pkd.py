"""PKD: Pearson correlation of feature maps (Cao et al., NeurIPS 2022; 2207.02039)."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks, _embedding, _group, _moments, _resize
from .._dispatch import choose
from .._dtensor import gathered
from .._dtypes import working_dtype
from .._group import ProcessGroup
from ..composed.pkd import pkd as composed
from ..reference._rows import weighted
from ..reference.pkd import EPS, pkd as reference
from ..registry import LossSpec, register
from ._base import LossModule, of_batch, weighed


@gathered
@weighed
def pkd_loss(
    student_features: Tensor,
    teacher_features: Tensor,
    *,
    reduction: str = "mean",
    loss_weight: float = 1.0,
    process_group: ProcessGroup | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Feature maps compared after each channel is standardised: scale and offset do not matter.

    With n(x) = (x - mean) / (std + 1e-6) of a channel over samples and positions (unbiased std):

    .. math:: L = \tfrac12 \operatorname{mean} (n(S) - n(T))^2 = \tfrac{M - 1}{M}
              \tfrac1C \sum_c (1 - \rho_c),\quad M = N H W

    A student of another height and width is resized to the teacher's, bilinearly. One call a level;
    published weights are 10 (RetinaNet) and 6, on the sum of the levels. A constant channel becomes
    zeros; so does one of a single value, (1, C, 1, 1), where the published code gives NaN: the loss
    is 0, and so is its gradient. No samples: 0.

    Args:
        student_features: (B, C, H, W), or tokens (B, N, D) of N positions and D channels; float64,
            float32, float16 or bfloat16.
        teacher_features: (B, C, H', W'), or (B, N, D), on the same device; own dtype; a constant.
        reduction: ``'mean'`` (alias ``'batchmean'``) over all elements, or ``'sum'``.
        loss_weight: multiplies the loss.
        process_group: channels are standardised over the samples of all ranks of this group, which
            exchange float64 moments of the channels as in :func:`kdkernels.functional.dist_loss`,
            with the same factor W in the gradient. The sums are in float64. None: this process.
        backend: ``'reference'`` or None: composed of torch operations, no kernel of its own. None
            has a written gradient on the CPU, which cannot be differentiated again.

    Returns:
        0-d float32 (float64 if either input is).

    Raises:
        ValueError, TypeError: ``name must be <expected>, got <got>``.
    """
    _checks.batch_reduction(reduction)
    loss_weight = _checks.number("loss_weight", loss_weight)
    student = _embedding.maps("student_features", student_features)
    teacher = _embedding.maps("teacher_features", teacher_features)
    _embedding.beside("teacher_features", teacher, student)
    rank, got = student_features.dim(), teacher_features.shape
    same = student.shape if rank == 3 else student.shape[:2]
    if teacher_features.dim() != rank or same != teacher.shape[: len(same)]:
        positions = (student.shape[2],) if rank == 3 else ("H", "W")
        expected = _embedding.shape_of_maps(rank, *student.shape[:2], *positions)
        raise _checks.fail("teacher_features", expected, f"shape {tuple(got)}")
    _checks.constant("teacher_features", teacher)
    student = _resize.to_teacher(student, teacher)
    if process_group is not None:
        _group.check_call(process_group)
        choose(PKD, student, backend)
        loss = weighted(_of_group(student, teacher, process_group, reduction), loss_weight)
        return _group.summed(loss.to(working_dtype(student, teacher)), process_group)
    return _embedding.composed(
        PKD,
        student,
        teacher,
        reduction=reduction,
        loss_weight=loss_weight,
        backend=backend,
    )


def _of_group(student: Tensor, teacher: Tensor, group: ProcessGroup, reduction: str) -> Tensor:
    """The sum of the squared gaps from the moments of both; in float64, in which they cancel."""
    s, t = student.double(), teacher.double()
    _, moments = _moments.merged(s, t, (0, 2, 3), s.new_zeros(()), group)
    count, ss, tt, st = moments
    a, b = (1 / (_moments.root(x / (count - 1).clamp(min=1)) + EPS) for x in (ss, tt))
    gaps = (a * a * ss + b * b * tt - 2 * a * b * st) / 2
    return gaps.sum() if reduction == "sum" else gaps.mean() / count.clamp(min=1)


class PKDLoss(LossModule):
    """Module form of :func:`kdkernels.functional.pkd_loss`; see there."""

    def forward(self, student_features: Tensor, teacher_features: Tensor) -> Tensor:
        return self._function(student_features, teacher_features, **self._held())


def _inputs(generator: torch.Generator, dtype: torch.dtype) -> tuple[Tensor, ...]:
    student = torch.randn(3, 4, 5, 5, generator=generator).to(dtype)
    return student, torch.randn(3, 4, 5, 5, generator=generator).to(dtype)


PKD = register(
    LossSpec(
        name="pkd",
        checks={"reduction": of_batch},
        title="PKD",
        paper="Cao et al., NeurIPS 2022 (2207.02039)",
        formula="½ · mean (n(S) − n(T))² = mean_c (1 − ρ_c)·(M − 1)/M",
        reduction="mean over all elements",
        eps="1e-6, added to the deviation",
        note="composed of torch operations",
        samples=({}, {"loss_weight": 10.0}),
        function=pkd_loss,
        module=PKDLoss,
        reference=reference,
        family="embedding",
        temperature="none",
        backends=("reference",),
        composed=composed,
        inputs=_inputs,
    )
)

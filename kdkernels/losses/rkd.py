"""RKD: Relational Knowledge Distillation (Park et al., CVPR 2019; 1904.05068)."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .. import _checks, _embedding, _group
from .._dispatch import choose
from .._dtensor import gathered
from .._group import ProcessGroup
from ..reference.rkd import rkd as reference
from ..registry import LossSpec, register
from ._base import LossModule, of_batch, weighed


@gathered
@weighed
def rkd_loss(
    student_embeddings: Tensor,
    teacher_embeddings: Tensor,
    distance_weight: float = 25.0,
    angle_weight: float = 50.0,
    *,
    reduction: str = "mean",
    loss_weight: float = 1.0,
    process_group: ProcessGroup | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Distances between samples, and angles among triples of them, matched to the teacher's.

    With :math:`d_{ij} = \|e_i - e_j\|`, mu their mean over the pairs, h the smooth L1 (Huber) loss
    and :math:`u_{ij} = (e_j - e_i) / d_{ij}`:

    .. math:: L = \lambda_D \frac1{B^2} \sum_{ij} h\Big(\frac{d^S_{ij}}{\mu_S} -
              \frac{d^T_{ij}}{\mu_T}\Big) + \lambda_A \frac1{B^3} \sum_{ijk}
              h\big(u^S_{ij} \cdot u^S_{ik} - u^T_{ij} \cdot u^T_{ik}\big)

    The widths may differ. Means run over all B^2 and B^3 entries, the degenerate ones (equal
    indices, equal samples), which are 0, included, as in the published code. The gradient flows
    through mu.
    Memory: the angles pass in blocks, so it is of order B^2, not B^3 or B^2 D.

    Quirks: the weights are mdistiller's; the metric-learning code of the authors has 1 and 2, and
    other ports normalise the embeddings first (do so outside).

    Args:
        student_embeddings: (B, D), or (B, C, H, W) such as (B, C, 1, 1), which is flattened;
            float64, float32, float16 or bfloat16.
        teacher_embeddings: likewise, of any width, on the same device; own dtype; a constant.
        distance_weight: lambda_D >= 0.
        angle_weight: lambda_A >= 0; 0 skips the angles.
        reduction: ``'mean'`` (alias ``'batchmean'``) over the pairs and over the triples, or
            ``'sum'``.
        loss_weight: multiplies the loss.
        process_group: the relations are among the samples of all ranks of this group, which may
            differ in number and be none. Every rank gathers all embeddings, after their shapes, for
            which the host waits, and evaluates the whole loss. It is the same on every rank, its
            gradient W times the derivative by the rank's samples, because DistributedDataParallel
            averages over the W ranks. None: this process alone.
        backend: ``'reference'`` or None: composed of torch operations, no kernel of its own. Can be
            differentiated twice, with memory of order B^3 for the angles.

    Returns:
        0-d float32 (float64 if either input is).

    Raises:
        ValueError, TypeError: ``name must be <expected>, got <got>``.
    """
    distance_weight = _checks.non_negative("distance_weight", distance_weight)
    angle_weight = _checks.non_negative("angle_weight", angle_weight)
    _checks.batch_reduction(reduction)
    loss_weight = _checks.number("loss_weight", loss_weight)
    student_embeddings = _embedding.embeddings("student_embeddings", student_embeddings)
    teacher_embeddings = _embedding.embeddings("teacher_embeddings", teacher_embeddings)
    _embedding.beside("teacher_embeddings", teacher_embeddings, student_embeddings)
    samples = len(student_embeddings)
    if len(teacher_embeddings) != samples:
        raise _checks.fail("teacher_embeddings", f"of {samples} rows", len(teacher_embeddings))
    _checks.constant("teacher_embeddings", teacher_embeddings)
    if process_group is not None:
        _group.check_call(process_group)
        choose(RKD, student_embeddings, backend)  # raises before a collective starts
        return _group.of_all_rows(
            functools.partial(
                rkd_loss, distance_weight=distance_weight, angle_weight=angle_weight,
                reduction=reduction, loss_weight=loss_weight, backend=backend,
            ),
            process_group,
            student_embeddings=student_embeddings,
            teacher_embeddings=teacher_embeddings,
        )  # fmt: skip
    return _embedding.composed(
        RKD,
        student_embeddings,
        teacher_embeddings,
        reduction=reduction,
        loss_weight=loss_weight,
        backend=backend,
        distance_weight=distance_weight,
        angle_weight=angle_weight,
    )


class RKDLoss(LossModule):
    """Module form of :func:`kdkernels.functional.rkd_loss`; see there."""

    def forward(self, student_embeddings: Tensor, teacher_embeddings: Tensor) -> Tensor:
        return self._function(student_embeddings, teacher_embeddings, **self._held())


def _inputs(generator: torch.Generator, dtype: torch.dtype) -> tuple[Tensor, ...]:
    student = torch.randn(6, 5, generator=generator).to(dtype)
    return student, torch.randn(6, 7, generator=generator).to(dtype)


RKD = register(
    LossSpec(
        name="rkd",
        checks={
            "reduction": of_batch,
            "distance_weight": _checks.non_negative,
            "angle_weight": _checks.non_negative,
        },
        title="RKD",
        paper="Park et al., CVPR 2019 (1904.05068)",
        formula="λ_D · mean h(Δd/μ) + λ_A · mean h(Δ angle)",
        reduction="mean over pairs and over triples",
        eps="squared distances at least 1e-12",
        note="composed of torch operations",
        samples=({}, {"angle_weight": 0.0}, {"distance_weight": 0.0, "loss_weight": 0.5}),
        function=rkd_loss,
        module=RKDLoss,
        reference=reference,
        family="embedding",
        temperature="none",
        backends=("reference",),
        inputs=_inputs,
    )
)

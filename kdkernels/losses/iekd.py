"""IE-KD: Inheritance and Exploration KD (Huang et al., CVPR 2021; 2107.00181)."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks, _embedding
from .._calls import FactorCall
from .._dispatch import choose
from .._dtensor import gathered
from ..reference._rows import weighted
from ..reference.iekd import iekd as reference
from ..registry import LossSpec, register
from ._base import LossModule, of_batch, weighed

_RANKS = {2: "(B, D)", 3: "(B, N, D)", 4: "(B, C, H, W)"}


SIMILARITIES = ("l1", "cosine")


@gathered
@weighed
def iekd_loss(
    inheritance_factor: Tensor,
    exploration_factor: Tensor,
    teacher_factor: Tensor,
    inheritance_weight: float = 50.0,
    exploration_weight: float = 50.0,
    *,
    similarity: str = "l1",
    reduction: str = "mean",
    loss_weight: float = 1.0,
    backend: str | None = None,
) -> Tensor:
    r"""One half of the student's factors inherits the teacher's, the other explores away from it.

    With :math:`n(x) = x / \max(\|x\|_2, 10^{-12})` of a sample flattened to D elements:

    .. math:: L = \frac1B \sum_b \Big[ \lambda_{inh} \tfrac1D \|n(F_{inh}) - n(F_T)\|_1
              - \lambda_{exp} \tfrac1D \|n(F_{exp}) - n(F_T)\|_1 \Big]

    ``similarity='cosine'`` has :math:`1 - \cos` and :math:`|\cos|` in place of the two distances.
    The factors come from encoders (:class:`kdkernels.nn.FactorEncoder`) over the two halves of the
    student's channels (:func:`kdkernels.nn.split_channels`) and over the teacher's feature.

    The loss may be negative: exploration is rewarded, by at most
    :math:`2\lambda_{exp}/\sqrt D`. The scale of a sample does not matter. A zero vector stays zero
    under n; its gradient is the published code's, of the order :math:`10^{12}`.

    Quirks: the paper writes the distances as sums, the published code takes means over B and D,
    which its weights of 50 fit; that is what this is. The paper's best similarity is L1.

    In practice: both halves need room. A student of 16 channels, 8 a half, gains nothing or loses;
    from 32 on the published weights help, and an inheritance of 200 helps more. Next to KD in one
    loss it adds little.

    Args:
        inheritance_factor: (B, D), (B, C, H, W) or tokens (B, N, D), flattened to one vector a
            sample; float64, float32, float16 or bfloat16; any strides.
        exploration_factor: same shape and device, own dtype and strides.
        teacher_factor: likewise; a constant.
        inheritance_weight: lambda_inh >= 0.
        exploration_weight: lambda_exp >= 0.
        similarity: ``'l1'`` or ``'cosine'``.
        reduction: ``'mean'`` (alias ``'batchmean'``) over samples, or ``'sum'`` over samples; the
            mean over the D elements of a sample belongs to the distance.
        loss_weight: multiplies the loss inside the kernel.
        backend: ``'native'``, ``'triton'``, ``'reference'``; None chooses.

    Returns:
        0-d float32 (float64 if any input is).

    Raises:
        ValueError, TypeError: ``name must be <expected>, got <got>``.
    """
    inheritance_weight = _checks.non_negative("inheritance_weight", inheritance_weight)
    exploration_weight = _checks.non_negative("exploration_weight", exploration_weight)
    similarity = _checks.choice("similarity", similarity, SIMILARITIES)
    code = _checks.batch_reduction(reduction)
    loss_weight = _checks.number("loss_weight", loss_weight)
    _embedding.tensor("inheritance_factor", inheritance_factor, _RANKS)
    _embedding.tensor("exploration_factor", exploration_factor, _RANKS)
    _embedding.tensor("teacher_factor", teacher_factor, _RANKS)
    _embedding.like("exploration_factor", exploration_factor, inheritance_factor)
    _embedding.like("teacher_factor", teacher_factor, inheritance_factor)
    _checks.constant("teacher_factor", teacher_factor)
    chosen = choose(IEKD, inheritance_factor, backend)
    if chosen == "reference":
        with _embedding.full_precision(inheritance_factor.device):
            loss = reference(
                *_embedding.promote(inheritance_factor, exploration_factor, teacher_factor),
                inheritance_weight=inheritance_weight,
                exploration_weight=exploration_weight,
                similarity=similarity,
                reduction=reduction,
            )
        return weighted(loss, loss_weight)
    return _embedding.factors(
        chosen,
        inheritance_factor,
        exploration_factor,
        teacher_factor,
        FactorCall(
            [inheritance_weight * loss_weight, exploration_weight * loss_weight],
            None,
            similarity == "cosine",
            code,
        ),
    )


class IEKDLoss(LossModule):
    """Module form of :func:`kdkernels.functional.iekd_loss`; see there.

    ``IEKDLoss(50.0, 50.0)(inheritance_factor, exploration_factor, teacher_factor)``
    """

    def forward(
        self, inheritance_factor: Tensor, exploration_factor: Tensor, teacher_factor: Tensor
    ) -> Tensor:
        return self._function(
            inheritance_factor, exploration_factor, teacher_factor, **self._held()
        )


def _inputs(generator: torch.Generator, dtype: torch.dtype) -> tuple[Tensor, ...]:
    shape = (3, 4, 5, 5)
    return tuple(torch.randn(shape, generator=generator).to(dtype) for _ in range(3))


IEKD = register(
    LossSpec(
        name="iekd",
        checks={
            "reduction": of_batch,
            "inheritance_weight": _checks.non_negative,
            "exploration_weight": _checks.non_negative,
            "similarity": lambda name, value: _checks.choice(name, value, SIMILARITIES),
        },
        title="IE-KD",
        paper="Huang et al., CVPR 2021 (2107.00181)",
        function=iekd_loss,
        module=IEKDLoss,
        reference=reference,
        family="embedding",
        formula="λ_inh·mean |n(F_inh) − n(F_T)| − λ_exp·mean |n(F_exp) − n(F_T)|",
        temperature="none",
        reduction="mean over samples and elements",
        eps="norms at least 1e-12",
        backends=("native", "triton", "reference"),
        samples=(
            {},
            {"similarity": "cosine"},
            {"inheritance_weight": 2.0, "exploration_weight": 0.0, "loss_weight": 0.5},
            {"inheritance_weight": 0.0, "exploration_weight": 3.0, "similarity": "cosine"},
        ),
        perturb={"similarity": "cosine"},
        inputs=_inputs,
    )
)

"""REFILLED: relationship facilitated local classifier distillation (Ye et al., CVPR 2020)."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _checks, _embedding, _group
from .._calls import TupleCall
from .._dispatch import choose
from .._dtensor import gathered
from .._group import ProcessGroup
from .._rowwise import row_loss
from ..reference import refilled as reference
from ..reference._rows import weighted
from ..registry import LossSpec, register
from ._base import LossModule, number_temperature, of_batch, weighed
from ._centers import ClassCenters as ClassCenters, class_centers as class_centers
from ._tuples import semihard_tuples as semihard_tuples
from .kd import KD_OF_TOKENS

PAPER = "Ye et al., CVPR 2020 (2205.01915)"


@gathered
@weighed
def tuple_matching_loss(
    student_embeddings: Tensor,
    teacher_embeddings: Tensor,
    target: Tensor,
    temperature: float = 4.0,
    margin: float = 0.2,
    *,
    reduction: str = "mean",
    loss_weight: float = 1000.0,
    process_group: ProcessGroup | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Stage 1 of REFILLED: the teacher's comparisons in tuples that the student finds hard.

    For every anchor and positive of its class, with the semi-hard negatives
    :math:`0 < D^S_{an} - D^S_{ap} \le margin` (at least one):

    .. math:: L = w \frac1{|tuples|} \sum_{(a, p)} \mathrm{KL}(\pi^T \| \pi^S),\quad
              \pi = \mathrm{softmax}([-D_{ap}, -D_{an_1}, \dots, -D_{an_m}] / \tau)

    D are Euclidean distances of L2-normalised embeddings, so teacher and student may have different
    widths and rotations change nothing. The tuples are constants for the gradient. A batch without
    a tuple gives 0, attached to the graph. At equal embeddings a distance has derivative 0.

    Quirks: no factor T^2; distances are at most 2, so at temperature 4 the distributions are nearly
    uniform, hence the published weight 1000, which is the default of ``loss_weight``. The published
    code has a form with single triplets too, one negative a time, whose value is half of the mean
    KL (both outcomes are counted as samples by ``batchmean``); this is its tuple form, a plain
    mean.

    In practice: the stage needs a teacher whose classes are related to the student's, and few
    labels: what it can give is what the teacher's embedding already tells apart (classify with
    :func:`kdkernels.functional.class_centers` to see). The weight of 1000 wants clipped gradients.
    Stage 2 (:func:`kdkernels.functional.local_classifier_loss`) carries most of the gain.

    Args:
        student_embeddings: (B, D), or (B, C, H, W) such as (B, C, 1, 1), which is flattened;
            float64, float32, float16 or bfloat16.
        teacher_embeddings: likewise, of any width, on the same device; own dtype; a constant.
        target: (B,) integer class indices, of any classes.
        temperature: tau > 0.
        margin: width of the semi-hard band, >= 0.
        reduction: ``'mean'`` (alias ``'batchmean'``) over tuples, or ``'sum'``.
        loss_weight: multiplies the loss (published: 1000).
        process_group: tuples are mined among the samples of all ranks of this group, which are
            gathered as in :func:`kdkernels.functional.rkd_loss`, with the same factor W in the
            gradient. None: those of this process alone.
        backend: ``'native'``, ``'triton'``, ``'reference'``; None chooses. The reference takes
            memory of order B^3.

    Returns:
        0-d float32 (float64 if either input is). The distances are computed in float64.

    Raises:
        ValueError, TypeError: ``name must be <expected>, got <got>``.
    """
    temperature = _checks.temperature(temperature)
    margin = _checks.non_negative("margin", margin)
    code = _checks.batch_reduction(reduction)
    loss_weight = _checks.number("loss_weight", loss_weight)
    student_embeddings = _embedding.embeddings("student_embeddings", student_embeddings)
    teacher_embeddings = _embedding.embeddings("teacher_embeddings", teacher_embeddings)
    _embedding.beside("teacher_embeddings", teacher_embeddings, student_embeddings)
    samples = len(student_embeddings)
    if len(teacher_embeddings) != samples:
        raise _checks.fail("teacher_embeddings", f"of {samples} rows", len(teacher_embeddings))
    _checks.constant("teacher_embeddings", teacher_embeddings)
    target = _embedding.labels(target, samples, student_embeddings.device)
    chosen = choose(TUPLE_MATCHING, student_embeddings, backend)
    if process_group is not None:
        _group.check_call(process_group)
        return _group.of_all_rows(
            functools.partial(
                tuple_matching_loss, temperature=temperature, margin=margin,
                reduction=reduction, loss_weight=loss_weight, backend=backend,
            ),
            process_group,
            student_embeddings=student_embeddings,
            teacher_embeddings=teacher_embeddings,
            target=target,
        )  # fmt: skip
    if chosen == "reference":
        with _embedding.full_precision(student_embeddings.device):
            loss = reference.tuple_matching(
                student_embeddings,
                teacher_embeddings,
                target,
                temperature=temperature,
                margin=margin,
                reduction=reduction,
            )
        return weighted(loss, loss_weight)
    return _embedding.tuples(
        chosen,
        student_embeddings,
        teacher_embeddings,
        target,
        TupleCall([margin, temperature, loss_weight], None, code),
    )


class TupleMatchingLoss(LossModule):
    """Module form of :func:`kdkernels.functional.tuple_matching_loss`; see there.

    ``TupleMatchingLoss(temperature=4.0)(student_embeddings, teacher_embeddings, target)``
    """

    def forward(
        self, student_embeddings: Tensor, teacher_embeddings: Tensor, target: Tensor
    ) -> Tensor:
        return self._function(student_embeddings, teacher_embeddings, target, **self._held())


@gathered
@weighed
def local_classifier_loss(
    student_logits: Tensor,
    teacher_embeddings: Tensor,
    centers: Tensor,
    target: Tensor,
    temperature: float = 2.0,
    *,
    ignore_index: int | None = -100,
    reduction: str = "mean",
    loss_weight: float = 100.0,
    backend: str | None = None,
) -> Tensor:
    r"""Stage 2 of REFILLED: the classifier that the teacher's embedding induces, on local classes.

    With K' the classes present in ``target``, :math:`c_k` the class centres and
    :math:`\phi_T` the teacher's embedding (not normalised):

    .. math:: L = w \frac1B \sum_b \mathrm{KL}\big(\mathrm{softmax}(\phi_T \cdot c_{K'} / T) \,\|\,
              \mathrm{softmax}(z_{K'} / T)\big)

    Centres are those of the student's classes (:class:`ClassCenters`), so the teacher may have been
    trained on the same, on overlapping or on other classes. Columns of classes that are not present
    get exactly zero gradient. Runs on the KD kernel.

    Quirks: the published code has no factor T^2, nor has this; its weight 100 is the default of
    ``loss_weight``. The published code takes global centres, the paper's are of the batch
    (:func:`class_centers`).

    Args:
        student_logits: (B, C); float64, float32, float16 or bfloat16.
        teacher_embeddings: (B, D), or (B, C, H, W) such as (B, C, 1, 1), which is flattened; a
            constant.
        centers: (C, D), L2-normalised; a constant.
        target: (B,) class indices in [0, C).
        temperature: T > 0.
        ignore_index: samples of this label take part in nothing, not in K' either, and contribute
            exact zeros, even if they hold NaN; they do not count in the mean. None ignores none.
        reduction: ``'mean'`` (alias ``'batchmean'``), ``'sum'`` or ``'none'`` (one value a sample).
        loss_weight: multiplies the loss inside the kernel (published: 100).
        backend: as for :func:`kd_loss`; None chooses.

    Returns:
        float32 (float64 if any input is); 0-d, or (B,) for ``'none'``.

    Raises:
        ValueError, TypeError: ``name must be <expected>, got <got>``.
    """
    temperature = _checks.temperature(temperature)
    loss_weight = _checks.number("loss_weight", loss_weight)
    _embedding.tensor("student_logits", student_logits, {2: "(B, C)"})
    teacher_embeddings = _embedding.embeddings("teacher_embeddings", teacher_embeddings)
    _embedding.tensor("centers", centers, {2: "(C, D)"})
    samples, classes = student_logits.shape
    if len(teacher_embeddings) != samples:
        raise _checks.fail("teacher_embeddings", f"of {samples} rows", len(teacher_embeddings))
    expected = (classes, teacher_embeddings.shape[1])
    if centers.shape != expected:
        raise _checks.fail("centers", f"of shape {expected}", tuple(centers.shape))
    for name, value in (("teacher_embeddings", teacher_embeddings), ("centers", centers)):
        _embedding.beside(name, value, student_logits)
        _checks.constant(name, value)
    target = _embedding.labels(target, samples, student_logits.device)
    ignored = _checks.NO_INDEX
    if ignore_index is not None:
        ignored = _checks.integer("ignore_index", ignore_index)
    counted = target != ignored
    _embedding.in_range(target, classes, ignored)
    present = torch.arange(classes, device=target.device) == target.unsqueeze(1)
    absent = ~(present & counted.unsqueeze(1)).any(0)
    embeddings, centers, _ = _embedding.promote(teacher_embeddings, centers, student_logits)
    with _embedding.full_precision(student_logits.device):
        teacher_logits = (embeddings @ centers.T).masked_fill(absent, -torch.inf)
    return row_loss(
        KD_OF_TOKENS,
        student_logits.masked_fill(absent, -torch.inf),
        teacher_logits.detach(),
        target,
        (),
        temperature,
        ignore_index=ignore_index,
        reduction=reduction,
        loss_weight=loss_weight,
        backend=backend,
    )


class LocalClassifierLoss(LossModule):
    """Module form of :func:`kdkernels.functional.local_classifier_loss`; see there.

    ``LocalClassifierLoss(temperature=2.0)(student_logits, teacher_embeddings, centers, target)``
    """

    def forward(
        self, student_logits: Tensor, teacher_embeddings: Tensor, centers: Tensor, target: Tensor
    ) -> Tensor:
        return self._function(student_logits, teacher_embeddings, centers, target, **self._held())


def _tuple_inputs(generator: torch.Generator, dtype: torch.dtype) -> tuple[Tensor, ...]:
    student = torch.randn(12, 6, generator=generator).to(dtype)
    teacher = torch.randn(12, 9, generator=generator).to(dtype)
    return student, teacher, torch.randint(3, (12,), generator=generator)


def _classifier_inputs(generator: torch.Generator, dtype: torch.dtype) -> tuple[Tensor, ...]:
    student = torch.randn(6, 8, generator=generator).to(dtype)
    teacher = torch.randn(6, 5, generator=generator).to(dtype)
    centers = F.normalize(torch.randn(8, 5, generator=generator)).to(dtype)
    return student, teacher, centers, torch.randint(8, (6,), generator=generator)


TUPLE_MATCHING = register(
    LossSpec(
        name="tuple_matching",
        checks={
            "reduction": of_batch,
            "temperature": number_temperature,
            "margin": _checks.non_negative,
        },
        title="REFILLED, stage 1",
        paper=PAPER,
        function=tuple_matching_loss,
        module=TupleMatchingLoss,
        reference=reference.tuple_matching,
        family="embedding",
        formula="1000 · mean KL(π_T ‖ π_S), π = softmax(−[D_ap, D_an…]/τ)",
        temperature="no τ²",
        reduction="mean over tuples",
        eps="norms ≥ 1e-12",
        needs_target=True,
        takes_target=True,
        backends=("native", "triton", "reference"),
        samples=({}, {"temperature": 0.5, "margin": 1.0}, {"loss_weight": 1.0, "margin": 2.0}),
        inputs=_tuple_inputs,
    )
)
LOCAL_CLASSIFIER = register(
    LossSpec(
        name="local_classifier",
        checks={"temperature": number_temperature},
        title="REFILLED, stage 2",
        paper=PAPER,
        function=local_classifier_loss,
        module=LocalClassifierLoss,
        reference=reference.local_classifier,
        family="embedding",
        formula="100 · mean KL over the classes present",
        temperature="no T²",
        reduction="mean over samples",
        eps="none needed",
        needs_target=True,
        takes_target=True,
        backends=("reference",),
        note="composed: a product, then the KD kernel",
        samples=({}, {"temperature": 1.0, "loss_weight": 1.0}),
        inputs=_classifier_inputs,
    )
)

"""DIST over sigmoids: for detectors and other heads whose labels do not exclude each other."""

from __future__ import annotations

from torch import Tensor

from .._ensemble import TeacherLogits
from .._group import ProcessGroup
from ..reference.sigmoid_dist import sigmoid_dist as reference
from ..registry import LossSpec, register
from ._base import weighed
from .dist import DIST, DISTLoss, relations


@weighed
def sigmoid_dist_loss(
    student_logits: Tensor,
    teacher_logits: TeacherLogits,
    beta: float = 1.0,
    gamma: float = 1.0,
    tau: float = 1.0,
    *,
    labels: Tensor | None = None,
    ignore_index: int | None = -100,
    eps: float = 1e-8,
    reduction: str = "mean",
    loss_weight: float = 1.0,
    teacher_grad: bool = False,
    class_dim: int | None = None,
    process_group: ProcessGroup | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""DIST with sigmoids in place of softmaxes, as detectors such as RetinaNet have them.

    With p, q the sigmoids of teacher and student over tau, all (B, C):

    .. math:: L = \beta \tau^2 \Big(1 - \tfrac1B \sum_b \rho(q_{b\cdot}, p_{b\cdot})\Big)
              + \gamma \tau^2 \Big(1 - \tfrac1C \sum_c \rho(q_{\cdot c}, p_{\cdot c})\Big)

    with the correlation rho of :func:`kdkernels.functional.dist_loss`, whose notes on the size of
    the gradient and on the columns under DDP hold here too. Only rho couples the classes of a row:

    .. math:: \frac{\partial L}{\partial z_{bc}} = \frac1\tau q_{bc} (1 - q_{bc})
              \frac{\partial L}{\partial q_{bc}}

    C may be 1: the row term is then the constant beta tau^2, and the column term counts. In float32
    probabilities that are all within some 1e-4 of 1 keep few digits of their differences.

    Args:
        student_logits: (N, C), (B, S, V) with classes last, or (N, C, H, W); float64, float32,
            float16 or bfloat16; any strides. Of (N, A C, H, W), with A anchors a position, a row is
            a position; ``.unflatten(1, (A, C))`` with ``class_dim=2`` makes each anchor a row.
        teacher_logits: same shape and device; own dtype and strides; a constant. Of several, in a
            list or in :class:`kdkernels.teacher.EnsembleTeacher`, the probabilities are averaged.
        beta: weight of the inter-class (row) term.
        gamma: weight of the intra-class (column) term.
        tau: temperature > 0.
        labels: optional, only a mask: class indices of the shape of the rows, (N,), (B, S) or
            (N, H, W), of which ``ignore_index`` is ignored, or bools, of which True counts.
        ignore_index: rows with this label are ignored; None ignores none.
        eps: added to the product of the norms; >= 0.
        reduction: ``'mean'`` (alias ``'batchmean'``) or ``'sum'``, of rows and of columns. The loss
            couples the rows, so there is no ``'none'``.
        loss_weight: multiplies the loss inside the kernel.
        teacher_grad: gives the teacher its gradient too, as in ``dist_loss``.
        class_dim: the dimension of the classes in logits of any shape. None: as above.
        process_group: the batch is that of all ranks of this group, as in ``dist_loss``.
        backend: ``'native'``, ``'triton'``, ``'reference'``; None chooses. GPUs take Triton's.

    Returns:
        0-d float32 (float64 for float64 inputs). tau^2 is in, on both terms.

    Raises:
        ValueError, TypeError: ``name must be <expected>, got <got>``.
    """
    return relations(
        SIGMOID_DIST, student_logits, teacher_logits, labels, ignore_index, class_dim,
        process_group, reduction, backend, teacher_grad,
        beta=beta, gamma=gamma, tau=tau, eps=eps, loss_weight=loss_weight,
    )  # fmt: skip


class SigmoidDISTLoss(DISTLoss):
    """Module form of :func:`kdkernels.functional.sigmoid_dist_loss`; see there.

    ``SigmoidDISTLoss(beta=1.0, gamma=1.0, tau=1.0)(student_logits, teacher_logits, labels)``, where
    the labels, optional, say which rows are ignored.
    """


SIGMOID_DIST = register(
    LossSpec(
        name="sigmoid_dist",
        checks=DIST.checks,
        title="Sigmoid DIST",
        paper="Huang et al., NeurIPS 2022 (2205.10536), over sigmoids",
        function=sigmoid_dist_loss,
        module=SigmoidDISTLoss,
        reference=reference,
        family="correlation",
        activation="sigmoid",
        formula="β·τ²·(1 − mean ρ of rows) + γ·τ²·(1 − mean ρ of columns), of sigmoids",
        temperature="τ² in, on both terms",
        reduction="mean over rows and over classes",
        takes_target=True,
        target_name="labels",
        eps="1e-8, added to the product of the norms",
        samples=DIST.samples,
        laws=("non_negative", "affine"),
    )
)

"""DIST: Knowledge Distillation from A Stronger Teacher (Huang et al., NeurIPS 2022; 2205.10536)."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks, _group, _moments, _reduce
from .._autograd import by_both
from .._correlation import correlation_loss, counted_rows
from .._ensemble import TeacherLogits, single
from .._group import ProcessGroup
from .._shapes import ClassesAt
from ..reference.dist import dist as reference
from ..registry import LossSpec, register
from ._base import LossModule, number_temperature, of_batch, weighed


@weighed
def dist_loss(
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
    r"""Inter-class and intra-class relations matched by Pearson correlation.

    With p, q the softmax of teacher and student at temperature tau, all (B, C):

    .. math:: L = \beta \tau^2 \Big(1 - \tfrac1B \sum_b \rho(q_{b\cdot}, p_{b\cdot})\Big)
              + \gamma \tau^2 \Big(1 - \tfrac1C \sum_c \rho(q_{\cdot c}, p_{\cdot c})\Big),\quad
              \rho(a, b) = \frac{\langle \tilde a, \tilde b\rangle}
              {\|\tilde a\| \|\tilde b\| + \varepsilon}

    where a tilde means centred. The column term is over all rows given: all tokens of (B, S, V),
    all pixels of (N, C, H, W), under DDP those of one process unless ``process_group`` joins them.

    In practice: rho divides by the norm of the student's centred probabilities, which is small
    while they are nearly uniform. There the gradient of a row of logits z has the norm
    :math:`\beta \tau^2 \sqrt{1 - \rho^2} / (B \|z - \bar z\|)`: the first step of a new network at
    tau = 4 and weight 2 is about a hundred times that of cross-entropy. Clip the norm of the
    gradients (2 is a good start; after unscaling under a GradScaler): the published weight then
    works, with few images four points better than without. Warming up the learning rate alone
    does a third of that.

    Args:
        student_logits: (N, C), (B, S, V) with classes last, or (N, C, H, W); float64, float32,
            float16 or bfloat16; any strides.
        teacher_logits: same shape and device; own dtype and strides; a constant. Of several, in a
            list or in :class:`kdkernels.teacher.EnsembleTeacher`, the probabilities are averaged.
        beta: weight of the inter-class (row) term.
        gamma: weight of the intra-class (column) term.
        tau: temperature > 0.
        labels: optional, only a mask: class indices of the shape of the rows, (N,), (B, S) or
            (N, H, W), of which ``ignore_index`` is ignored, or bools, of which True counts. Ignored
            rows are as if they were not there, in the columns too, and get exact zeros, even if
            they hold NaN. Compiled CUDA kernels have no labels: GPUs take Triton's there.
        ignore_index: rows with this label are ignored; None ignores none.
        eps: added to the product of the norms, as in the authors' code; >= 0.
        reduction: ``'mean'`` (alias ``'batchmean'``) as published; ``'sum'`` sums 1 - rho over rows
            and over classes. The loss couples the rows, so there is no ``'none'``.
        loss_weight: multiplies the loss inside the kernel.
        teacher_grad: gives the teacher its gradient too, by a second call with the roles exchanged,
            a second collective beside ``process_group``; the loss stays as it is. Not of several
            teachers. False: a teacher that requires grad raises.
        class_dim: the dimension of the classes in logits of any shape, such as 1 for (N, C, L) and
            (N, C, D, H, W); all others are rows. None: as above.
        process_group: the batch is that of all ranks of this group, whose rows may differ in number
            and be none. Each rank gives float64 moments of its columns, 8 (5 C + 2) bytes, in one
            collective; the backward pass has none. The column term runs on torch operations. The
            loss is the same on every rank, its gradient W times the derivative by the rank's rows,
            because DistributedDataParallel averages over the W ranks. None: this process alone.
        backend: ``'native'``, ``'triton'``, ``'reference'``; None chooses.

    Returns:
        0-d float32 (float64 for float64 inputs). tau^2 is in, on both terms.

    Raises:
        ValueError, TypeError: ``name must be <expected>, got <got>``.
    """
    return relations(
        DIST, student_logits, teacher_logits, labels, ignore_index, class_dim, process_group,
        reduction, backend, teacher_grad,
        beta=beta, gamma=gamma, tau=tau, eps=eps, loss_weight=loss_weight,
    )  # fmt: skip


def relations(
    spec: LossSpec,
    student: Tensor,
    teacher: TeacherLogits,
    labels: Tensor | None,
    ignore_index: int | None,
    class_dim: int | None,
    group: ProcessGroup | None,
    reduction: str,
    backend: str | None,
    teacher_grad: bool,
    *,
    beta: float,
    gamma: float,
    tau: float,
    eps: float,
    loss_weight: float,
) -> Tensor:
    """Check the numbers, and bring tensors into the form that ``correlation_loss`` takes."""
    numbers = {
        "beta": _checks.non_negative("beta", beta),
        "gamma": _checks.non_negative("gamma", gamma),
        "tau": _checks.temperature(tau, "tau"),
        "eps": _checks.non_negative("eps", eps),
        "loss_weight": _checks.number("loss_weight", loss_weight),
    }
    if not isinstance(teacher, Tensor):
        teacher = single(
            spec, teacher, student, numbers["tau"], class_dim, teacher_grad=teacher_grad
        )
    teacher_grad = _checks.flag("teacher_grad", teacher_grad)
    if class_dim is not None:
        shape = ClassesAt(class_dim, student, teacher)
        student, teacher = shape.logits(student), shape.logits(teacher)
        labels = shape.of_rows("labels", labels)
    if group is None:
        return correlation_loss(
            spec, student, teacher, labels=labels, ignore_index=ignore_index,
            reduction=reduction, backend=backend, teacher_grad=teacher_grad, **numbers,
        )  # fmt: skip
    _group.check_call(group, student, teacher)
    _checks.logits(student, teacher, spec.least_classes, teacher_grad)
    return by_both(
        lambda x, y: _of_group(
            spec, x, y, labels, ignore_index, group, reduction, backend, **numbers
        ),
        student, teacher,
    )  # fmt: skip


def _of_group(
    spec: LossSpec,
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    ignore_index: int | None,
    group: ProcessGroup,
    reduction: str,
    backend: str | None,
    *,
    beta: float,
    gamma: float,
    tau: float,
    eps: float,
    loss_weight: float,
) -> Tensor:
    """The row term of this rank's rows by the kernel, the column term of all ranks' moments."""
    mean = _checks.batch_reduction(reduction) == _checks.REDUCTIONS["mean"]
    class_dim = _checks.logits(student, teacher, spec.least_classes)
    counted = counted_rows(spec, student, labels, class_dim, ignore_index)
    s, t = (_reduce.as_rows(x, class_dim) for x in _reduce.promote(student, teacher))
    by_rows = correlation_loss(
        spec, s, t, labels=counted, ignore_index=None, beta=beta, gamma=0.0, tau=tau, eps=eps,
        reduction="sum", loss_weight=loss_weight, backend=backend,
    )  # fmt: skip
    if counted is not None:
        counted = counted.unsqueeze(1)
        s, t = (torch.where(counted, x, 0.0) for x in (s, t))
    s, t = s / tau, t / tau
    softmax = spec.activation == "softmax"
    q, p = (torch.softmax(x, 1) if softmax else torch.sigmoid(x) for x in (s, t))
    inter, moments = _moments.merged(q, p, (0,), by_rows, group, counted)
    rho = _moments.correlation(moments, eps, s.dtype)
    columns = torch.where(moments.rows > 0, 1 - rho, 0.0)
    intra = columns.mean() if mean else columns.sum()
    if mean:
        inter = inter / moments.rows.clamp(min=1)
    loss = inter + (loss_weight * gamma * tau**2) * intra if gamma else inter
    return _group.once(_group.summed(loss.to(s.dtype), group))


class DISTLoss(LossModule):
    """Module form of :func:`kdkernels.functional.dist_loss`; see there.

    ``DISTLoss(beta=1.0, gamma=1.0, tau=1.0)(student_logits, teacher_logits, labels)``, where the
    labels, optional, say which rows are ignored.
    """

    def forward(
        self, student_logits: Tensor, teacher_logits: TeacherLogits, labels: Tensor | None = None
    ) -> Tensor:
        return self._function(student_logits, teacher_logits, labels=labels, **self._held())


DIST = register(
    LossSpec(
        name="dist",
        checks={
            "reduction": of_batch,
            "beta": _checks.non_negative,
            "gamma": _checks.non_negative,
            "tau": number_temperature,
            "eps": _checks.non_negative,
        },
        title="DIST",
        paper="Huang et al., NeurIPS 2022 (2205.10536)",
        function=dist_loss,
        module=DISTLoss,
        reference=reference,
        family="correlation",
        formula="β·τ²·(1 − mean ρ of rows) + γ·τ²·(1 − mean ρ of columns)",
        temperature="τ² in, on both terms",
        reduction="mean over rows and over classes",
        takes_target=True,
        target_name="labels",
        eps="1e-8, added to the product of the norms",
        samples=(
            {},
            {"tau": 4.0},
            {"beta": 2.0, "gamma": 0.0},
            {"beta": 0.0, "gamma": 0.5, "loss_weight": 0.25, "eps": 1e-6},
        ),
        laws=("non_negative", "shift", "affine"),
    )
)

"""The public path of the correlation losses (family ``correlation``)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import _checks, _reduce
from ._autograd import apply, by_both
from ._calls import CorrelationCall
from ._dispatch import choose, choose_beside_cuda
from ._dtensor import gathered
from ._rowwise import indices
from .reference._rows import weighted
from .registry import LossSpec


@gathered
def correlation_loss(
    spec: LossSpec,
    student: Tensor,
    teacher: Tensor,
    *,
    labels: Tensor | None,
    ignore_index: int | None,
    beta: float,
    gamma: float,
    tau: float,
    eps: float,
    reduction: str,
    loss_weight: float,
    backend: str | None,
    teacher_grad: bool = False,
) -> Tensor:
    """Check the inputs, choose the backend and run it; ``beta`` weighs rows, ``gamma`` columns."""
    code = _checks.batch_reduction(reduction)
    class_dim = _checks.logits(student, teacher, spec.least_classes, teacher_grad)
    counted = counted_rows(spec, student, labels, class_dim, ignore_index)
    chosen = (choose if counted is None else choose_beside_cuda)(spec, student, backend)
    if chosen != "native":  # which checks it itself
        _checks.allocated("student_logits", student)
        _checks.allocated("teacher_logits", teacher)
    if chosen == "reference":
        s, t = _reduce.promote(student, teacher)
        s, t = _reduce.as_rows(s, class_dim), _reduce.as_rows(t, class_dim)
        name = "sum" if code == _checks.REDUCTIONS["sum"] else "mean"
        loss = spec.reference(
            s, t, counted, beta=beta, gamma=gamma, tau=tau, eps=eps, reduction=name
        )
        return weighted(loss, loss_weight)
    scale = loss_weight * tau * tau
    numbers = [beta * scale, gamma * scale, tau, eps]
    call = CorrelationCall(spec.rule, numbers, None, class_dim, code)
    return by_both(lambda x, y: apply(chosen, "correlation", x, call, y, counted), student, teacher)


def counted_rows(
    spec: LossSpec, student: Tensor, labels: Any, class_dim: int, ignore_index: int | None
) -> Tensor | None:
    """Which rows are not ignored, (rows,), of labels that are checked; None where all count."""
    if ignore_index is not None:
        ignore_index = _checks.integer("ignore_index", ignore_index)
    if labels is None:
        return None
    target, ignored = indices(spec, student, labels, class_dim, ignore_index, True)
    return None if target is None else (target.long() != ignored).reshape(-1)

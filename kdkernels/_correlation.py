"""The public path of the correlation losses (family ``correlation``)."""

from __future__ import annotations

from torch import Tensor

from . import _checks, _reduce
from ._autograd import apply
from ._calls import CorrelationCall
from ._dispatch import choose
from ._dtensor import gathered
from .registry import LossSpec


@gathered
def correlation_loss(
    spec: LossSpec,
    student: Tensor,
    teacher: Tensor,
    *,
    beta: float,
    gamma: float,
    tau: float,
    eps: float,
    reduction: str,
    loss_weight: float,
    backend: str | None,
) -> Tensor:
    """Check the inputs, choose the backend and run it; ``beta`` weighs rows, ``gamma`` columns."""
    code = _checks.batch_reduction(reduction)
    class_dim = _checks.logits(student, teacher)
    chosen = choose(spec, student, backend)
    if chosen != "native":  # which checks it itself
        _checks.allocated("student_logits", student)
        _checks.allocated("teacher_logits", teacher)
    if chosen == "reference":
        s, t = _reduce.promote(student, teacher)
        s, t = _reduce.as_rows(s, class_dim), _reduce.as_rows(t, class_dim)
        name = "sum" if code == _checks.REDUCTIONS["sum"] else "mean"
        return loss_weight * spec.reference(
            s, t, beta=beta, gamma=gamma, tau=tau, eps=eps, reduction=name
        )
    scale = loss_weight * tau * tau
    numbers = [beta * scale, gamma * scale, tau, eps]
    call = CorrelationCall(spec.name, numbers, None, class_dim, code)
    return apply(chosen, "correlation", student, call, teacher)

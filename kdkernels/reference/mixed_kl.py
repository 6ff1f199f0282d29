"""KL and reverse KL weighted by w and 1 - w: the specification.

    p = softmax(teacher / T),  q = softmax(student / T)          per row
    loss_row = w KL(p || q) + (1 - w) KL(q || p)                 0 <= w <= 1
    d loss_row / d student_i = (w (q_i - p_i) + (1 - w) q_i (log(q_i / p_i) - KL(q || p))) / T

Edges: those of KL for w > 0 and of reverse KL for w < 1; a term of weight 0 is not there. A row
that is all -inf, or holds NaN or +inf, gives NaN and touches no other row.
"""

from __future__ import annotations

from torch import Tensor

from ._rows import rescale
from ._tokens import kl_terms, log_softmax


def mixed_kl(
    student: Tensor,
    teacher: Tensor,
    *,
    forward_weight: float = 0.5,
    temperature: float = 1.0,
    standardize: bool = False,
) -> Tensor:
    """Divergence of each row: (rows, classes) x (rows, classes) -> (rows,)."""
    student, teacher = rescale(student, teacher, temperature, standardize)
    log_p, log_q = log_softmax(teacher), log_softmax(student)
    if forward_weight == 1.0:
        return kl_terms(log_p, log_q).sum(-1)
    reverse = (1 - forward_weight) * kl_terms(log_q, log_p).sum(-1)
    if forward_weight == 0.0:
        return reverse
    return forward_weight * kl_terms(log_p, log_q).sum(-1) + reverse

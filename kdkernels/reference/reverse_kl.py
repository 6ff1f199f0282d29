"""Reverse KL (MiniLLM, GKD and others): the specification.

    p = softmax(teacher / T),  q = softmax(student / T)          per row
    loss_row = KL(q || p) = sum_i q_i (log q_i - log p_i)
    d loss_row / d student_i = q_i (log q_i - log p_i - loss_row) / T

Edges: a class with q_i = 0 contributes 0 whatever p_i is. A class that the teacher excludes and the
student does not, p_i = 0 < q_i, makes the loss +inf, and there is no gradient: the row's is not
finite. A row that is all -inf, or holds NaN or +inf, gives NaN and touches no other row.
"""

from __future__ import annotations

from torch import Tensor

from ._rows import rescale
from ._tokens import kl_terms, log_softmax


def reverse_kl(
    student: Tensor, teacher: Tensor, *, temperature: float = 1.0, standardize: bool = False
) -> Tensor:
    """Divergence of each row: (rows, classes) x (rows, classes) -> (rows,)."""
    student, teacher = rescale(student, teacher, temperature, standardize)
    return kl_terms(log_softmax(student), log_softmax(teacher)).sum(-1)

"""KD (Hinton et al., 2015): the specification.

    p = softmax(teacher / T),  q = softmax(student / T)          per row
    loss_row = sum_i p_i (log p_i - log q_i)                      (times T^2, outside)
    d loss_row / d student_i = (q_i - p_i) / T

Edges: a class with p_i = 0 contributes 0 whatever q_i is; q_i = 0 < p_i gives +inf with a finite
gradient; a row that is all -inf, or holds NaN or +inf, gives NaN and touches no other row.
"""

from __future__ import annotations

from torch import Tensor

from ._rows import divergence, log_ratio, logsumexp, rescale


def kd(
    student: Tensor, teacher: Tensor, *, temperature: float = 4.0, standardize: bool = False
) -> Tensor:
    """KL divergence of each row: (rows, classes) x (rows, classes) -> (rows,)."""
    student, teacher = rescale(student, teacher, temperature, standardize)
    log_p, log_q = teacher.log_softmax(-1), student.log_softmax(-1)
    d, _ = log_ratio(teacher - student, log_p, log_q, logsumexp(teacher), logsumexp(student))
    return divergence(log_p, log_q, d)

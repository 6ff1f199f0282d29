"""KL from sampled tokens, by the estimators k1, k2 and k3: the specification.

    d = log p(y) - log q(y),  y the sampled id, q = softmax(student), p the teacher's probability
    k1:  loss_row = -d               d loss_row / d student = grad log q(y)
    k2:  loss_row = d^2 / 2          d loss_row / d student = -d grad log q(y)
    k3:  loss_row = e^d - 1 - d      d loss_row / d student = (1 - e^d) grad log q(y)

with (grad log q(y))_i = 1[i = y] - q_i. A row that is all -inf, or holds NaN or +inf, gives NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .hard import cross_entropy


def sampled_kl(
    student: Tensor,
    teacher: Tensor,
    *,
    sampled_ids: Tensor,
    teacher_logprob: Tensor,
    estimator: str = "k2",
    temperature: float = 1.0,
    standardize: bool = False,
) -> Tensor:
    """Estimate of each row: (rows, classes) -> (rows,).

    The ``teacher``'s logits are not read, nor is the temperature, which is 1; ids out of range are
    those of ignored rows.
    """
    ids = sampled_ids.reshape(-1).long().clamp(0, student.shape[-1] - 1)
    return estimate(-cross_entropy(student, ids), teacher_logprob.reshape(-1), estimator)


def estimate(logprob: Tensor, teacher_logprob: Tensor, estimator: str) -> Tensor:
    """The estimator of each row, from the log-probabilities of its sampled id."""
    d = teacher_logprob.to(logprob.dtype) - logprob
    if estimator == "k1":
        return -d
    return d * d / 2 if estimator == "k2" else torch.expm1(d) - d

"""What every row loss may give besides its divergence: cross-entropy of the labels, entropy of q.

    cross_entropy_n = logsumexp_i(student_ni) - student_n,target        at temperature 1
    entropy_n = -sum_i q_ni log q_ni,  q = softmax(student / T)          the loss's own q

Cross-entropy comes from the odds of the other classes against the target, log(1 + odds), so that a
confident student keeps its digits, as its gradient 1 - probability does.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._rows import logsumexp, masked_log_softmax, rescale, top


def cross_entropy(student: Tensor, target: Tensor) -> Tensor:
    """(rows, classes) x (rows,) -> (rows,)."""
    student = student - top(student)  # an offset that all classes share must not cost digits
    index = target.unsqueeze(-1)
    excluded = torch.arange(student.shape[-1], device=student.device) == index
    # Its NaN and +inf make the row NaN.
    logit = student.gather(-1, index).squeeze(-1)
    logit = torch.where(logit == torch.inf, torch.nan, logit)
    _, others = masked_log_softmax(student, excluded)
    both = (others == -torch.inf) & (logit == -torch.inf)
    return F.softplus(torch.where(both, torch.nan, others - logit), threshold=40.0)


def entropy(student: Tensor, temperature: float | Tensor, standardize: bool) -> Tensor:
    """(rows, classes) -> (rows,); a constant."""
    with torch.no_grad():
        scaled, _ = rescale(student, student, temperature, standardize)
        q = scaled.softmax(-1)
        return logsumexp(scaled) - torch.where(q == 0, 0.0, q * scaled).sum(-1)

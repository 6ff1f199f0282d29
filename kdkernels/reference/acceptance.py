"""Negative log acceptance rate, and the mixture of KL and total variation by it: the specification.

    p = softmax(teacher / T),  q = softmax(student / T)          per row
    a = sum_i min(p_i, q_i) = 1 - TV(p, q)                       the rate of speculative decoding
    log:     loss_row = -log a,      d loss_row / d student = (d TV / d student) / a
    hybrid:  loss_row = w KL(p || q) + (1 - w) TV(p, q),   w = exp(-eta a), a constant

Edges: those of total variation, and for the hybrid also those of KL. An overlap ``a`` below
``tiny * 2^36`` of the dtype, where the probabilities underflow, counts as that and has no gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._rows import rescale, weighted
from ._tokens import kl_terms, log_softmax
from .tv import distance as total_variation

LEAST = 2.0**36
"""The least overlap that counts, in units of the least normal number."""


def acceptance(
    student: Tensor,
    teacher: Tensor,
    *,
    kind: str = "log",
    eta: float = 3.0,
    temperature: float = 1.0,
    standardize: bool = False,
) -> Tensor:
    """Loss of each row: (rows, classes) x (rows, classes) -> (rows,)."""
    student, teacher = rescale(student, teacher, temperature, standardize)
    log_p, log_q = log_softmax(teacher), log_softmax(student)
    distance = total_variation(log_p, log_q)
    if kind == "hybrid":
        return mixture(kl_terms(log_p, log_q).sum(-1), distance, eta)
    # From whichever of a and total variation is smaller, and so exact. The softmaxes' small
    # probabilities have more digits than the exponentials of rounded logarithms.
    near = distance < 0.5
    p, q = teacher.softmax(-1), student.detach().softmax(-1)
    low = torch.minimum(p, q)
    equal = (log_p - log_q).detach().abs() <= 16 * torch.finfo(low.dtype).eps
    part = torch.where(equal, 0.5, (q < p).to(low.dtype))  # as sign 0 of total variation
    growth = torch.where((part * low == 0) | near.unsqueeze(-1), 0.0, log_q)
    a = (low * torch.exp(part * (growth - growth.detach()))).sum(-1)
    far = -a.clamp(min=torch.finfo(a.dtype).tiny * LEAST).log()
    return torch.where(near, -torch.log1p(-torch.where(near, distance, 0.0)), far)


def mixture(divergence: Tensor, distance: Tensor, eta: float) -> Tensor:
    """w KL + (1 - w) TV; a term of weight 0 is not there."""
    weight = torch.exp(eta * (distance.detach() - 1))
    return weighted(divergence, weight) + weighted(distance, 1 - weight)

"""DIST, Knowledge Distillation from A Stronger Teacher (Huang et al., NeurIPS 2022): specification.

    p = softmax(teacher / tau),  q = softmax(student / tau)      per row, (B, C)
    pearson(a, b) = <a - mean a, b - mean b> / (||a - mean a|| ||b - mean b|| + eps)
    inter = 1 - mean_b pearson(q[b, :], p[b, :])
    intra = 1 - mean_c pearson(q[:, c], p[:, c])
    loss  = beta tau^2 inter + gamma tau^2 intra

eps is added to the *product* of the norms, as in the authors' code. The gradient flows through the
student's means and norms; the derivative of a norm at 0 is taken as 0. A constant row or column
has the correlation 0, whatever eps is. With reduction 'sum' the two
means are sums. No rows: 0.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pearson(a: Tensor, b: Tensor, dim: int, eps: float) -> Tensor:
    """Pearson correlation along ``dim``."""
    # From the first one: the mean of a constant is that constant, the norm exactly 0.
    a, b = (x - x.narrow(dim, 0, 1).detach() for x in (a, b))
    a = a - a.mean(dim, keepdim=True)
    b = b - b.mean(dim, keepdim=True)
    norms = torch.linalg.vector_norm(a, dim=dim) * torch.linalg.vector_norm(b, dim=dim)
    total = norms + eps
    none = total < 1024 * torch.finfo(total.dtype).tiny
    return torch.where(none, 0.0, (a * b).sum(dim) / torch.where(none, 1.0, total))


def dist(
    student: Tensor,
    teacher: Tensor,
    *,
    beta: float = 1.0,
    gamma: float = 1.0,
    tau: float = 1.0,
    eps: float = 1e-8,
    reduction: str = "mean",
) -> Tensor:
    """The loss of a whole batch: (rows, classes) x (rows, classes) -> scalar."""
    if student.shape[0] == 0:
        return student.sum()
    q = torch.softmax(student / tau, -1)
    p = torch.softmax(teacher / tau, -1)
    inter = 1 - pearson(q, p, 1, eps)
    intra = 1 - pearson(q, p, 0, eps)
    if reduction == "sum":
        return tau**2 * (beta * inter.sum() + gamma * intra.sum())
    return tau**2 * (beta * inter.mean() + gamma * intra.mean())

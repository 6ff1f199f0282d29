"""DIST, Knowledge Distillation from A Stronger Teacher (Huang et al., NeurIPS 2022): specification.

    p = softmax(teacher / tau),  q = softmax(student / tau)      per row, (B, C)
    pearson(a, b) = <a - mean a, b - mean b> / (||a - mean a|| ||b - mean b|| + eps)
    inter = 1 - mean_b pearson(q[b, :], p[b, :])
    intra = 1 - mean_c pearson(q[:, c], p[:, c])
    loss  = beta tau^2 inter + gamma tau^2 intra

eps is added to the *product* of the norms, as in the authors' code. The gradient flows through the
student's means and norms; the derivative of a norm at 0 is taken as 0. A constant row or column
has the correlation 0, whatever eps is. With reduction 'sum' the two
means are sums. Rows that are not counted are as if they were not there, in columns too, and have
the gradient 0, whatever they hold. No rows: 0.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def pearson(a: Tensor, b: Tensor, dim: int, eps: float, counted: Tensor | None = None) -> Tensor:
    """Pearson correlation along ``dim``; of what a mask counts, which broadcasts to ``a``."""

    def centred(x: Tensor) -> Tensor:
        # From the first one: the mean of a constant is that constant, the norm exactly 0.
        if counted is None:
            x = x - x.narrow(dim, 0, 1).detach()
            return x - x.mean(dim, keepdim=True)
        x = x - x.index_select(dim, counted.long().argmax(dim)).detach()
        count = counted.sum(dim, keepdim=True).clamp(min=1)
        mean = torch.where(counted, x, 0.0).sum(dim, keepdim=True) / count
        return torch.where(counted, x - mean, 0.0)

    a, b = centred(a), centred(b)
    norms = torch.linalg.vector_norm(a, dim=dim) * torch.linalg.vector_norm(b, dim=dim)
    total = norms + eps
    none = total < 1024 * torch.finfo(total.dtype).tiny
    return torch.where(none, 0.0, (a * b).sum(dim) / torch.where(none, 1.0, total))


def dist(
    student: Tensor,
    teacher: Tensor,
    counted: Tensor | None = None,
    *,
    beta: float = 1.0,
    gamma: float = 1.0,
    tau: float = 1.0,
    eps: float = 1e-8,
    reduction: str = "mean",
    activation: Callable[[Tensor, int], Tensor] = torch.softmax,
) -> Tensor:
    """The loss of a batch: (rows, classes) x (rows, classes) -> scalar; ``counted`` is (rows,).

    ``activation`` makes probabilities of logits, along a dimension.
    """
    if student.shape[0] == 0:
        return student.sum()
    mask = None
    if counted is not None:
        mask = counted.unsqueeze(1)
        student, teacher = (torch.where(mask, x, 0.0) for x in (student, teacher))
    q = activation(student / tau, -1)
    p = activation(teacher / tau, -1)
    inter = 1 - pearson(q, p, 1, eps)
    intra = 1 - pearson(q, p, 0, eps, mask)
    rows: int | Tensor = inter.shape[0]
    if counted is not None:
        inter = torch.where(counted, inter, 0.0)
        intra = torch.where(counted.any(), intra, 0.0)
        rows = counted.sum().clamp(min=1)
    if reduction == "sum":
        return tau**2 * (beta * inter.sum() + gamma * intra.sum())
    return tau**2 * (beta * inter.sum() / rows + gamma * intra.mean())

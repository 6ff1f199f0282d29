"""RKD, Relational Knowledge Distillation (Park et al., CVPR 2019; 1904.05068): the specification.

    d_ij = sqrt(max(||e_i - e_j||^2, 1e-12)), 0 on the diagonal;  mu = mean of the d_ij > 0
    L_D = mean_ij h(d_ij^S / mu_S - d_ij^T / mu_T)          h: smooth L1 with beta = 1
    A_ijk = <u_ij, u_ik>,  u_ij = (e_j - e_i) / max(||e_j - e_i||, 1e-12), 0 between equal rows
    L_A = mean_ijk h(A_ijk^S - A_ijk^T)                 (reduction 'sum': sums in place of means)
    loss = distance_weight L_D + angle_weight L_A

No samples: 0. The relations come from the Gram matrix of the centred embeddings, in float64 because
it cancels: <e_j - e_i, e_k - e_i> = G_jk - G_ij - G_ik + G_ii. The B^3 angles are never held at
once: anchors pass in blocks that also leave their gradient by G. To differentiate that again
(``create_graph=True``) holds them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._tracing import transformed

BLOCK = 1 << 20
"""Angles held at once."""


def gram(embeddings: Tensor) -> Tensor:
    """Inner products of the centred rows of (B, D), in float64."""
    x = embeddings.double()
    x = x - x.mean(0, keepdim=True)
    return x @ x.T


def squared_distances(g: Tensor) -> Tensor:
    norms = g.diagonal()
    return norms[:, None] + norms[None, :] - 2 * g


def relative_distances(g: Tensor) -> Tensor:
    """Distances over their mean; all 0 for a single row."""
    off = ~torch.eye(len(g), dtype=torch.bool, device=g.device)
    d = torch.where(off, squared_distances(g).clamp(min=1e-12).sqrt(), 0.0)
    return d / (d.sum() / off.sum().clamp(min=1)).clamp(min=1e-12)


def _inverse_distances(g: Tensor) -> Tensor:
    """1 / distance, and 0 between rows that are equal up to the rounding of the products."""
    squares = squared_distances(g)
    noise = 16 * torch.finfo(g.dtype).eps * g.diagonal().amax()
    apart = squares > noise
    return torch.where(apart, torch.where(apart, squares, 1.0).rsqrt(), 0.0)


def _dots(g: Tensor, begin: int, end: int) -> Tensor:
    """<e_j - e_i, e_k - e_i> for the anchors i in a block: (block, B, B)."""
    rows = g[begin:end]
    own = g.diagonal()[begin:end]
    return g[None] - rows[:, :, None] - rows[:, None, :] + own[:, None, None]


def _angles(student: Tensor, teacher: Tensor, need_gradient: bool) -> tuple[Tensor, Tensor]:
    """Sum over ijk of h(A^S - A^T) from two Gram matrices, and its gradient by the student's.

    Both may be differentiated themselves.
    """
    samples = len(student)
    inverse, inverse_t = _inverse_distances(student), _inverse_distances(teacher)
    total = student.new_zeros(())
    gradient = torch.zeros_like(student)
    by_inverse = []
    size = max(BLOCK // max(samples * samples, 1), 1)
    for begin in range(0, samples, size):
        end = min(begin + size, samples)
        r, q = inverse[begin:end], inverse_t[begin:end]
        outer = r[:, :, None] * r[:, None, :]
        dots = _dots(student, begin, end)
        gap = dots * outer - _dots(teacher, begin, end) * (q[:, :, None] * q[:, None, :])
        slope = gap.clamp(-1, 1)
        total = total + (slope * (gap - 0.5 * slope)).sum()
        if not need_gradient:
            continue
        by_dot = slope * outer
        by_row = by_dot.sum(2)
        gradient += by_dot.sum(0)
        gradient[begin:end] -= 2 * by_row
        gradient.diagonal()[begin:end] += by_row.sum(1)
        by_inverse.append(2 * torch.einsum("ijk,ik->ij", slope * dots, r))
    if need_gradient:
        by_square = -0.5 * torch.cat(by_inverse) * inverse**3
        gradient = gradient - 2 * by_square + torch.diag(by_square.sum(0) + by_square.sum(1))
    return total, gradient


class _Angles(torch.autograd.Function):
    """The sum of the angles, with the gradient that its blocks leave."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        total, gradient = _angles(student, teacher, ctx.needs_input_grad[0])
        ctx.save_for_backward(student, teacher, gradient)
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        student, teacher, gradient = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            _, gradient = _angles(student, teacher, True)  # create_graph=True: as a function
        return gradient * upstream, None


_apply: Callable[..., Tensor] = _Angles.apply


def _sum_of_angles(student: Tensor, teacher: Tensor) -> Tensor:
    if transformed():
        return _angles(student, teacher, False)[0]  # every transform knows the operations
    return _apply(student, teacher)


def rkd(
    student: Tensor,
    teacher: Tensor,
    *,
    distance_weight: float = 25.0,
    angle_weight: float = 50.0,
    reduction: str = "mean",
) -> Tensor:
    """(B, D) x (B, D') -> scalar float64."""
    if len(student) == 0:
        return student.double().sum()
    s, t = gram(student), gram(teacher)
    samples = max(len(s), 1) if reduction != "sum" else 1
    loss = (
        distance_weight
        / samples**2
        * F.smooth_l1_loss(relative_distances(s), relative_distances(t), reduction="sum")
    )
    if angle_weight:
        loss = loss + angle_weight / samples**3 * _sum_of_angles(s, t)
    return loss

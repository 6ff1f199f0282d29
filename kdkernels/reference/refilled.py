"""REFILLED (Ye et al., CVPR 2020; 2205.01915): the specification of both stages.

Stage 1, on the Euclidean distances D of L2-normalised embeddings (a: anchor, p: positive of the
same class, n: negative of another class):

    semi-hard:  0 < D_S[a, n] - D_S[a, p] <= margin          mined by the student
    tuple (a, p) with its semi-hard n_1 .. n_m, m >= 1
    pi = softmax([-D_ap, -D_an1, ..., -D_anm] / temperature)   of teacher and student
    loss = mean over tuples of KL(pi_T || pi_S)

KL is summed as pi_T phi(log pi_T - log pi_S) with phi(d) = exp(-d) - 1 + d, because the temperature
makes the two distributions almost equal. The derivative of a distance at 0 is 0. No tuple: 0.

Stage 2, with c_k the normalised class centres and K' the classes present in ``target``:

    loss = mean over samples of KL(softmax(phi_T . c_K' / T) || softmax(z_K' / T))
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._rows import kl_terms, probabilities
from .kd import kd

NEAR = 1e-14
"""Squared distances up to here are rounding errors of the float64 product."""


def distances(embeddings: Tensor) -> Tensor:
    """Euclidean distances of the normalised rows of (B, D), in float64.

    In float64, because the squares of small distances are lost in a float32 product.
    """
    x = F.normalize(embeddings.double(), dim=1, eps=1e-12)
    norms = (x * x).sum(1)
    squares = norms[:, None] + norms[None, :] - 2 * x @ x.T
    near = squares <= NEAR
    return torch.where(near, 0.0, torch.where(near, 1.0, squares).sqrt())


def semihard(distance: Tensor, target: Tensor, margin: float) -> Tensor:
    """Boolean (B, B, B): whether [anchor, positive, negative] is a semi-hard triplet."""
    same = target[:, None] == target[None, :]
    positive = same & ~torch.eye(len(target), dtype=torch.bool, device=target.device)
    gap = distance[:, None, :] - distance[:, :, None]
    return positive[:, :, None] & ~same[:, None, :] & (gap > 0) & (gap <= margin)


def unseen(distance: Tensor) -> Tensor:
    """0, and NaN where a distance is: no comparison of the miner finds it, and every row's gradient
    by the products behind the distances is NaN."""
    return 0.0 * distance.detach().sum()


def matching(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    *,
    margin: float,
    temperature: float,
    reduction: str,
) -> Tensor:
    """Stage 1 from two (B, B) matrices of distances; memory of the order B^3."""
    mask = semihard(student.detach(), target, margin)
    tuples = mask.any(-1)
    member = torch.cat([torch.ones_like(mask[:, :, :1]), mask], -1)

    def log_softmax(distance: Tensor) -> Tensor:
        negatives = distance[:, None, :].expand(mask.shape)
        logits = -torch.cat([distance[:, :, None], negatives], -1) / temperature
        return torch.log_softmax(logits.masked_fill(~member, -torch.inf), -1)

    log_p, log_q = log_softmax(teacher), log_softmax(student)
    keep = member & tuples[:, :, None]
    p, q = (torch.where(keep, probabilities(x), 0.0) for x in (log_p, log_q))
    d = torch.where(keep, log_p, 0.0) - torch.where(keep, log_q, 0.0)
    total = kl_terms(p, q, d).sum() + unseen(student)
    return total if reduction == "sum" else total / tuples.sum().clamp(min=1)


def tuple_matching(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    *,
    temperature: float = 4.0,
    margin: float = 0.2,
    reduction: str = "mean",
) -> Tensor:
    """Stage 1 from embeddings: (B, D) x (B, D') -> scalar."""
    double = torch.float64 in (student.dtype, teacher.dtype)
    dtype = torch.float64 if double else torch.float32
    return matching(
        distances(student).to(dtype),
        distances(teacher).to(dtype),
        target,
        margin=margin,
        temperature=temperature,
        reduction=reduction,
    )


def local_classifier(
    student: Tensor,
    teacher: Tensor,
    centers: Tensor,
    target: Tensor,
    *,
    temperature: float = 2.0,
    ignore_index: int | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Stage 2: (B, C) logits x (B, D) embeddings x (C, D) centres -> scalar, or (B,) for 'none'."""
    counted = torch.ones_like(target, dtype=torch.bool)
    if ignore_index is not None:
        counted = target != ignore_index
    local = target[counted].unique()
    logits = teacher[counted] @ centers.T
    rows = kd(student[counted][:, local], logits[:, local], temperature=temperature)
    if reduction == "none":
        return student.new_zeros(len(target), dtype=rows.dtype).masked_scatter(counted, rows)
    return rows.sum() if reduction == "sum" else rows.sum() / max(len(rows), 1)

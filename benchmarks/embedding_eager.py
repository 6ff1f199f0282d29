"""The embedding losses as people write them: the published forms in eager PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def iekd(inheritance: Tensor, exploration: Tensor, teacher: Tensor) -> Tensor:
    def factor_transfer(x: Tensor, y: Tensor) -> Tensor:
        x = F.normalize(x.reshape(x.shape[0], -1))
        y = F.normalize(y.reshape(y.shape[0], -1))
        return (x - y).abs().mean()

    near, far = factor_transfer(inheritance, teacher), factor_transfer(exploration, teacher)
    return 50.0 * near - 50.0 * far


def _triplets(distance: Tensor, target: Tensor, margin: float) -> tuple[Tensor, Tensor, Tensor]:
    """All (anchor, positive, negative) with 0 < D_an - D_ap <= margin, as miners do."""
    same = target[:, None] == target[None, :]
    different = ~same
    same = same.fill_diagonal_(False)
    gap = distance[:, None, :] - distance[:, :, None]
    mask = same[:, :, None] & different[:, None, :] & (gap > 0) & (gap <= margin)
    anchor, positive, negative = mask.nonzero(as_tuple=True)
    return anchor, positive, negative


def tuple_matching(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    """Triplets mined, merged by (anchor, positive) and padded with a distance of 1e9."""
    d_s, d_t = (torch.cdist(x, x) for x in (F.normalize(student), F.normalize(teacher)))
    with torch.no_grad():
        anchor, positive, negative = _triplets(d_s, target, 0.2)
    if len(anchor) == 0:
        return 0.0 * student.sum()
    pairs, which, sizes = torch.unique_consecutive(
        anchor * len(target) + positive, return_inverse=True, return_counts=True
    )
    first = sizes.cumsum(0) - sizes
    slot = torch.arange(len(anchor), device=anchor.device) - first[which]
    a, p = pairs // len(target), pairs % len(target)
    width = int(sizes.max())

    def logits(distance: Tensor) -> Tensor:
        padded = distance.new_full((len(pairs), width), 1e9)
        padded = padded.index_put((which, slot), distance[anchor, negative])
        return -torch.cat([distance[a, p][:, None], padded], 1) / 4.0

    log_q = F.log_softmax(logits(d_s), 1)
    pi = F.softmax(logits(d_t), 1)
    return 1000.0 * F.kl_div(log_q, pi, reduction="batchmean")


def local_classifier(student: Tensor, teacher: Tensor, centers: Tensor, target: Tensor) -> Tensor:
    local = target.unique()
    log_q = F.log_softmax(student[:, local] / 2.0, 1)
    p = F.softmax(teacher @ centers[local].T / 2.0, 1)
    return 100.0 * F.kl_div(log_q, p, reduction="batchmean")


def rkd(student: Tensor, teacher: Tensor) -> Tensor:
    def distances(e: Tensor) -> Tensor:
        square = e.pow(2).sum(1)
        d = (square[:, None] + square[None, :] - 2 * e @ e.T).clamp(min=1e-12).sqrt()
        d = d * (1 - torch.eye(len(e), device=e.device))
        return d / d[d > 0].mean()

    def angles(e: Tensor) -> Tensor:
        u = F.normalize(e[None] - e[:, None], p=2, dim=2)
        return torch.bmm(u, u.transpose(1, 2))

    with torch.no_grad():
        d_t, a_t = distances(teacher), angles(teacher)
    return 25.0 * F.smooth_l1_loss(distances(student), d_t) + 50.0 * F.smooth_l1_loss(
        angles(student), a_t
    )


def attention(student: Tensor, teacher: Tensor) -> Tensor:
    def at(f: Tensor) -> Tensor:
        return F.normalize(f.pow(2).mean(1).view(f.size(0), -1))

    return (at(student) - at(teacher)).pow(2).mean()


def hint(student: Tensor, teacher: Tensor) -> Tensor:
    return F.mse_loss(student, teacher)


def pkd(student: Tensor, teacher: Tensor) -> Tensor:
    def norm(f: Tensor) -> Tensor:
        n, c, h, w = f.shape
        f = f.permute(1, 0, 2, 3).reshape(c, -1)
        f = (f - f.mean(-1, keepdim=True)) / (f.std(-1, keepdim=True) + 1e-6)
        return f.reshape(c, n, h, w).permute(1, 0, 2, 3)

    return F.mse_loss(norm(student), norm(teacher)) / 2


EAGER: dict[str, Callable[..., Tensor]] = {
    f.__name__: f for f in (iekd, tuple_matching, local_classifier, rkd, attention, hint, pkd)
}

"""Attention transfer: the energies block by block of samples, the gradient in one pass.

With the energy e = mean_c |F_c|^p, n = ||e||, Q = e / n and G = dL / dQ:

    dL/de = (G - Q <Q, G>) / n
    dL/dF_c = dL/de  p / C  |F_c|^(p - 1) sign(F_c)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..reference.attention import attention_transfer as reference
from ._wide import wide

SMALLEST, LARGEST = 1e-10, 1e15
"""Energies whose powers, squares and gradients float32 holds; others take the reference."""
BLOCK = 1 << 17
"""Elements of a block: large beside the cost of a call, and in the cache."""


def attention(
    student: Tensor,
    teacher: Tensor,
    scale: float,
    reduction: int,
    need_gradient: bool,
    *,
    p: float,
) -> tuple[Tensor, Tensor | None]:
    energy, energy_t = _energy(student, p), _energy(teacher, p)
    if not (_ordinary(energy) and _ordinary(energy_t)):
        return wide(reference, student, teacher, scale, reduction, need_gradient, p=p)
    weight = scale / (max(energy.numel(), 1) if reduction == 1 else 1)
    q, norm = _normalise(energy)
    gap = q - _normalise(energy_t)[0]
    loss = gap.square().sum() * weight
    if not need_gradient:
        return loss, None
    slope = gap.mul_(2 * weight)
    along = (q * slope).sum((1, 2), keepdim=True)
    slope = (slope - q * along) * (p / student.shape[1]) / norm
    gradient = torch.empty_like(student)
    slope = slope.unsqueeze(1)
    if p == 2:
        return loss, torch.mul(student, slope, out=gradient)
    for block in _blocks(student):
        out = torch.abs(student[block], out=gradient[block])
        out.pow_(p - 1).mul_(student[block].sgn()).mul_(slope[block])
    return loss, gradient


def _blocks(features: Tensor) -> list[slice]:
    step = max(BLOCK // math.prod(features.shape[1:]), 1)
    return [slice(begin, begin + step) for begin in range(0, len(features), step)]


def _energy(features: Tensor, p: float) -> Tensor:
    """mean_c |F_c|^p, (B, H, W)."""
    samples, channels, height, width = features.shape
    energy = features.new_empty(samples, height, width)
    powers = None
    for block in _blocks(features):
        part = features[block]
        powers = torch.empty_like(part) if powers is None else powers[: len(part)]
        if p == 2:
            torch.mul(part, part, out=powers)
        else:
            torch.abs(part, out=powers).pow_(p)
        torch.sum(powers, 1, out=energy[block])
    return energy.div_(channels)


def _normalise(energy: Tensor) -> tuple[Tensor, Tensor]:
    """The map of norm 1, and the norm of each sample, (B, 1, 1)."""
    norm = torch.linalg.vector_norm(energy, dim=(1, 2), keepdim=True)
    return energy / norm, norm


def _ordinary(energy: Tensor) -> bool:
    """Whether every sample's largest energy is in range; not where one is NaN."""
    largest = energy.amax((1, 2))
    return bool(((largest >= SMALLEST) & (largest <= LARGEST)).all())

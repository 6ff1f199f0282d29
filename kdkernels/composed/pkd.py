r"""PKD, block by block of channels.

For a channel of M values with the centred s and t, the deviations sigma_s and sigma_t, the factors
a = 1 / (sigma_s + eps) and b = 1 / (sigma_t + eps), and the gap g = a s - b t:

    loss = w / 2 <g, g>
    dL/ds = w a (g - s a <g, s> / ((M - 1) sigma_s))      (without the second term at sigma_s = 0)

The loss is the sum of the squared gaps and never 1 - correlation, which cancels where student and
teacher agree.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference.pkd import EPS, pkd as reference
from ._wide import wide

BLOCK = 1 << 18
"""Elements of a block: large beside the cost of some twenty calls. Four are held at once."""


def pkd(
    student: Tensor, teacher: Tensor, scale: float, reduction: int, need_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    channels = student.shape[1]
    count = student.numel() // channels
    if count < 2:
        return wide(reference, student, teacher, scale, reduction, need_gradient)
    weight = scale / (student.numel() if reduction == 1 else 1)
    gradient = torch.empty_like(student) if need_gradient else None
    step = min(max(BLOCK // count, 1), channels)
    buffers = student.new_empty(2, 2, step, count)
    total = student.new_zeros((), dtype=torch.float64)
    deviations = []
    for begin in range(0, channels, step):
        block = slice(begin, begin + step)
        ours, theirs = (x[:, block].transpose(0, 1) for x in (student, teacher))
        both, products = buffers[:, :, : len(ours)]
        s, t = both  # a channel's values together, wherever they lie in the inputs
        # From its first value: a constant channel's mean is that constant, its deviation exactly 0.
        torch.sub(ours, ours[:, :1, :1, :1], out=s.view(ours.shape))
        torch.sub(theirs, theirs[:, :1, :1, :1], out=t.view(ours.shape))
        both -= both.sum(2, keepdim=True).div_(count)
        sigma = torch.mul(both, both, out=products).sum(2, keepdim=True).div_(count - 1).sqrt_()
        deviations.append(sigma)
        a, b = (sigma + EPS).reciprocal_()
        gap = torch.addcmul(t.mul_(-b), s, a, out=t)
        gap -= gap.sum(1, keepdim=True).div_(count)  # the means' rounding, if they are large
        along, squares = torch.mul(both, gap, out=products).sum(2, keepdim=True)
        total += squares.sum()
        if gradient is None:
            continue
        # Where sigma is 0, so are s and the product with it; no other sigma is as small.
        gap.addcmul_(s, along.mul_(a).div_(sigma[0].clamp(min=1e-30)), value=-1 / (count - 1))
        slope = a.mul_(weight)[:, :, None, None]
        torch.mul(gap.view(ours.shape), slope, out=gradient[:, block].transpose(0, 1))
    if not torch.cat(deviations, 1).isfinite().all():
        return wide(reference, student, teacher, scale, reduction, need_gradient)
    return (total * (weight / 2)).to(student.dtype), gradient

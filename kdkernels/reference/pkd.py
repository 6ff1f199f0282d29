"""PKD, Pearson correlation of feature maps (Cao et al., NeurIPS 2022; 2207.02039): specification.

    n(x) = (x - mean) / (std + 1e-6)     each channel over samples and positions, unbiased std
    loss = mean over all elements of (n(S) - n(T))^2 / 2      ('sum': the sum)

which is (1 - Pearson correlation) of a channel, averaged, times (M - 1) / M for M values a channel.
A constant channel becomes zeros; the derivative of its std is 0. A student of another size is
resized to the teacher's, bilinearly.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-6


def standardize(features: Tensor) -> Tensor:
    """Each channel of (N, C, H, W) to mean 0 and deviation 1."""
    # From its first value: a constant channel's mean is that constant, its deviation exactly 0.
    features = features - features[:1, :, :1, :1].detach()
    std, mean = torch.std_mean(features, (0, 2, 3), keepdim=True)
    return (features - mean) / (std + EPS)


def resize(student: Tensor, teacher: Tensor) -> Tensor:
    """The student at the teacher's height and width."""
    if student.shape[2:] == teacher.shape[2:]:
        return student
    return F.interpolate(student, size=teacher.shape[2:], mode="bilinear")


def pkd(student: Tensor, teacher: Tensor, *, reduction: str = "mean") -> Tensor:
    """(N, C, H, W) x (N, C, H', W') -> scalar."""
    student = resize(student, teacher)
    return F.mse_loss(standardize(student), standardize(teacher), reduction=reduction) / 2

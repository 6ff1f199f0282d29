"""Module parts that some methods put around their losses: heads, encoders, splits.

from kdkernels.nn import FactorAutoEncoder, FactorEncoder, TaskSerialization, split_channels
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor, nn

from . import _checks, _embedding
from ._dtypes import INTEGERS
from ._tracing import readable

__all__ = [
    "FactorAutoEncoder",
    "FactorEncoder",
    "HintRegressor",
    "TaskSerialization",
    "reconstruction_loss",
    "split_channels",
]


class TaskSerialization(nn.Linear):
    """AEKT's serial head: ``z_cls = W z_kd + b``, a square layer after the classifier.

    The distillation loss reads z_kd, cross-entropy and inference read z_cls, so that the two tasks
    do not pull the same logits apart. W starts as the identity and b as zero, so that training
    starts at the plain network.

    Reconstructed from the abstract of 2409.01679; the paper's exact head was not available.

    Args:
        num_classes: C; logits are (..., C).
    """

    def __init__(self, num_classes: int) -> None:
        _checks.at_least_one("num_classes", num_classes)
        super().__init__(num_classes, num_classes)

    def reset_parameters(self) -> None:
        nn.init.eye_(self.weight)
        nn.init.zeros_(self.bias)


def split_channels(
    features: Tensor, ratio: float = 0.5, permutation: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Split (B, C, ...) features into the inheritance and the exploration part (IE-KD).

    Args:
        features: (B, C, ...) with C >= 2.
        ratio: share of the channels that inherit, in (0, 1); each part has at least one channel.
        permutation: (C,) indices that order the channels before the split, fixed for a training
            (``torch.randperm(C)``: the published random split); None keeps the order.

    Returns:
        Two views of the features, or two parts of a permuted copy.
    """
    if not isinstance(features, Tensor):
        raise _checks.fail_type("features", "a Tensor", type(features).__name__)
    if features.dim() < 2 or features.shape[1] < 2:
        raise _checks.fail(
            "features", "(B, C, ...) of at least two channels", f"shape {tuple(features.shape)}"
        )
    ratio = _checks.number("ratio", ratio)
    if not 0.0 < ratio < 1.0:
        raise _checks.fail("ratio", "in (0, 1)", ratio)
    channels = features.shape[1]
    if permutation is not None:
        _checks.tensor("permutation", permutation, "a Tensor of channel indices")
        if permutation.dtype not in INTEGERS:
            raise _checks.fail_type("permutation", "integer channel indices", permutation.dtype)
        if permutation.shape != (channels,):
            raise _checks.fail("permutation", f"of shape {(channels,)}", tuple(permutation.shape))
        if readable(permutation):
            order = permutation.sort().values
            if not torch.equal(order.to(torch.int64), torch.arange(channels, device=order.device)):
                expected = f"each of the {channels} channels once"
                raise _checks.fail("permutation", expected, permutation.tolist())
        features = features.index_select(1, permutation.to(torch.int64))
    inherited = min(max(round(channels * ratio), 1), channels - 1)
    return features[:, :inherited], features[:, inherited:]


class FactorEncoder(nn.Sequential):
    """IE-KD's factor encoder: three 3x3 convolutions with batch norm and LeakyReLU(0.1).

    LeakyReLU, conv(in, in), BN, LeakyReLU, conv(in, out), BN, LeakyReLU, conv(out, out), BN,
    LeakyReLU; stride 1, padding 1, no bias, weights N(0, 2 / (9 out)): (B, in, H, W) -> (B, out, H,
    W).

    Args:
        in_channels: channels of the feature (of each half, for the student).
        out_channels: channels of the factor; the same for student and teacher.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        for name, value in (("in_channels", in_channels), ("out_channels", out_channels)):
            _checks.at_least_one(name, value)
        layers: list[nn.Module] = [nn.LeakyReLU(0.1)]
        widths = (in_channels, in_channels, out_channels, out_channels)
        for before, after in itertools.pairwise(widths):
            conv = nn.Conv2d(before, after, 3, padding=1, bias=False)
            nn.init.normal_(conv.weight, std=math.sqrt(2.0 / (9 * after)))
            layers += [conv, nn.BatchNorm2d(after), nn.LeakyReLU(0.1)]
        super().__init__(*layers)

    def __getitem__(self, index: Any) -> Any:
        """A layer, or some layers as a plain ``Sequential``."""
        if isinstance(index, slice):
            return nn.Sequential(*list(self)[index])
        return super().__getitem__(index)


class FactorAutoEncoder(nn.Module):
    """The teacher's factor auto-encoder of IE-KD: its code is the teacher's factor.

    Train it on the frozen teacher's features with :func:`reconstruction_loss` (published: 30
    epochs), then freeze it (``eval()``, no grad) and give ``encoder(feature)`` to ``IEKDLoss``.

    Args:
        in_channels: channels of the teacher's feature.
        factor_channels: channels of the factor (published: half as many).
    """

    def __init__(self, in_channels: int, factor_channels: int) -> None:
        super().__init__()
        self.encoder = FactorEncoder(in_channels, factor_channels)
        self.decoder = FactorEncoder(factor_channels, in_channels)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """The factor and the reconstruction of (B, C, H, W) features."""
        factor = self.encoder(features)
        return factor, self.decoder(factor)


def reconstruction_loss(features: Tensor, reconstruction: Tensor) -> Tensor:
    """mean |features - reconstruction|, as the published code has it (the paper squares).

    Two tensors of one shape; 0-d float32 (float64 if either input is).
    """
    for name, x in (("features", features), ("reconstruction", reconstruction)):
        _checks.tensor(name, x)
        _checks.dtype(name, x)
    if features.shape != reconstruction.shape:
        raise _checks.fail(
            "reconstruction", f"of shape {tuple(features.shape)}", tuple(reconstruction.shape)
        )
    reconstruction, features = _embedding.promote(reconstruction, features)
    if not features.numel():
        return reconstruction.sum()  # 0, with a gradient, as every loss of no samples
    return torch.nn.functional.l1_loss(reconstruction, features)


class HintRegressor(nn.Conv2d):
    """FitNet's regressor: a 1x1 convolution from the student's channels to the teacher's."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1)

"""What the losses share: weights that are tensors, and modules that hold the common arguments."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec

from torch import Tensor
from torch.nn.modules.loss import _Loss

from .. import _checks, _dispatch
from ..reference._rows import weighted

P = ParamSpec("P")


def weighed(function: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Let a loss's ``loss_weight`` be a 0-d tensor, which multiplies the loss where it is computed.

    The kernels take numbers, and to read one from a GPU the host would have to wait.
    """

    @functools.wraps(function)
    def call(*args: P.args, **options: P.kwargs) -> Tensor:
        if "loss_weight" in options and isinstance(options["loss_weight"], Tensor):
            return _weigh(function, options["loss_weight"], *args, **options)
        return function(*args, **options)

    return call


def _weigh(function: Callable[..., Tensor], weight: Tensor, *args: Any, **options: Any) -> Tensor:
    _checks.weight(weight)
    options["loss_weight"] = 1.0
    loss = function(*args, **options)
    if not weight.is_cpu and weight.device != loss.device:
        raise _checks.fail(
            "loss_weight", f"on the CPU or on the student's device {loss.device}", weight.device
        )
    return weighted(loss, weight.to(loss.dtype))


class LossModule(_Loss):
    """A loss module: holds the keyword arguments of its function and nothing else."""

    def __init__(
        self, *, reduction: str, loss_weight: float, backend: str | None, by_row: bool = True
    ) -> None:
        (_checks.reduction if by_row else _checks.batch_reduction)(reduction)
        super().__init__(reduction=reduction)
        self.loss_weight = _checks.weight(loss_weight)
        if backend is not None:
            _dispatch.known(backend)
        self.backend = backend

    def extra_repr(self) -> str:
        held = {k: v for k, v in vars(self).items() if not k.startswith("_") and k != "training"}
        return ", ".join(f"{key}={value!r}" for key, value in held.items())


class TokenLoss(LossModule):
    """A loss with one value a row and a mask."""

    def __init__(
        self, *, ignore_index: int, reduction: str, loss_weight: float, backend: str | None
    ) -> None:
        super().__init__(reduction=reduction, loss_weight=loss_weight, backend=backend)
        self.ignore_index = _checks.integer("ignore_index", ignore_index)


class RowLoss(TokenLoss):
    """A loss with one value a row, a mask and optional logit standardisation."""

    def __init__(
        self,
        *,
        ignore_index: int,
        reduction: str,
        loss_weight: float,
        standardize: bool,
        backend: str | None,
    ) -> None:
        super().__init__(
            ignore_index=ignore_index,
            reduction=reduction,
            loss_weight=loss_weight,
            backend=backend,
        )
        self.standardize = _checks.flag("standardize", standardize)

"""What the row-loss modules share: holding and checking the common keyword arguments."""

from __future__ import annotations

from torch.nn.modules.loss import _Loss

from .. import _checks, _dispatch


class LossModule(_Loss):
    """A loss module: holds the keyword arguments of its function and nothing else."""

    def __init__(
        self, *, reduction: str, loss_weight: float, backend: str | None, by_row: bool = True
    ) -> None:
        (_checks.reduction if by_row else _checks.batch_reduction)(reduction)
        super().__init__(reduction=reduction)
        self.loss_weight = _checks.number("loss_weight", loss_weight)
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

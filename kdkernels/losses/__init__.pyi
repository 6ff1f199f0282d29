"""Written by ``python -m kdkernels._stubs``: what type checkers read."""

from torch import Tensor

from ._base import RowLoss, SampledLoss, TokenLoss
from .attention import AttentionTransferLoss as AttentionTransferLoss
from ._centers import ClassCenters as ClassCenters
from .dist import DISTLoss as DISTLoss
from .hint import HintLoss as HintLoss
from .iekd import IEKDLoss as IEKDLoss
from .refilled import LocalClassifierLoss as LocalClassifierLoss
from .pkd import PKDLoss as PKDLoss
from .rkd import RKDLoss as RKDLoss
from .refilled import TupleMatchingLoss as TupleMatchingLoss
from .acceptance import acceptance_loss as acceptance_loss
from .aekt import aekt_loss as aekt_loss
from .alpha_beta import alpha_beta_loss as alpha_beta_loss
from .attention import attention_transfer_loss as attention_transfer_loss
from ._centers import class_centers as class_centers
from .dist import dist_loss as dist_loss
from .dkd import dkd_loss as dkd_loss
from .hint import hint_loss as hint_loss
from .iekd import iekd_loss as iekd_loss
from .jsd import jsd_loss as jsd_loss
from .kd import kd_loss as kd_loss
from .refilled import local_classifier_loss as local_classifier_loss
from .mixed_kl import mixed_kl_loss as mixed_kl_loss
from .pkd import pkd_loss as pkd_loss
from .reverse_kl import reverse_kl_loss as reverse_kl_loss
from .rkd import rkd_loss as rkd_loss
from .sampled_kl import sampled_kl_loss as sampled_kl_loss
from ._tuples import semihard_tuples as semihard_tuples
from .skew_kl import skew_kl_loss as skew_kl_loss
from .skew_reverse_kl import skew_reverse_kl_loss as skew_reverse_kl_loss
from .refilled import tuple_matching_loss as tuple_matching_loss
from .tv import tv_loss as tv_loss

class AEKTLoss(RowLoss):
    alpha: float
    beta: float
    temperature: float
    kappa: float
    ratio_max: float
    ignore_index: int | None
    reduction: str
    loss_weight: float | Tensor
    hard_weight: float
    return_parts: bool
    standardize: bool
    backend: str | None
    def __init__(
        self,
        alpha: float = ...,
        beta: float = ...,
        temperature: float = ...,
        kappa: float = ...,
        ratio_max: float = ...,
        *,
        ignore_index: int | None = ...,
        reduction: str = ...,
        loss_weight: float | Tensor = ...,
        hard_weight: float = ...,
        return_parts: bool = ...,
        standardize: bool = ...,
        backend: str | None = ...,
    ) -> None: ...

class AcceptanceLoss(TokenLoss):
    kind: str
    eta: float
    temperature: float
    ignore_index: int | None
    reduction: str
    loss_weight: float | Tensor
    hard_weight: float
    return_parts: bool
    backend: str | None
    def __init__(
        self,
        kind: str = ...,
        eta: float = ...,
        temperature: float = ...,
        *,
        ignore_index: int | None = ...,
        reduction: str = ...,
        loss_weight: float | Tensor = ...,
        hard_weight: float = ...,
        return_parts: bool = ...,
        backend: str | None = ...,
    ) -> None: ...

class AlphaBetaLoss(TokenLoss):
    alpha: float
    beta: float
    temperature: float
    ignore_index: int | None
    reduction: str
    loss_weight: float | Tensor
    hard_weight: float
    return_parts: bool
    backend: str | None
    def __init__(
        self,
        alpha: float = ...,
        beta: float = ...,
        temperature: float = ...,
        *,
        ignore_index: int | None = ...,
        reduction: str = ...,
        loss_weight: float | Tensor = ...,
        hard_weight: float = ...,
        return_parts: bool = ...,
        backend: str | None = ...,
    ) -> None: ...

class DKDLoss(RowLoss):
    alpha: float
    beta: float
    temperature: float
    ignore_index: int | None
    reduction: str
    loss_weight: float | Tensor
    hard_weight: float
    return_parts: bool
    standardize: bool
    backend: str | None
    def __init__(
        self,
        alpha: float = ...,
        beta: float = ...,
        temperature: float = ...,
        *,
        ignore_index: int | None = ...,
        reduction: str = ...,
        loss_weight: float | Tensor = ...,
        hard_weight: float = ...,
        return_parts: bool = ...,
        standardize: bool = ...,
        backend: str | None = ...,
    ) -> None: ...

class JSDLoss(TokenLoss):
    beta: float
    temperature: float
    ignore_index: int | None
    reduction: str
    loss_weight: float | Tensor
    hard_weight: float
    return_parts: bool
    backend: str | None
    def __init__(
        self,
        beta: float = ...,
        temperature: float = ...,
        *,
        ignore_index: int | None = ...,
        reduction: str = ...,
        loss_weight: float | Tensor = ...,
        hard_weight: float = ...,
        return_parts: bool = ...,
        backend: str | None = ...,
    ) -> None: ...

class KDLoss(RowLoss):
    temperature: float
    ignore_index: int | None
    reduction: str
    loss_weight: float | Tensor
    hard_weight: float
    return_parts: bool
    standardize: bool
    backend: str | None
    def __init__(
        self,
        temperature: float = ...,
        *,
        ignore_index: int | None = ...,
        reduction: str = ...,
        loss_weight: float | Tensor = ...,
        hard_weight: float = ...,
        return_parts: bool = ...,
        standardize: bool = ...,
        backend: str | None = ...,
    ) -> None: ...

class MixedKLLoss(TokenLoss):
    forward_weight: float | Tensor
    temperature: float
    ignore_index: int | None
    reduction: str
    loss_weight: float | Tensor
    hard_weight: float
    return_parts: bool
    backend: str | None
    def __init__(
        self,
        forward_weight: float | Tensor = ...,
        temperature: float = ...,
        *,
        ignore_index: int | None = ...,
        reduction: str = ...,
        loss_weight: float | Tensor = ...,
        hard_weight: float = ...,
        return_parts: bool = ...,
        backend: str | None = ...,
    ) -> None: ...

class ReverseKLLoss(TokenLoss):
    temperature: float
    ignore_index: int | None
    reduction: str
    loss_weight: float | Tensor
    hard_weight: float
    return_parts: bool
    backend: str | None
    def __init__(
        self,
        temperature: float = ...,
        *,
        ignore_index: int | None = ...,
        reduction: str = ...,
        loss_weight: float | Tensor = ...,
        hard_weight: float = ...,
        return_parts: bool = ...,
        backend: str | None = ...,
    ) -> None: ...

class SampledKLLoss(SampledLoss):
    estimator: str
    ignore_index: int | None
    reduction: str
    loss_weight: float | Tensor
    hard_weight: float
    return_parts: bool
    backend: str | None
    def __init__(
        self,
        estimator: str = ...,
        *,
        ignore_index: int | None = ...,
        reduction: str = ...,
        loss_weight: float | Tensor = ...,
        hard_weight: float = ...,
        return_parts: bool = ...,
        backend: str | None = ...,
    ) -> None: ...

class SkewKLLoss(TokenLoss):
    alpha: float
    temperature: float
    ignore_index: int | None
    reduction: str
    loss_weight: float | Tensor
    hard_weight: float
    return_parts: bool
    backend: str | None
    def __init__(
        self,
        alpha: float = ...,
        temperature: float = ...,
        *,
        ignore_index: int | None = ...,
        reduction: str = ...,
        loss_weight: float | Tensor = ...,
        hard_weight: float = ...,
        return_parts: bool = ...,
        backend: str | None = ...,
    ) -> None: ...

class SkewReverseKLLoss(TokenLoss):
    alpha: float
    temperature: float
    ignore_index: int | None
    reduction: str
    loss_weight: float | Tensor
    hard_weight: float
    return_parts: bool
    backend: str | None
    def __init__(
        self,
        alpha: float = ...,
        temperature: float = ...,
        *,
        ignore_index: int | None = ...,
        reduction: str = ...,
        loss_weight: float | Tensor = ...,
        hard_weight: float = ...,
        return_parts: bool = ...,
        backend: str | None = ...,
    ) -> None: ...

class TVLoss(TokenLoss):
    temperature: float
    ignore_index: int | None
    reduction: str
    loss_weight: float | Tensor
    hard_weight: float
    return_parts: bool
    backend: str | None
    def __init__(
        self,
        temperature: float = ...,
        *,
        ignore_index: int | None = ...,
        reduction: str = ...,
        loss_weight: float | Tensor = ...,
        hard_weight: float = ...,
        return_parts: bool = ...,
        backend: str | None = ...,
    ) -> None: ...

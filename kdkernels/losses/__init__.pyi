"""Written by ``python -m kdkernels._stubs``: what type checkers read."""

from typing import Any, Literal, overload

from torch import Tensor

from .._ensemble import TeacherLogits
from .._group import ProcessGroup
from .._rowwise import LossParts
from ._base import LossModule, RowLoss, SampledLoss, SparseLoss, TokenLoss
from ._centers import ClassCenters as ClassCenters
from .topk_kd import TopKMass as TopKMass
from .attention import attention_transfer_loss as attention_transfer_loss
from ._centers import class_centers as class_centers
from .dist import dist_loss as dist_loss
from .hint import hint_loss as hint_loss
from .iekd import iekd_loss as iekd_loss
from .refilled import local_classifier_loss as local_classifier_loss
from .pkd import pkd_loss as pkd_loss
from .rkd import rkd_loss as rkd_loss
from ._tuples import semihard_tuples as semihard_tuples
from .sigmoid_dist import sigmoid_dist_loss as sigmoid_dist_loss
from .sigmoid_kd import sigmoid_kd_loss as sigmoid_kd_loss
from .refilled import tuple_matching_loss as tuple_matching_loss

@overload
def acceptance_loss(
    student_logits: Tensor,
    teacher_logits: TeacherLogits,
    labels: Tensor | None = ...,
    kind: str = ...,
    eta: float = ...,
    temperature: float | Tensor = ...,
    *,
    ignore_index: int | None = ...,
    reduction: str = ...,
    loss_weight: float | Tensor = ...,
    hard_weight: float = ...,
    token_weight: Tensor | None = ...,
    num_items_in_batch: float | Tensor | None = ...,
    return_parts: Literal[False] = ...,
    teacher_grad: bool = ...,
    process_group: ProcessGroup | None = ...,
    tp_group: ProcessGroup | None = ...,
    backend: str | None = ...,
) -> Tensor: ...
@overload
def acceptance_loss(
    student_logits: Tensor,
    teacher_logits: TeacherLogits,
    labels: Tensor | None = ...,
    kind: str = ...,
    eta: float = ...,
    temperature: float | Tensor = ...,
    *,
    ignore_index: int | None = ...,
    reduction: str = ...,
    loss_weight: float | Tensor = ...,
    hard_weight: float = ...,
    token_weight: Tensor | None = ...,
    num_items_in_batch: float | Tensor | None = ...,
    return_parts: Literal[True],
    teacher_grad: bool = ...,
    process_group: ProcessGroup | None = ...,
    tp_group: ProcessGroup | None = ...,
    backend: str | None = ...,
) -> tuple[Tensor, LossParts]: ...
@overload
def acceptance_loss(
    student_logits: Tensor,
    teacher_logits: TeacherLogits,
    labels: Tensor | None = ...,
    kind: str = ...,
    eta: float = ...,
    temperature: float | Tensor = ...,
    *,
    ignore_index: int | None = ...,
    reduction: str = ...,
    loss_weight: float | Tensor = ...,
    hard_weight: float = ...,
    token_weight: Tensor | None = ...,
    num_items_in_batch: float | Tensor | None = ...,
    return_parts: bool,
    teacher_grad: bool = ...,
    process_group: ProcessGroup | None = ...,
    tp_group: ProcessGroup | None = ...,
    backend: str | None = ...,
) -> Any: ...
@overload
def aekt_loss(
    student_logits: Tensor,
    teacher_logits: TeacherLogits,
    target: Tensor | None = ...,
    alpha: float = ...,
    beta: float = ...,
    temperature: float | Tensor = ...,
    kappa: float = ...,
    ratio_max: float = ...,
    *,
    labels: Tensor | None = ...,
    ignore_index: int | None = ...,
    reduction: str = ...,
    loss_weight: float | Tensor = ...,
    hard_weight: float = ...,
    token_weight: Tensor | None = ...,
    num_items_in_batch: float | Tensor | None = ...,
    return_parts: Literal[False] = ...,
    teacher_grad: bool = ...,
    standardize: bool = ...,
    class_dim: int | None = ...,
    process_group: ProcessGroup | None = ...,
    tp_group: ProcessGroup | None = ...,
    backend: str | None = ...,
) -> Tensor: ...
@overload
def aekt_loss(
    student_logits: Tensor,
    teacher_logits: TeacherLogits,
    target: Tensor | None = ...,
    alpha: float = ...,
    beta: float = ...,
    temperature: float | Tensor = ...,
    kappa: float = ...,
    ratio_max: float = ...,
    *,
    labels: Tensor | None = ...,
    ignore_index: int | None = ...,
    reduction: str = ...,
    loss_weight: float | Tensor = ...,
    hard_weight: float = ...,
    token_weight: Tensor | None = ...,
    num_items_in_batch: float | Tensor | None = ...,
    return_parts: Literal[True],
    teacher_grad: bool = ...,
    standardize: bool = ...,
    class_dim: int | None = ...,
    process_group: ProcessGroup | None = ...,
    tp_group: ProcessGroup | None = ...,
    backend: str | None = ...,
) -> tuple[Tensor, LossParts]: ...
@overload
def aekt_loss(
    student_logits: Tensor,
    teacher_logits: TeacherLogits,
    target: Tensor | None = ...,
    alpha: float = ...,
    beta: float = ...,
    temperature: float | Tensor = ...,
    kappa: float = ...,
    ratio_max: float = ...,
    *,
    labels: Tensor | None = ...,
    ignore_index: int | None = ...,
    reduction: str = ...,
    loss_weight: float | Tensor = ...,
    hard_weight: float = ...,
    token_weight: Tensor | None = ...,
    num_items_in_batch: float | Tensor | None = ...,
    return_parts: bool,
    teacher_grad: bool = ...,
    standardize: bool = ...,
    class_dim: int | None = ...,
    process_group: ProcessGroup | None = ...,
    tp_group: ProcessGroup | None = ...,
    backend: str | None = ...,
) -> Any: ...
@overload
def alpha_beta_loss(
    student_logits: Tensor,
    teacher_logits: TeacherLogits,
    labels: Tensor | None = ...,
    alpha: float = ...,
    beta: float = ...,
    temperature: float | Tensor = ...,
    *,
    ignore_index: int | None = ...,
    reduction: str = ...,
    loss_weight: float | Tensor = ...,
    hard_weight: float = ...,
    token_weight: Tensor | None = ...,
    num_items_in_batch: float | Tensor | None = ...,
    return_parts: Literal[False] = ...,
    teacher_grad: bool = ...,
    process_group: ProcessGroup | None = ...,
    tp_group: ProcessGroup | None = ...,
    backend: str | None = ...,
) -> Tensor: ...
@overload
def alpha_beta_loss(
    student_logits: Tensor,
    teacher_logits: TeacherLogits,
    labels: Tensor | None = ...,
    alpha: float = ...,
    beta: float = ...,
    temperature: float | Tensor = ...,
    *,
    ignore_index: int | None = ...,
    reduction: str = ...,
    loss_weight: float | Tensor = ...,
    hard_weight: float = ...,
    token_weight: Tensor | None = ...,
    num_items_in_batch: float | Tensor | None = ...,
    return_parts: Literal[True],
    teacher_grad: bool = ...,
    process_group: ProcessGroup | None = ...,
    tp_group: ProcessGroup | None = ...,
    backend: str | None = ...,
) -> tuple[Tensor, LossParts]: ...
@overload
def alpha_beta_loss(
    student_logits: Tensor,
    teacher_logits: TeacherLogits,
    labels: Tensor | None = ...,
    alpha: float = ...,
    beta: float = ...,
    temperature: float | Tensor = ...,
    *,
    ignore_index: int | None = ...,
    reduction: str = ...,
    loss_weight: float | Tensor = ...,
    hard_weight: float = ...,
    token_weight: Tensor | None = ...,
    num_items_in_batch: float | Tensor | None = ...,
    return_parts: bool,
    teacher_grad: bool = ...,
    process_group: ProcessGroup | None = ...,
    tp_group: ProcessGroup | None = ...,
    backend: str | None = ...,
) -> Any: ...
@overload
def dkd_loss(
    student_logits: Tensor,
    teacher_logits: TeacherLogits,
    target: Tensor | None = ...,
    alpha: float = ...,
    beta: float = ...,
    temperature: float | Tensor = ...,
    *,
    labels: Tensor | None = ...,
    ignore_index: int | None = ...,
    reduction: str = ...,
    loss_weight: float | Tensor = ...,
    hard_weight: float = ...,
    token_weight: Tensor | None = ...,
    num_items_in_batch: float | Tensor | None = ...,
    return_parts: Literal[False] = ...,
    teacher_grad: bool = ...,
    standardize: bool = ...,
    class_dim: int | None = ...,
    process_group: ProcessGroup | None = ...,
    tp_group: ProcessGroup | None = ...,
    backend: str | None = ...,
) -> Tensor: ...
@overload
def dkd_loss(
    student_logits: Tensor,
    teacher_logits: TeacherLogits,
    target: Tensor | None = ...,
    alpha: float = ...,
    beta: float = ...,
    temperature: float | Tensor = ...,
    *,
    labels: Tensor | None = ...,
    ignore_index: int | None = ...,
    reduction: str = ...,
    loss_weight: float | Tensor = ...,
    hard_weight: float = ...,
    token_weight: Tensor | None = ...,
    num_items_in_batch: float | Tensor | None = ...,
    return_parts: Literal[True],
    teacher_grad: bool = ...,
    standardize: bool = ...,
    class_dim: int | None = ...,
    process_group: ProcessGroup | None = ...,
    tp_group: ProcessGroup | None = ...,
    backend: str | None = ...,
) -> tuple[Tensor, LossParts]: ...
@overload
def dkd_loss(
    student_logits: Tensor,
    teacher_logits: TeacherLogits,
    target: Tensor | None = ...,
    alpha: float = ...,
    beta: float = ...,
    temperature: float | Tensor = ...,
    *,
    labels: Tensor | None = ...,
    ignore_index: int | None = ...,
    reduction: str = ...,
    loss_weight: float | Tensor = ...,
    hard_weight: float = ...,
    token_weight: Tensor | None = ...,
    num_items_in_batch: float | Tensor | None = ...,
    return_parts: bool,
    teacher_grad: bool = ...,
    standardize: bool = ...,
    class_dim: int | None = ...,
    process_group: ProcessGroup | None = ...,
    tp_group: ProcessGroup | None = ...,
    backend: str | None = ...,
) -> Any: ...
@overload
def jsd_loss(
    student_logits: Tensor,
    teacher_logits: TeacherLogits,
    labels: Tensor | None = ...,
    beta: float = ...,
    temperature: float | Tensor = ...,
    *,
    ignore_index: int | None = ...,
    reduction: str = ...,
    loss_weight: float | Tensor = ...,
    hard_weight: float = ...,
    token_weight: Tensor | None = ...,
    num_items_in_batch: float | Tensor | None = ...,
    return_parts: Literal[False] = ...,
    teacher_grad: bool = ...,
    process_group: ProcessGroup | None = ...,
    tp_group: ProcessGroup | None = ...,
    backend: str | None = ...,
) -> Tensor: ...
@overload
def jsd_loss(
    student_logits: Tensor,
    teacher_logits: TeacherLogits,
    labels: Tensor | None = ...,
    beta: float = ...,
    temperature: float | Tensor = ...,
    *,
    ignore_index: int | None = ...,
    reduction: str = ...,
    loss_weight: float | Tensor = ...,
    hard_weight: float = ...,
    token_weight: Tensor | None = ...,
    num_items_in_batch: float | Tensor | None = ...,
    return_parts: Literal[True],
    teacher_grad: bool = ...,
    process_group: ProcessGroup | None = ...,
    tp_group: ProcessGroup | None = ...,
    backend: str | None = ...,
) -> tuple[Tensor, LossParts]: ...
@overload
def jsd_loss(
    student_logits: Tensor,
    teacher_logits: TeacherLogits,
    labels: Tensor | None = ...,
    beta: float = ...,
    temperature: float | Tensor = ...,
    *,
    ignore_index: int | None = ...,
    reduction: str = ...,
    loss_weight: float | Tensor = ...,
    hard_weight: float = ...,
    token_weight: Tensor | None = ...,
    num_items_in_batch: float | Tensor | None = ...,
    return_parts: bool,
    teacher_grad: bool = ...,
    process_group: ProcessGroup | None = ...,
    tp_group: ProcessGroup | None = ...,
    backend: str | None = ...,
) -> Any: ...
@overload
def kd_loss(
    student_logits: Tensor,
    teacher_logits: TeacherLogits,
    temperature: float | Tensor = ...,
    *,
    target: Tensor | None = ...,
    labels: Tensor | None = ...,
    resize: str | None = ...,
    ignore_index: int | None = ...,
    reduction: str = ...,
    loss_weight: float | Tensor = ...,
    hard_weight: float = ...,
    token_weight: Tensor | None = ...,
    num_items_in_batch: float | Tensor | None = ...,
    return_parts: Literal[False] = ...,
    teacher_grad: bool = ...,
    standardize: bool = ...,
    class_dim: int | None = ...,
    process_group: ProcessGroup | None = ...,
    tp_group: ProcessGroup | None = ...,
    backend: str | None = ...,
) -> Tensor: ...
@overload
def kd_loss(
    student_logits: Tensor,
    teacher_logits: TeacherLogits,
    temperature: float | Tensor = ...,
    *,
    target: Tensor | None = ...,
    labels: Tensor | None = ...,
    resize: str | None = ...,
    ignore_index: int | None = ...,
    reduction: str = ...,
    loss_weight: float | Tensor = ...,
    hard_weight: float = ...,
    token_weight: Tensor | None = ...,
    num_items_in_batch: float | Tensor | None = ...,
    return_parts: Literal[True],
    teacher_grad: bool = ...,
    standardize: bool = ...,
    class_dim: int | None = ...,
    process_group: ProcessGroup | None = ...,
    tp_group: ProcessGroup | None = ...,
    backend: str | None = ...,
) -> tuple[Tensor, LossParts]: ...
@overload
def kd_loss(
    student_logits: Tensor,
    teacher_logits: TeacherLogits,
    temperature: float | Tensor = ...,
    *,
    target: Tensor | None = ...,
    labels: Tensor | None = ...,
    resize: str | None = ...,
    ignore_index: int | None = ...,
    reduction: str = ...,
    loss_weight: float | Tensor = ...,
    hard_weight: float = ...,
    token_weight: Tensor | None = ...,
    num_items_in_batch: float | Tensor | None = ...,
    return_parts: bool,
    teacher_grad: bool = ...,
    standardize: bool = ...,
    class_dim: int | None = ...,
    process_group: ProcessGroup | None = ...,
    tp_group: ProcessGroup | None = ...,
    backend: str | None = ...,
) -> Any: ...
@overload
def mixed_kl_loss(
    student_logits: Tensor,
    teacher_logits: TeacherLogits,
    labels: Tensor | None = ...,
    forward_weight: float | Tensor = ...,
    temperature: float | Tensor = ...,
    *,
    ignore_index: int | None = ...,
    reduction: str = ...,
    loss_weight: float | Tensor = ...,
    hard_weight: float = ...,
    token_weight: Tensor | None = ...,
    num_items_in_batch: float | Tensor | None = ...,
    return_parts: Literal[False] = ...,
    teacher_grad: bool = ...,
    process_group: ProcessGroup | None = ...,
    tp_group: ProcessGroup | None = ...,
    backend: str | None = ...,
) -> Tensor: ...
@overload
def mixed_kl_loss(
    student_logits: Tensor,
    teacher_logits: TeacherLogits,
    labels: Tensor | None = ...,
    forward_weight: float | Tensor = ...,
    temperature: float | Tensor = ...,
    *,
    ignore_index: int | None = ...,
    reduction: str = ...,
    loss_weight: float | Tensor = ...,
    hard_weight: float = ...,
    token_weight: Tensor | None = ...,
    num_items_in_batch: float | Tensor | None = ...,
    return_parts: Literal[True],
    teacher_grad: bool = ...,
    process_group: ProcessGroup | None = ...,
    tp_group: ProcessGroup | None = ...,
    backend: str | None = ...,
) -> tuple[Tensor, LossParts]: ...
@overload
def mixed_kl_loss(
    student_logits: Tensor,
    teacher_logits: TeacherLogits,
    labels: Tensor | None = ...,
    forward_weight: float | Tensor = ...,
    temperature: float | Tensor = ...,
    *,
    ignore_index: int | None = ...,
    reduction: str = ...,
    loss_weight: float | Tensor = ...,
    hard_weight: float = ...,
    token_weight: Tensor | None = ...,
    num_items_in_batch: float | Tensor | None = ...,
    return_parts: bool,
    teacher_grad: bool = ...,
    process_group: ProcessGroup | None = ...,
    tp_group: ProcessGroup | None = ...,
    backend: str | None = ...,
) -> Any: ...
@overload
def reverse_kl_loss(
    student_logits: Tensor,
    teacher_logits: TeacherLogits,
    labels: Tensor | None = ...,
    temperature: float | Tensor = ...,
    *,
    ignore_index: int | None = ...,
    reduction: str = ...,
    loss_weight: float | Tensor = ...,
    hard_weight: float = ...,
    token_weight: Tensor | None = ...,
    num_items_in_batch: float | Tensor | None = ...,
    return_parts: Literal[False] = ...,
    teacher_grad: bool = ...,
    process_group: ProcessGroup | None = ...,
    tp_group: ProcessGroup | None = ...,
    backend: str | None = ...,
) -> Tensor: ...
@overload
def reverse_kl_loss(
    student_logits: Tensor,
    teacher_logits: TeacherLogits,
    labels: Tensor | None = ...,
    temperature: float | Tensor = ...,
    *,
    ignore_index: int | None = ...,
    reduction: str = ...,
    loss_weight: float | Tensor = ...,
    hard_weight: float = ...,
    token_weight: Tensor | None = ...,
    num_items_in_batch: float | Tensor | None = ...,
    return_parts: Literal[True],
    teacher_grad: bool = ...,
    process_group: ProcessGroup | None = ...,
    tp_group: ProcessGroup | None = ...,
    backend: str | None = ...,
) -> tuple[Tensor, LossParts]: ...
@overload
def reverse_kl_loss(
    student_logits: Tensor,
    teacher_logits: TeacherLogits,
    labels: Tensor | None = ...,
    temperature: float | Tensor = ...,
    *,
    ignore_index: int | None = ...,
    reduction: str = ...,
    loss_weight: float | Tensor = ...,
    hard_weight: float = ...,
    token_weight: Tensor | None = ...,
    num_items_in_batch: float | Tensor | None = ...,
    return_parts: bool,
    teacher_grad: bool = ...,
    process_group: ProcessGroup | None = ...,
    tp_group: ProcessGroup | None = ...,
    backend: str | None = ...,
) -> Any: ...
@overload
def sampled_kl_loss(
    student_logits: Tensor,
    sampled_ids: Tensor,
    teacher_logprob: Tensor,
    labels: Tensor | None = ...,
    estimator: str = ...,
    *,
    ignore_index: int | None = ...,
    reduction: str = ...,
    loss_weight: float | Tensor = ...,
    hard_weight: float = ...,
    token_weight: Tensor | None = ...,
    num_items_in_batch: float | Tensor | None = ...,
    return_parts: Literal[False] = ...,
    process_group: ProcessGroup | None = ...,
    tp_group: ProcessGroup | None = ...,
    backend: str | None = ...,
) -> Tensor: ...
@overload
def sampled_kl_loss(
    student_logits: Tensor,
    sampled_ids: Tensor,
    teacher_logprob: Tensor,
    labels: Tensor | None = ...,
    estimator: str = ...,
    *,
    ignore_index: int | None = ...,
    reduction: str = ...,
    loss_weight: float | Tensor = ...,
    hard_weight: float = ...,
    token_weight: Tensor | None = ...,
    num_items_in_batch: float | Tensor | None = ...,
    return_parts: Literal[True],
    process_group: ProcessGroup | None = ...,
    tp_group: ProcessGroup | None = ...,
    backend: str | None = ...,
) -> tuple[Tensor, LossParts]: ...
@overload
def sampled_kl_loss(
    student_logits: Tensor,
    sampled_ids: Tensor,
    teacher_logprob: Tensor,
    labels: Tensor | None = ...,
    estimator: str = ...,
    *,
    ignore_index: int | None = ...,
    reduction: str = ...,
    loss_weight: float | Tensor = ...,
    hard_weight: float = ...,
    token_weight: Tensor | None = ...,
    num_items_in_batch: float | Tensor | None = ...,
    return_parts: bool,
    process_group: ProcessGroup | None = ...,
    tp_group: ProcessGroup | None = ...,
    backend: str | None = ...,
) -> Any: ...
@overload
def skew_kl_loss(
    student_logits: Tensor,
    teacher_logits: TeacherLogits,
    labels: Tensor | None = ...,
    alpha: float = ...,
    temperature: float | Tensor = ...,
    *,
    ignore_index: int | None = ...,
    reduction: str = ...,
    loss_weight: float | Tensor = ...,
    hard_weight: float = ...,
    token_weight: Tensor | None = ...,
    num_items_in_batch: float | Tensor | None = ...,
    return_parts: Literal[False] = ...,
    teacher_grad: bool = ...,
    process_group: ProcessGroup | None = ...,
    tp_group: ProcessGroup | None = ...,
    backend: str | None = ...,
) -> Tensor: ...
@overload
def skew_kl_loss(
    student_logits: Tensor,
    teacher_logits: TeacherLogits,
    labels: Tensor | None = ...,
    alpha: float = ...,
    temperature: float | Tensor = ...,
    *,
    ignore_index: int | None = ...,
    reduction: str = ...,
    loss_weight: float | Tensor = ...,
    hard_weight: float = ...,
    token_weight: Tensor | None = ...,
    num_items_in_batch: float | Tensor | None = ...,
    return_parts: Literal[True],
    teacher_grad: bool = ...,
    process_group: ProcessGroup | None = ...,
    tp_group: ProcessGroup | None = ...,
    backend: str | None = ...,
) -> tuple[Tensor, LossParts]: ...
@overload
def skew_kl_loss(
    student_logits: Tensor,
    teacher_logits: TeacherLogits,
    labels: Tensor | None = ...,
    alpha: float = ...,
    temperature: float | Tensor = ...,
    *,
    ignore_index: int | None = ...,
    reduction: str = ...,
    loss_weight: float | Tensor = ...,
    hard_weight: float = ...,
    token_weight: Tensor | None = ...,
    num_items_in_batch: float | Tensor | None = ...,
    return_parts: bool,
    teacher_grad: bool = ...,
    process_group: ProcessGroup | None = ...,
    tp_group: ProcessGroup | None = ...,
    backend: str | None = ...,
) -> Any: ...
@overload
def skew_reverse_kl_loss(
    student_logits: Tensor,
    teacher_logits: TeacherLogits,
    labels: Tensor | None = ...,
    alpha: float = ...,
    temperature: float | Tensor = ...,
    *,
    ignore_index: int | None = ...,
    reduction: str = ...,
    loss_weight: float | Tensor = ...,
    hard_weight: float = ...,
    token_weight: Tensor | None = ...,
    num_items_in_batch: float | Tensor | None = ...,
    return_parts: Literal[False] = ...,
    teacher_grad: bool = ...,
    process_group: ProcessGroup | None = ...,
    tp_group: ProcessGroup | None = ...,
    backend: str | None = ...,
) -> Tensor: ...
@overload
def skew_reverse_kl_loss(
    student_logits: Tensor,
    teacher_logits: TeacherLogits,
    labels: Tensor | None = ...,
    alpha: float = ...,
    temperature: float | Tensor = ...,
    *,
    ignore_index: int | None = ...,
    reduction: str = ...,
    loss_weight: float | Tensor = ...,
    hard_weight: float = ...,
    token_weight: Tensor | None = ...,
    num_items_in_batch: float | Tensor | None = ...,
    return_parts: Literal[True],
    teacher_grad: bool = ...,
    process_group: ProcessGroup | None = ...,
    tp_group: ProcessGroup | None = ...,
    backend: str | None = ...,
) -> tuple[Tensor, LossParts]: ...
@overload
def skew_reverse_kl_loss(
    student_logits: Tensor,
    teacher_logits: TeacherLogits,
    labels: Tensor | None = ...,
    alpha: float = ...,
    temperature: float | Tensor = ...,
    *,
    ignore_index: int | None = ...,
    reduction: str = ...,
    loss_weight: float | Tensor = ...,
    hard_weight: float = ...,
    token_weight: Tensor | None = ...,
    num_items_in_batch: float | Tensor | None = ...,
    return_parts: bool,
    teacher_grad: bool = ...,
    process_group: ProcessGroup | None = ...,
    tp_group: ProcessGroup | None = ...,
    backend: str | None = ...,
) -> Any: ...
@overload
def topk_kd_loss(
    student_logits: Tensor,
    teacher_ids: Tensor,
    teacher_logprobs: Tensor,
    labels: Tensor | None = ...,
    temperature: float | Tensor = ...,
    *,
    divergence: str = ...,
    beta: float = ...,
    tail: str = ...,
    log_rest: Tensor | None = ...,
    return_mass: Literal[False] = ...,
    ignore_index: int | None = ...,
    reduction: str = ...,
    loss_weight: float | Tensor = ...,
    hard_weight: float = ...,
    token_weight: Tensor | None = ...,
    num_items_in_batch: float | Tensor | None = ...,
    return_parts: Literal[False] = ...,
    process_group: ProcessGroup | None = ...,
    tp_group: ProcessGroup | None = ...,
    backend: str | None = ...,
) -> Tensor: ...
@overload
def topk_kd_loss(
    student_logits: Tensor,
    teacher_ids: Tensor,
    teacher_logprobs: Tensor,
    labels: Tensor | None = ...,
    temperature: float | Tensor = ...,
    *,
    divergence: str = ...,
    beta: float = ...,
    tail: str = ...,
    log_rest: Tensor | None = ...,
    return_mass: Literal[False] = ...,
    ignore_index: int | None = ...,
    reduction: str = ...,
    loss_weight: float | Tensor = ...,
    hard_weight: float = ...,
    token_weight: Tensor | None = ...,
    num_items_in_batch: float | Tensor | None = ...,
    return_parts: Literal[True],
    process_group: ProcessGroup | None = ...,
    tp_group: ProcessGroup | None = ...,
    backend: str | None = ...,
) -> tuple[Tensor, LossParts]: ...
@overload
def topk_kd_loss(
    student_logits: Tensor,
    teacher_ids: Tensor,
    teacher_logprobs: Tensor,
    labels: Tensor | None = ...,
    temperature: float | Tensor = ...,
    *,
    divergence: str = ...,
    beta: float = ...,
    tail: str = ...,
    log_rest: Tensor | None = ...,
    return_mass: Literal[True],
    ignore_index: int | None = ...,
    reduction: str = ...,
    loss_weight: float | Tensor = ...,
    hard_weight: float = ...,
    token_weight: Tensor | None = ...,
    num_items_in_batch: float | Tensor | None = ...,
    return_parts: Literal[False] = ...,
    process_group: ProcessGroup | None = ...,
    tp_group: ProcessGroup | None = ...,
    backend: str | None = ...,
) -> tuple[Tensor, TopKMass]: ...
@overload
def topk_kd_loss(
    student_logits: Tensor,
    teacher_ids: Tensor,
    teacher_logprobs: Tensor,
    labels: Tensor | None = ...,
    temperature: float | Tensor = ...,
    *,
    divergence: str = ...,
    beta: float = ...,
    tail: str = ...,
    log_rest: Tensor | None = ...,
    return_mass: Literal[True],
    ignore_index: int | None = ...,
    reduction: str = ...,
    loss_weight: float | Tensor = ...,
    hard_weight: float = ...,
    token_weight: Tensor | None = ...,
    num_items_in_batch: float | Tensor | None = ...,
    return_parts: Literal[True],
    process_group: ProcessGroup | None = ...,
    tp_group: ProcessGroup | None = ...,
    backend: str | None = ...,
) -> tuple[Tensor, TopKMass, LossParts]: ...
@overload
def topk_kd_loss(
    student_logits: Tensor,
    teacher_ids: Tensor,
    teacher_logprobs: Tensor,
    labels: Tensor | None = ...,
    temperature: float | Tensor = ...,
    *,
    divergence: str = ...,
    beta: float = ...,
    tail: str = ...,
    log_rest: Tensor | None = ...,
    return_mass: bool = ...,
    ignore_index: int | None = ...,
    reduction: str = ...,
    loss_weight: float | Tensor = ...,
    hard_weight: float = ...,
    token_weight: Tensor | None = ...,
    num_items_in_batch: float | Tensor | None = ...,
    return_parts: bool = ...,
    process_group: ProcessGroup | None = ...,
    tp_group: ProcessGroup | None = ...,
    backend: str | None = ...,
) -> Any: ...
@overload
def tv_loss(
    student_logits: Tensor,
    teacher_logits: TeacherLogits,
    labels: Tensor | None = ...,
    temperature: float | Tensor = ...,
    *,
    ignore_index: int | None = ...,
    reduction: str = ...,
    loss_weight: float | Tensor = ...,
    hard_weight: float = ...,
    token_weight: Tensor | None = ...,
    num_items_in_batch: float | Tensor | None = ...,
    return_parts: Literal[False] = ...,
    teacher_grad: bool = ...,
    process_group: ProcessGroup | None = ...,
    tp_group: ProcessGroup | None = ...,
    backend: str | None = ...,
) -> Tensor: ...
@overload
def tv_loss(
    student_logits: Tensor,
    teacher_logits: TeacherLogits,
    labels: Tensor | None = ...,
    temperature: float | Tensor = ...,
    *,
    ignore_index: int | None = ...,
    reduction: str = ...,
    loss_weight: float | Tensor = ...,
    hard_weight: float = ...,
    token_weight: Tensor | None = ...,
    num_items_in_batch: float | Tensor | None = ...,
    return_parts: Literal[True],
    teacher_grad: bool = ...,
    process_group: ProcessGroup | None = ...,
    tp_group: ProcessGroup | None = ...,
    backend: str | None = ...,
) -> tuple[Tensor, LossParts]: ...
@overload
def tv_loss(
    student_logits: Tensor,
    teacher_logits: TeacherLogits,
    labels: Tensor | None = ...,
    temperature: float | Tensor = ...,
    *,
    ignore_index: int | None = ...,
    reduction: str = ...,
    loss_weight: float | Tensor = ...,
    hard_weight: float = ...,
    token_weight: Tensor | None = ...,
    num_items_in_batch: float | Tensor | None = ...,
    return_parts: bool,
    teacher_grad: bool = ...,
    process_group: ProcessGroup | None = ...,
    tp_group: ProcessGroup | None = ...,
    backend: str | None = ...,
) -> Any: ...

class AEKTLoss(RowLoss):
    alpha: float
    beta: float
    temperature: float | Tensor
    kappa: float
    ratio_max: float
    ignore_index: int | None
    reduction: str
    loss_weight: float | Tensor
    hard_weight: float
    return_parts: bool
    teacher_grad: bool
    standardize: bool
    class_dim: int | None
    process_group: ProcessGroup | None
    tp_group: ProcessGroup | None
    backend: str | None
    def __init__(
        self,
        alpha: float = ...,
        beta: float = ...,
        temperature: float | Tensor = ...,
        kappa: float = ...,
        ratio_max: float = ...,
        *,
        ignore_index: int | None = ...,
        reduction: str = ...,
        loss_weight: float | Tensor = ...,
        hard_weight: float = ...,
        return_parts: bool = ...,
        teacher_grad: bool = ...,
        standardize: bool = ...,
        class_dim: int | None = ...,
        process_group: ProcessGroup | None = ...,
        tp_group: ProcessGroup | None = ...,
        backend: str | None = ...,
    ) -> None: ...

class AcceptanceLoss(TokenLoss):
    kind: str
    eta: float
    temperature: float | Tensor
    ignore_index: int | None
    reduction: str
    loss_weight: float | Tensor
    hard_weight: float
    return_parts: bool
    teacher_grad: bool
    process_group: ProcessGroup | None
    tp_group: ProcessGroup | None
    backend: str | None
    def __init__(
        self,
        kind: str = ...,
        eta: float = ...,
        temperature: float | Tensor = ...,
        *,
        ignore_index: int | None = ...,
        reduction: str = ...,
        loss_weight: float | Tensor = ...,
        hard_weight: float = ...,
        return_parts: bool = ...,
        teacher_grad: bool = ...,
        process_group: ProcessGroup | None = ...,
        tp_group: ProcessGroup | None = ...,
        backend: str | None = ...,
    ) -> None: ...

class AlphaBetaLoss(TokenLoss):
    alpha: float
    beta: float
    temperature: float | Tensor
    ignore_index: int | None
    reduction: str
    loss_weight: float | Tensor
    hard_weight: float
    return_parts: bool
    teacher_grad: bool
    process_group: ProcessGroup | None
    tp_group: ProcessGroup | None
    backend: str | None
    def __init__(
        self,
        alpha: float = ...,
        beta: float = ...,
        temperature: float | Tensor = ...,
        *,
        ignore_index: int | None = ...,
        reduction: str = ...,
        loss_weight: float | Tensor = ...,
        hard_weight: float = ...,
        return_parts: bool = ...,
        teacher_grad: bool = ...,
        process_group: ProcessGroup | None = ...,
        tp_group: ProcessGroup | None = ...,
        backend: str | None = ...,
    ) -> None: ...

class AttentionTransferLoss(LossModule):
    p: float
    resize: str | None
    reduction: str
    loss_weight: float
    backend: str | None
    def __init__(
        self,
        p: float = ...,
        *,
        resize: str | None = ...,
        reduction: str = ...,
        loss_weight: float = ...,
        backend: str | None = ...,
    ) -> None: ...
    def forward(
        self,
        student_features: Tensor,
        teacher_features: Tensor,
    ) -> Tensor: ...

class DISTLoss(LossModule):
    beta: float
    gamma: float
    tau: float
    ignore_index: int | None
    eps: float
    reduction: str
    loss_weight: float
    teacher_grad: bool
    class_dim: int | None
    process_group: ProcessGroup | None
    backend: str | None
    def __init__(
        self,
        beta: float = ...,
        gamma: float = ...,
        tau: float = ...,
        *,
        ignore_index: int | None = ...,
        eps: float = ...,
        reduction: str = ...,
        loss_weight: float = ...,
        teacher_grad: bool = ...,
        class_dim: int | None = ...,
        process_group: ProcessGroup | None = ...,
        backend: str | None = ...,
    ) -> None: ...
    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: TeacherLogits,
        labels: Tensor | None = ...,
    ) -> Tensor: ...

class DKDLoss(RowLoss):
    alpha: float
    beta: float
    temperature: float | Tensor
    ignore_index: int | None
    reduction: str
    loss_weight: float | Tensor
    hard_weight: float
    return_parts: bool
    teacher_grad: bool
    standardize: bool
    class_dim: int | None
    process_group: ProcessGroup | None
    tp_group: ProcessGroup | None
    backend: str | None
    def __init__(
        self,
        alpha: float = ...,
        beta: float = ...,
        temperature: float | Tensor = ...,
        *,
        ignore_index: int | None = ...,
        reduction: str = ...,
        loss_weight: float | Tensor = ...,
        hard_weight: float = ...,
        return_parts: bool = ...,
        teacher_grad: bool = ...,
        standardize: bool = ...,
        class_dim: int | None = ...,
        process_group: ProcessGroup | None = ...,
        tp_group: ProcessGroup | None = ...,
        backend: str | None = ...,
    ) -> None: ...

class HintLoss(LossModule):
    reduction: str
    loss_weight: float
    backend: str | None
    def __init__(
        self,
        *,
        reduction: str = ...,
        loss_weight: float = ...,
        backend: str | None = ...,
    ) -> None: ...
    def forward(
        self,
        student_features: Tensor,
        teacher_features: Tensor,
    ) -> Tensor: ...

class IEKDLoss(LossModule):
    inheritance_weight: float
    exploration_weight: float
    similarity: str
    reduction: str
    loss_weight: float
    backend: str | None
    def __init__(
        self,
        inheritance_weight: float = ...,
        exploration_weight: float = ...,
        *,
        similarity: str = ...,
        reduction: str = ...,
        loss_weight: float = ...,
        backend: str | None = ...,
    ) -> None: ...
    def forward(
        self,
        inheritance_factor: Tensor,
        exploration_factor: Tensor,
        teacher_factor: Tensor,
    ) -> Tensor: ...

class JSDLoss(TokenLoss):
    beta: float
    temperature: float | Tensor
    ignore_index: int | None
    reduction: str
    loss_weight: float | Tensor
    hard_weight: float
    return_parts: bool
    teacher_grad: bool
    process_group: ProcessGroup | None
    tp_group: ProcessGroup | None
    backend: str | None
    def __init__(
        self,
        beta: float = ...,
        temperature: float | Tensor = ...,
        *,
        ignore_index: int | None = ...,
        reduction: str = ...,
        loss_weight: float | Tensor = ...,
        hard_weight: float = ...,
        return_parts: bool = ...,
        teacher_grad: bool = ...,
        process_group: ProcessGroup | None = ...,
        tp_group: ProcessGroup | None = ...,
        backend: str | None = ...,
    ) -> None: ...

class KDLoss(RowLoss):
    temperature: float | Tensor
    resize: str | None
    ignore_index: int | None
    reduction: str
    loss_weight: float | Tensor
    hard_weight: float
    return_parts: bool
    teacher_grad: bool
    standardize: bool
    class_dim: int | None
    process_group: ProcessGroup | None
    tp_group: ProcessGroup | None
    backend: str | None
    def __init__(
        self,
        temperature: float | Tensor = ...,
        *,
        resize: str | None = ...,
        ignore_index: int | None = ...,
        reduction: str = ...,
        loss_weight: float | Tensor = ...,
        hard_weight: float = ...,
        return_parts: bool = ...,
        teacher_grad: bool = ...,
        standardize: bool = ...,
        class_dim: int | None = ...,
        process_group: ProcessGroup | None = ...,
        tp_group: ProcessGroup | None = ...,
        backend: str | None = ...,
    ) -> None: ...

class LocalClassifierLoss(LossModule):
    temperature: float
    ignore_index: int | None
    reduction: str
    loss_weight: float
    backend: str | None
    def __init__(
        self,
        temperature: float = ...,
        *,
        ignore_index: int | None = ...,
        reduction: str = ...,
        loss_weight: float = ...,
        backend: str | None = ...,
    ) -> None: ...
    def forward(
        self,
        student_logits: Tensor,
        teacher_embeddings: Tensor,
        centers: Tensor,
        target: Tensor,
    ) -> Tensor: ...

class MixedKLLoss(TokenLoss):
    forward_weight: float | Tensor
    temperature: float | Tensor
    ignore_index: int | None
    reduction: str
    loss_weight: float | Tensor
    hard_weight: float
    return_parts: bool
    teacher_grad: bool
    process_group: ProcessGroup | None
    tp_group: ProcessGroup | None
    backend: str | None
    def __init__(
        self,
        forward_weight: float | Tensor = ...,
        temperature: float | Tensor = ...,
        *,
        ignore_index: int | None = ...,
        reduction: str = ...,
        loss_weight: float | Tensor = ...,
        hard_weight: float = ...,
        return_parts: bool = ...,
        teacher_grad: bool = ...,
        process_group: ProcessGroup | None = ...,
        tp_group: ProcessGroup | None = ...,
        backend: str | None = ...,
    ) -> None: ...

class PKDLoss(LossModule):
    reduction: str
    loss_weight: float
    process_group: ProcessGroup | None
    backend: str | None
    def __init__(
        self,
        *,
        reduction: str = ...,
        loss_weight: float = ...,
        process_group: ProcessGroup | None = ...,
        backend: str | None = ...,
    ) -> None: ...
    def forward(
        self,
        student_features: Tensor,
        teacher_features: Tensor,
    ) -> Tensor: ...

class RKDLoss(LossModule):
    distance_weight: float
    angle_weight: float
    reduction: str
    loss_weight: float
    process_group: ProcessGroup | None
    backend: str | None
    def __init__(
        self,
        distance_weight: float = ...,
        angle_weight: float = ...,
        *,
        reduction: str = ...,
        loss_weight: float = ...,
        process_group: ProcessGroup | None = ...,
        backend: str | None = ...,
    ) -> None: ...
    def forward(
        self,
        student_embeddings: Tensor,
        teacher_embeddings: Tensor,
    ) -> Tensor: ...

class ReverseKLLoss(TokenLoss):
    temperature: float | Tensor
    ignore_index: int | None
    reduction: str
    loss_weight: float | Tensor
    hard_weight: float
    return_parts: bool
    teacher_grad: bool
    process_group: ProcessGroup | None
    tp_group: ProcessGroup | None
    backend: str | None
    def __init__(
        self,
        temperature: float | Tensor = ...,
        *,
        ignore_index: int | None = ...,
        reduction: str = ...,
        loss_weight: float | Tensor = ...,
        hard_weight: float = ...,
        return_parts: bool = ...,
        teacher_grad: bool = ...,
        process_group: ProcessGroup | None = ...,
        tp_group: ProcessGroup | None = ...,
        backend: str | None = ...,
    ) -> None: ...

class SampledKLLoss(SampledLoss):
    estimator: str
    ignore_index: int | None
    reduction: str
    loss_weight: float | Tensor
    hard_weight: float
    return_parts: bool
    process_group: ProcessGroup | None
    tp_group: ProcessGroup | None
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
        process_group: ProcessGroup | None = ...,
        tp_group: ProcessGroup | None = ...,
        backend: str | None = ...,
    ) -> None: ...

class SigmoidDISTLoss(DISTLoss):
    beta: float
    gamma: float
    tau: float
    ignore_index: int | None
    eps: float
    reduction: str
    loss_weight: float
    teacher_grad: bool
    class_dim: int | None
    process_group: ProcessGroup | None
    backend: str | None
    def __init__(
        self,
        beta: float = ...,
        gamma: float = ...,
        tau: float = ...,
        *,
        ignore_index: int | None = ...,
        eps: float = ...,
        reduction: str = ...,
        loss_weight: float = ...,
        teacher_grad: bool = ...,
        class_dim: int | None = ...,
        process_group: ProcessGroup | None = ...,
        backend: str | None = ...,
    ) -> None: ...

class SigmoidKDLoss(TokenLoss):
    temperature: float | Tensor
    ignore_index: int | None
    reduction: str
    loss_weight: float | Tensor
    teacher_grad: bool
    class_dim: int | None
    process_group: ProcessGroup | None
    backend: str | None
    def __init__(
        self,
        temperature: float | Tensor = ...,
        *,
        ignore_index: int | None = ...,
        reduction: str = ...,
        loss_weight: float | Tensor = ...,
        teacher_grad: bool = ...,
        class_dim: int | None = ...,
        process_group: ProcessGroup | None = ...,
        backend: str | None = ...,
    ) -> None: ...

class SkewKLLoss(TokenLoss):
    alpha: float
    temperature: float | Tensor
    ignore_index: int | None
    reduction: str
    loss_weight: float | Tensor
    hard_weight: float
    return_parts: bool
    teacher_grad: bool
    process_group: ProcessGroup | None
    tp_group: ProcessGroup | None
    backend: str | None
    def __init__(
        self,
        alpha: float = ...,
        temperature: float | Tensor = ...,
        *,
        ignore_index: int | None = ...,
        reduction: str = ...,
        loss_weight: float | Tensor = ...,
        hard_weight: float = ...,
        return_parts: bool = ...,
        teacher_grad: bool = ...,
        process_group: ProcessGroup | None = ...,
        tp_group: ProcessGroup | None = ...,
        backend: str | None = ...,
    ) -> None: ...

class SkewReverseKLLoss(TokenLoss):
    alpha: float
    temperature: float | Tensor
    ignore_index: int | None
    reduction: str
    loss_weight: float | Tensor
    hard_weight: float
    return_parts: bool
    teacher_grad: bool
    process_group: ProcessGroup | None
    tp_group: ProcessGroup | None
    backend: str | None
    def __init__(
        self,
        alpha: float = ...,
        temperature: float | Tensor = ...,
        *,
        ignore_index: int | None = ...,
        reduction: str = ...,
        loss_weight: float | Tensor = ...,
        hard_weight: float = ...,
        return_parts: bool = ...,
        teacher_grad: bool = ...,
        process_group: ProcessGroup | None = ...,
        tp_group: ProcessGroup | None = ...,
        backend: str | None = ...,
    ) -> None: ...

class TVLoss(TokenLoss):
    temperature: float | Tensor
    ignore_index: int | None
    reduction: str
    loss_weight: float | Tensor
    hard_weight: float
    return_parts: bool
    teacher_grad: bool
    process_group: ProcessGroup | None
    tp_group: ProcessGroup | None
    backend: str | None
    def __init__(
        self,
        temperature: float | Tensor = ...,
        *,
        ignore_index: int | None = ...,
        reduction: str = ...,
        loss_weight: float | Tensor = ...,
        hard_weight: float = ...,
        return_parts: bool = ...,
        teacher_grad: bool = ...,
        process_group: ProcessGroup | None = ...,
        tp_group: ProcessGroup | None = ...,
        backend: str | None = ...,
    ) -> None: ...

class TopKKDLoss(SparseLoss):
    temperature: float | Tensor
    divergence: str
    beta: float
    tail: str
    return_mass: bool
    ignore_index: int | None
    reduction: str
    loss_weight: float | Tensor
    hard_weight: float
    return_parts: bool
    process_group: ProcessGroup | None
    tp_group: ProcessGroup | None
    backend: str | None
    def __init__(
        self,
        temperature: float | Tensor = ...,
        *,
        divergence: str = ...,
        beta: float = ...,
        tail: str = ...,
        return_mass: bool = ...,
        ignore_index: int | None = ...,
        reduction: str = ...,
        loss_weight: float | Tensor = ...,
        hard_weight: float = ...,
        return_parts: bool = ...,
        process_group: ProcessGroup | None = ...,
        tp_group: ProcessGroup | None = ...,
        backend: str | None = ...,
    ) -> None: ...

class TupleMatchingLoss(LossModule):
    temperature: float
    margin: float
    reduction: str
    loss_weight: float
    process_group: ProcessGroup | None
    backend: str | None
    def __init__(
        self,
        temperature: float = ...,
        margin: float = ...,
        *,
        reduction: str = ...,
        loss_weight: float = ...,
        process_group: ProcessGroup | None = ...,
        backend: str | None = ...,
    ) -> None: ...
    def forward(
        self,
        student_embeddings: Tensor,
        teacher_embeddings: Tensor,
        target: Tensor,
    ) -> Tensor: ...

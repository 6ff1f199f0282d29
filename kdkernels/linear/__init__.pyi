"""Written by ``python -m kdkernels._stubs``: what type checkers read."""

from typing import Any, Literal, overload

from torch import Tensor

from .._ensemble import TeacherLogits
from .._group import ProcessGroup
from .._rowwise import LossParts
from ._teachers import Teacher
from .module import LinearLoss
from .logprob import LinearLogprob as LinearLogprob
from .logprob import linear_logprob as linear_logprob

@overload
def linear_kd_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher: Teacher,
    labels: Tensor | None = ...,
    divergence: str = ...,
    temperature: float = ...,
    *,
    student_bias: Tensor | None = ...,
    beta: float | None = ...,
    alpha: float | None = ...,
    forward_weight: float | None = ...,
    tail: str = ...,
    softcap: float | None = ...,
    logit_scale: float = ...,
    vocab: str | None = ...,
    chunk_tokens: int | None = ...,
    ignore_index: int | None = ...,
    reduction: str = ...,
    loss_weight: float | Tensor = ...,
    hard_weight: float = ...,
    token_weight: Tensor | None = ...,
    num_items_in_batch: float | Tensor | None = ...,
    return_parts: Literal[False] = ...,
    tp_group: ProcessGroup | None = ...,
    backend: str | None = ...,
) -> Tensor: ...
@overload
def linear_kd_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher: Teacher,
    labels: Tensor | None = ...,
    divergence: str = ...,
    temperature: float = ...,
    *,
    student_bias: Tensor | None = ...,
    beta: float | None = ...,
    alpha: float | None = ...,
    forward_weight: float | None = ...,
    tail: str = ...,
    softcap: float | None = ...,
    logit_scale: float = ...,
    vocab: str | None = ...,
    chunk_tokens: int | None = ...,
    ignore_index: int | None = ...,
    reduction: str = ...,
    loss_weight: float | Tensor = ...,
    hard_weight: float = ...,
    token_weight: Tensor | None = ...,
    num_items_in_batch: float | Tensor | None = ...,
    return_parts: Literal[True],
    tp_group: ProcessGroup | None = ...,
    backend: str | None = ...,
) -> tuple[Tensor, LossParts]: ...
@overload
def linear_kd_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher: Teacher,
    labels: Tensor | None = ...,
    divergence: str = ...,
    temperature: float = ...,
    *,
    student_bias: Tensor | None = ...,
    beta: float | None = ...,
    alpha: float | None = ...,
    forward_weight: float | None = ...,
    tail: str = ...,
    softcap: float | None = ...,
    logit_scale: float = ...,
    vocab: str | None = ...,
    chunk_tokens: int | None = ...,
    ignore_index: int | None = ...,
    reduction: str = ...,
    loss_weight: float | Tensor = ...,
    hard_weight: float = ...,
    token_weight: Tensor | None = ...,
    num_items_in_batch: float | Tensor | None = ...,
    return_parts: bool,
    tp_group: ProcessGroup | None = ...,
    backend: str | None = ...,
) -> Any: ...

class FusedLinearKDLoss(LinearLoss):
    divergence: str
    temperature: float
    beta: float | None
    alpha: float | None
    forward_weight: float | None
    tail: str
    softcap: float | None
    logit_scale: float
    vocab: str | None
    chunk_tokens: int | None
    ignore_index: int | None
    reduction: str
    loss_weight: float | Tensor
    hard_weight: float
    return_parts: bool
    tp_group: ProcessGroup | None
    backend: str | None
    def __init__(
        self,
        divergence: str = ...,
        temperature: float = ...,
        *,
        beta: float | None = ...,
        alpha: float | None = ...,
        forward_weight: float | None = ...,
        tail: str = ...,
        softcap: float | None = ...,
        logit_scale: float = ...,
        vocab: str | None = ...,
        chunk_tokens: int | None = ...,
        ignore_index: int | None = ...,
        reduction: str = ...,
        loss_weight: float | Tensor = ...,
        hard_weight: float = ...,
        return_parts: bool = ...,
        tp_group: ProcessGroup | None = ...,
        backend: str | None = ...,
    ) -> None: ...

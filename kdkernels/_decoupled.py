"""The teacher's gradient of the decoupled losses, by reverse KL of two kinds of rows.

With t the target, p and q the softmaxes of teacher and student, and hats over the other classes:

    loss = alpha w KL([p_t, 1 - p_t] || [q_t, 1 - q_t]) + beta KL(p^ || q^)

Either term is, by the teacher, reverse KL of a student: of the pair of the target's logit and the
others' logsumexp, and of the logits without the target. w is a constant.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import _reduce
from .reference._rows import rescale, weighted
from .reference.aekt import weight_of_ratio

Rows = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Reverse KL of each row, of a student, a teacher and which of the rows count."""


def by_teacher(
    reverse_kl: Rows,
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    temperature: float | Tensor,
    token_weight: Tensor | None,
    *,
    scale: float,
    standardize: bool,
    ignore_index: int,
    class_dim: int,
    reduction: int,
    alpha: float,
    beta: float,
    kappa: float = 0.0,
    ratio_max: float = 1.0,
) -> Tensor:
    """The loss, of which the gradient by the teacher counts.

    ``temperature`` is a number, or one a row, (rows, 1).
    """
    shape = student.shape[:class_dim] + student.shape[class_dim + 1 :]
    s, t = (_reduce.as_rows(x, class_dim) for x in _reduce.promote(student, teacher))
    y = target.reshape(-1).long()
    valid = y != ignore_index
    counted = valid.unsqueeze(1)
    s, t = (torch.where(counted, x, 0.0) for x in (s, t))
    if isinstance(temperature, Tensor):
        temperature = torch.where(counted, temperature.to(s.dtype), 1.0)
    s, t = rescale(s, t, temperature, standardize)
    index = torch.where(valid, y, 0).unsqueeze(1)
    others = [x.scatter(1, index, -torch.inf) for x in (s, t)]
    some = others[1].detach().amax(1) != -torch.inf  # without other classes there is nothing to say
    kept = torch.where(some.unsqueeze(1), others[1], 0.0)
    rest = torch.stack([others[0].logsumexp(1), kept.logsumexp(1)])
    rest = torch.where(torch.stack([torch.ones_like(some), some]), rest, -torch.inf)
    pair_s, pair_t = (
        torch.stack([x.gather(1, index)[:, 0], r], 1) for x, r in zip((s, t), rest, strict=True)
    )
    explicit = reverse_kl(pair_t, pair_s, valid)
    implicit = reverse_kl(others[1], others[0], valid & some)
    log_q, log_p = (x.detach().log_softmax(1)[:, 0] for x in (pair_s, pair_t))
    explicit = weighted(explicit, weight_of_ratio(log_p, log_p - log_q, kappa, ratio_max))
    values = weighted(explicit, alpha) + weighted(implicit, beta)
    soft = _reduce.weigh(values, scale, token_weight, valid)
    none = torch.zeros_like(soft)
    return _reduce.finish(soft, none, none, valid, shape, reduction, False)[0]

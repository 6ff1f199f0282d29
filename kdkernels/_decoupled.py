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
from ._checked import Checked
from .reference._rows import rescale, weighted
from .reference.aekt import weight_of_ratio

Rows = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Reverse KL of each row, of a student, a teacher and which of the rows count."""


def by_teacher(reverse_kl: Rows, call: Checked) -> Tensor:
    """The loss, of which the gradient by the teacher counts."""
    assert call.target is not None  # the caller's affair
    alpha, beta, *ratio = call.options
    s, t = _reduce.promote(call.student.detach(), call.teacher)
    s, t = (_reduce.as_rows(x, call.class_dim) for x in (s, t))
    y = call.target.reshape(-1).long()
    valid = y != call.ignore_index
    counted = valid.unsqueeze(1)
    s, t = (torch.where(counted, x, 0.0) for x in (s, t))
    heats = call.flat(call.row_temperature)
    temperature: float | Tensor = call.temperature
    if heats is not None:
        temperature = torch.where(counted, heats.unsqueeze(1).to(s.dtype), 1.0)
    s, t = rescale(s, t, temperature, call.standardize)
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
    if ratio:  # AEKT's kappa and ratio_max
        explicit = weighted(explicit, weight_of_ratio(log_p, log_p - log_q, *ratio))
    values = weighted(explicit, alpha) + weighted(implicit, beta)
    none = torch.zeros_like(values)
    return _reduce.weighed(call, values, none, none, valid)[0]

"""What the references of divergences between tokens' distributions share: exact log-probabilities.

``torch.log_softmax`` loses the digits of the largest log-probability where a row is certain, and
its backward pass those of the gradient, both of which are differences there: of reverse KL in
float64 nothing but nine digits would be left.
"""

from __future__ import annotations

import torch
from torch import Tensor


def log_softmax(logits: Tensor) -> Tensor:
    """Log-softmax over the last dimension, by the odds against the largest class.

    The largest class has the logit 0, which is no variable, and the gradient of its own logit is
    minus the sum of the others'.
    """
    index = logits.argmax(-1, keepdim=True)
    largest = torch.arange(logits.shape[-1], device=logits.device) == index
    top = logits.gather(-1, index)
    odds = (logits - top).masked_fill(largest, 0.0)
    log_total = torch.log1p(odds.exp().masked_fill(largest, 0.0).sum(-1, keepdim=True))
    # A row whose largest logit is NaN or infinite is NaN, in the gradient of every class too.
    dead = ~torch.isfinite(top.detach())
    row_sum = torch.where(dead, logits, 0.0).sum(-1, keepdim=True)
    return odds - log_total + row_sum * torch.where(dead, torch.nan, torch.ones_like(row_sum))


def kl_terms(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Each class's part of KL(p || q): p (exp(-d) - 1 + d) with d = log p - log q.

    That is p d + (q - p), whose last part sums to 0 over a distribution, so that every term is >= 0
    and nothing cancels when p and q agree. A class with p = 0 gives q; p > 0 = q gives +inf.
    """
    p, q = log_p.exp(), log_q.exp()
    return excess(p, q, torch.where(p == 0, 0.0, log_p - log_q))


def excess(p: Tensor, m: Tensor, x: Tensor) -> Tensor:
    """p (exp(-x) - 1 + x), the class's part of KL(p || m) with x = log(p / m); >= 0.

    That is p x + (m - p), whose last part sums to 0 over the classes.
    """
    near = (x.abs() < 1) & (p != 0)
    close, far = torch.where(near, x, 0.0), torch.where(near, 0.0, x)
    return torch.where(near, p * (torch.expm1(-close) + close), (m - p) + p * far)


def with_nan_of(log_p: Tensor, values: Tensor) -> Tensor:
    """The rows' values, NaN with a gradient that is NaN where the teacher's row is.

    A sign, or a condition that is false for NaN, would otherwise leave the student's gradient 0.
    """
    return values * torch.where(log_p.isnan().any(-1), torch.nan, torch.ones_like(values))

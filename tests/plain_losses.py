"""The losses of a pair of logits written plainly, whom autograd differentiates by both sides."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from inputs import make
from torch import Tensor

from kdkernels.registry import LossSpec

# Of (rows, classes): one value a row or, of DIST, one for all.


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum(-1)


def _decoupled(p: Tensor, q: Tensor, y: Tensor, alpha: float, beta: float, weight: Any) -> Tensor:
    def parts(x: Tensor) -> tuple[Tensor, Tensor]:
        target = x.gather(1, y[:, None])
        kept = torch.ones_like(x).scatter(1, y[:, None], 0.0)
        others = x * kept / (1 - target)
        return torch.cat([target, 1 - target], 1), others + (1 - kept)

    (pair_p, others_p), (pair_q, others_q) = parts(p), parts(q)
    factor = weight((pair_p / pair_q)[:, 0].detach())
    return alpha * factor * kl(pair_p, pair_q) + beta * kl(others_p, others_q)


def _correlation(a: Tensor, b: Tensor, dim: int, eps: float) -> Tensor:
    a, b = (x - x.mean(dim, keepdim=True) for x in (a, b))
    return (a * b).sum(dim) / (a.norm(dim=dim) * b.norm(dim=dim) + eps)


def _dist(p: Tensor, q: Tensor, y: Tensor, o: dict[str, Any]) -> Tensor:
    inter, intra = (1 - _correlation(p, q, dim, o["eps"]).mean() for dim in (1, 0))
    return o["tau"] ** 2 * (o["beta"] * inter + o["gamma"] * intra)


def _jsd(p: Tensor, q: Tensor, y: Tensor, o: dict[str, Any]) -> Tensor:
    beta = o["beta"]
    if beta in (0.0, 1.0):
        return kl(q, p) if beta else kl(p, q)
    m = beta * p + (1 - beta) * q
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


def _alpha_beta(p: Tensor, q: Tensor, y: Tensor, o: dict[str, Any]) -> Tensor:
    a, b = o["alpha"], o["beta"]
    s = a + b
    return (a / s * p**s + b / s * q**s - p**a * q**b).sum(-1) / (a * b)


def _acceptance(p: Tensor, q: Tensor, y: Tensor, o: dict[str, Any]) -> Tensor:
    rate = torch.minimum(p, q).sum(-1)
    if o["kind"] == "log":
        return -rate.log()
    weight = torch.exp(-o["eta"] * rate).detach()
    return weight * kl(p, q) + (1 - weight) * (1 - rate)


PLAIN: dict[str, Callable[[Tensor, Tensor, Tensor, dict[str, Any]], Tensor]] = {
    "kd": lambda p, q, y, o: kl(p, q),
    "reverse_kl": lambda p, q, y, o: kl(q, p),
    "tv": lambda p, q, y, o: (p - q).abs().sum(-1) / 2,
    "dist": _dist,
    "jsd": _jsd,
    "alpha_beta": _alpha_beta,
    "acceptance": _acceptance,
    "dkd": lambda p, q, y, o: _decoupled(p, q, y, o["alpha"], o["beta"], torch.ones_like),
    "aekt": lambda p, q, y, o: _decoupled(
        p, q, y, o["alpha"], o["beta"], lambda w: w.clamp(max=o["ratio_max"]) ** o["kappa"]
    ),
    "mixed_kl": lambda p, q, y, o: (
        o["forward_weight"] * kl(p, q) + (1 - o["forward_weight"]) * kl(q, p)
    ),
    "skew_kl": lambda p, q, y, o: kl(p, o["alpha"] * p + (1 - o["alpha"]) * q),
    "skew_reverse_kl": lambda p, q, y, o: kl(q, (1 - o["alpha"]) * p + o["alpha"] * q),
    "sigmoid_kd": lambda p, q, y, o: kl(p, q) + kl(1 - p, 1 - q),
    "sigmoid_dist": _dist,
}


def plain(
    spec: LossSpec, student: Tensor, teacher: Tensor, target: Tensor, options: dict[str, Any]
) -> Tensor:
    """The loss of rows all of which count, before reduction, in float64."""
    parameters = inspect.signature(spec.function).parameters
    o = {n: p.default for n, p in parameters.items() if p.default is not p.empty} | options
    heat = o.get("temperature", o.get("tau"))
    s, t = student.double(), teacher.double()
    if o.get("standardize"):
        s, t = ((x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-7) for x in (s, t))
    softmax = spec.activation == "softmax"
    q, p = ((x / heat).softmax(-1) if softmax else (x / heat).sigmoid() for x in (s, t))
    square = heat**2 if spec.by_row and spec.t_squared else 1.0
    return square * o["loss_weight"] * PLAIN[spec.name](p, q, target, o)


def gradients(loss: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss.sum(), leaves)


def pair(
    rows: int = 6, classes: int = 11, dtype: torch.dtype = torch.float64, **how: Any
) -> tuple[Tensor, Tensor, Tensor]:
    student, teacher, target = make("gaussian", rows, classes, dtype=dtype, **how)
    return (student / 3).requires_grad_(), (teacher / 3).requires_grad_(), target

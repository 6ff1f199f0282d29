"""The toy rules: a specification, and the Triton twins of tests/rules.

They are no losses. Not centred, with every option in use and with exp and log of their own, they
are what a rule may be, so that what all rules share on a traversal is tested once, with them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdkernels import triton as kernels
from kdkernels.reference._rows import rescale
from kdkernels.reference._tokens import kl_terms, log_softmax
from kdkernels.triton import kd as kd_rule
from kdkernels.triton.numerics import expm1, log1p, phi

OPTIONS = [0.7, 1.1, 0.4, 0.3]


def _terms(log_p: Tensor, log_q: Tensor, options: list[float]) -> Tensor:
    a, b, c, e = options
    p, q = log_p.exp(), log_q.exp()
    gap = q - p
    bend = q.exp() * (torch.expm1(-gap) + gap)
    others = c * torch.log1p(gap.square()) + e * bend
    return (a * kl_terms(log_q, log_p) + b * kl_terms(log_p, log_q) + others).sum(-1)


def toy(
    student: Tensor,
    teacher: Tensor,
    options: list[float],
    temperature: float,
    standardize: bool = False,
) -> Tensor:
    """a KL(q || p) + b KL(p || q) + c sum log(1 + (q - p)^2) + e sum exp(q) phi(q - p), by row."""
    student, teacher = rescale(student, teacher, temperature, standardize)
    return _terms(log_softmax(teacher), log_softmax(student), options)


def toy_decoupled(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    options: list[float],
    temperature: float,
    standardize: bool = False,
) -> Tensor:
    """(a + e) KL of the target against the rest, and b + c times the toy on the rest."""
    a, b, c, e = options
    student, teacher = rescale(student, teacher, temperature, standardize)
    log_q, log_q_others = _split(student, target)
    log_p, log_p_others = _split(teacher, target)
    explicit = kl_terms(log_p, log_q).sum(-1)
    return (a + e) * explicit + (b + c) * _terms(log_p_others, log_q_others, options)


def _split(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The target against the rest, and the rest; there is a rest."""
    index = target.unsqueeze(-1)
    excluded = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, index, True)
    others = logits.masked_fill(excluded, -torch.inf)
    pair = torch.cat([logits.gather(-1, index), others.logsumexp(-1, keepdim=True)], -1)
    return log_softmax(pair), log_softmax(others)


_kl = kd_rule.rule


@triton.jit
def rule(p, q, d, first, second, third, fourth):
    forward, gap = _kl(p, q, d, first, second, third, fourth)
    reverse, _ = _kl(q, p, -d, first, second, third, fourth)
    square = gap * gap
    growth = tl.exp(q)
    bend = tl.where(tl.abs(gap) < 0.25, phi(gap), expm1(-gap) + gap)
    value = reverse * first + forward * second + log1p(square) * third + growth * bend * fourth
    slope = tl.where(q == 0, 0.0, -(q * d)) * first + gap * second
    return value, slope + q * gap * (2.0 * third / (square + 1.0) + growth * fourth)


@triton.jit
def explicit(
    log_p_target, log_p_rest, log_q_target, log_q_rest, first, second, third, fourth
):  # fmt: skip
    p_target, q_target = tl.exp(log_p_target), tl.exp(log_q_target)
    d_target, d_rest = log_p_target - log_q_target, log_p_rest - log_q_rest
    on_target, slope = _kl(p_target, q_target, d_target, first, second, third, fourth)
    p_rest, q_rest = tl.exp(log_p_rest), tl.exp(log_q_rest)
    on_rest, _ = _kl(p_rest, q_rest, d_rest, first, second, third, fourth)
    weight = first + fourth
    return weight * (on_target + on_rest), weight * slope, second + third


MODULES = {
    "toy": SimpleNamespace(__name__="toy", FAMILY="divergence", CENTRED=False, rule=rule),
    "toy_decoupled": SimpleNamespace(
        __name__="toy_decoupled", FAMILY="decoupled", CENTRED=False, rule=rule, explicit=explicit
    ),
}


@contextmanager
def among_triton_rules() -> Iterator[None]:
    """Inside, ``kdkernels.triton`` knows the toy rules."""
    known = kernels._rule_modules()
    known.update(MODULES)  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in MODULES:
            del known[name]

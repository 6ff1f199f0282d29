"""Decoupled losses of targets that are probabilities, as mixup and label smoothing make them.

The loss is the expectation over the target, with w_y the target's probabilities:

    L = sum_y w_y [ a_y TCKD_y + beta NCKD_y ]

TCKD_y and NCKD_y are those of ``reference/dkd.py`` with y as the row's target, and a_y is alpha
times the weight of ``reference/aekt.py``. KL = TCKD_y + (1 - p_y) NCKD_y gives all y at once:

    L = beta KL sum_y w_y / (1 - p_y) + sum_y w_y (a_y - beta / (1 - p_y)) TCKD_y
    d TCKD_y / d z_k = (q_y - p_y) / (1 - q_y) (delta_yk - q_k)

but it cancels where p_y or q_y is near 1, of which a row has one class each. So two classes of each
row are calls of the loss with class indices: where no more than two have a weight, those, and the
result is that of two calls; else the likeliest of the teacher and of the student. The others' p and
q are at most 1/2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _checks, _reduce
from ._checked import Checked, Result
from ._dispatch import choose
from ._dtensor import any_sharded
from ._ops import once
from ._rowrun import run as run_hard
from ._tracing import readable, traced, transformed
from .reference._rows import logsumexp, rescale, top, weighted
from .reference.aekt import weight_of_ratio
from .registry import SPECS, LossSpec

_NONE, _SUM = _checks.REDUCTIONS["none"], _checks.REDUCTIONS["sum"]


def probabilities(spec: LossSpec, target: Any, student: Any) -> Tensor | None:
    """The targets, where they are probabilities and no class indices."""
    if spec.family != "decoupled" or not isinstance(target, Tensor):
        return None
    if not target.is_floating_point() or not isinstance(student, Tensor):
        return None
    return target if target.dim() == student.dim() else None


def check_call(tp_group: Any, teacher_grad: bool) -> None:
    """Refuse what is for class indices alone."""
    if tp_group is not None:
        raise _checks.fail("target", "class indices where tp_group is given", "probabilities")
    if teacher_grad:
        expected = "class indices where teacher_grad=True is given"
        raise _checks.fail("target", expected, "probabilities")


def check(value: Any, student: Tensor, teacher: Tensor) -> None:
    """Check the targets, probabilities in the logits' shape, and the logits' memory."""
    check_form(value, student, teacher)
    if readable(value):
        bad = ~((value >= 0) & (value < torch.inf))
        if bad.any():
            raise _checks.fail("target", "probabilities, finite and >= 0", float(value[bad][0]))


def check_form(value: Any, student: Tensor, teacher: Tensor) -> None:
    """Likewise but for their values."""
    _checks.allocated("student_logits", student)
    _checks.allocated("teacher_logits", teacher)
    name = "target"
    if any_sharded(value, student):
        raise _checks.fail(name, "class indices where logits are DTensors", "probabilities")
    _checks.tensor(name, value)
    _checks.dtype(name, value)
    _checks.constant(name, value)
    if value.shape != student.shape:
        expected = f"of the logits' shape {tuple(student.shape)} where it is no class indices"
        raise _checks.fail(name, expected, tuple(value.shape))
    if value.device != student.device:
        raise _checks.fail(name, f"on the student's device {student.device}", value.device)
    _checks.allocated(name, value)


def run(given: Checked) -> Result:
    """As ``_rowrun.run``, of probabilities in the logits' shape; no row is ignored."""
    assert given.target is not None  # the caller's affair
    spec, shape, hard, parts = given.spec, given.rows(), given.hard, given.parts
    # The gradients of up to four calls are summed, of which half precision would keep too little.
    student, teacher = _reduce.promote(given.student, given.teacher)
    dtype, reduction = student.dtype, given.reduction
    weights = _reduce.as_rows(given.target, given.class_dim).to(dtype)
    code = _NONE if reduction == _NONE or parts else _SUM
    scale = given.scale
    if code == _SUM and reduction != _SUM:
        rows = max(weights.shape[0], 1)
        scale, hard = scale / rows, hard / rows if hard != 0.0 else 0.0  # no guard on the rows
    token_weight, hard_token_weight = (
        None if x is None else x.to(student.device, dtype)
        for x in (given.flat(given.token_weight), given.flat(given.hard_token_weight))
    )

    def call(
        of: LossSpec, numbers: tuple[Any, ...], factor: Tensor, scale: float, hard: float,
        index: Tensor | int = 0, parts: bool = False,
    ) -> Result:  # fmt: skip
        """Rows of another loss of class indices, which ignore the rows whose factor is 0."""
        index = torch.where(factor == 0, -1, index).reshape(shape)
        by_row = factor if token_weight is None else factor * token_weight
        hard_by_row = None
        if hard != 0.0:
            hard_by_row = factor if hard_token_weight is None else factor * hard_token_weight
            hard_by_row = hard_by_row.reshape(shape)
        return run_hard(
            given._replace(
                spec=of, options=numbers, student=student, teacher=teacher, target=index,
                token_weight=by_row.reshape(shape), hard_token_weight=hard_by_row, scale=scale,
                hard=hard, parts=parts, ignore_index=-1, reduction=code,
            )
        )  # fmt: skip

    def of_rows(values: Tensor, factor: float, weight: Tensor | None) -> Tensor:
        values = _reduce.weigh(values, factor, weight, None)
        return values.reshape(shape) if code == _NONE else values.sum()

    soft = tail = student.new_zeros(shape if code == _NONE else (), dtype=dtype)
    apart, others = _apart(weights, student, teacher, given.class_dim)
    for index, factor in apart:
        soft = soft + call(spec, given.options, factor, scale, 0.0 if parts else hard, index)[0]
        if parts and hard != 0.0:
            tail = tail + call(SPECS["kd"], (), factor, 0.0, hard, index)[0]
    watched = traced(student, teacher) or transformed()
    if watched or not others.is_cpu or bool(others.any()):
        some = (others != 0).any(-1, keepdim=True)  # rows without others are not looked at
        s, t = (_reduce.as_rows(x, given.class_dim) for x in (student, teacher))
        s, t = (torch.where(some, x, 0.0) for x in (s, t))
        heats = given.flat(given.row_temperature)
        heat: Any = given.temperature
        if heats is not None:
            heat = heats.to(student.device, dtype).unsqueeze(1)
        named = given.named()
        pair = s, t
        if given.standardize:
            pair, heat = rescale(s, t, heat, True), 1.0
        written = not watched and choose(spec, student, given.backend) != "reference"
        explicit, shares = (_written if written else _plain)(*pair, others, heat, named)
        soft = soft + of_rows(explicit.to(dtype), scale, token_weight)
        shares = (shares * named["beta"]).to(dtype)
        soft = soft + call(SPECS["kd"], (), shares, scale, 0.0)[0]
        if hard != 0.0:
            below = s - top(s)  # a common offset must not cost digits
            entropies = others.sum(-1) * logsumexp(below) - weighted(below, others).sum(-1)
            tail = tail + of_rows(entropies, hard, hard_token_weight)
    if not parts:
        return soft + tail, None
    ones = torch.ones_like(weights[:, 0])
    _, separate = call(SPECS["kd"], (), ones, 0.0, 0.0, parts=True)
    assert separate is not None
    soft, tail, spread = (x.reshape(-1) for x in (soft, tail, separate[2]))
    return _reduce.finish(soft, tail, spread, None, given)


def _apart(
    weights: Tensor, student: Tensor, teacher: Tensor, class_dim: int
) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """Two classes of each row with their weights, and the weights of the others."""
    first, second = (
        _reduce.as_rows(x.detach(), class_dim).argmax(-1, keepdim=True) for x in (teacher, student)
    )
    largest = weights.topk(2, -1).indices
    few = (weights != 0).sum(-1, keepdim=True) <= 2
    first = torch.where(few, largest[:, :1], first)
    second = torch.where(few, largest[:, 1:], second)
    factors = [weights.gather(-1, first), weights.gather(-1, second)]
    factors[1] = torch.where(first == second, 0.0, factors[1])
    others = weights.scatter(-1, first, 0.0).scatter(-1, second, 0.0)
    pairs = zip((first, second), factors, strict=True)
    return [(index[:, 0], factor[:, 0]) for index, factor in pairs], others


class _Others(NamedTuple):
    """Classes whose p and q are at most 1/2, or whose weight is 0; in float64, whose rounding
    errors are small beside the terms of float32 rows that nearly agree."""

    sums: Tensor
    """Of each row that of w (a - beta / (1 - p)) TCKD."""
    shares: Tensor
    """Of each row the sum of w / (1 - p)."""
    factors: Tensor
    p: Tensor
    q: Tensor
    whole: Tensor
    """q, also of classes without a weight, which may have all of a row's probability."""


def _others(
    student: Tensor,
    teacher: Tensor,
    weights: Tensor,
    temperature: Any,
    *,
    alpha: Any,
    beta: Any,
    kappa: Any = None,
    ratio_max: Any = None,
) -> _Others:
    weights = weights.double()
    scaled = rescale(student.double(), teacher.double(), temperature, False)
    log_q, log_p = (torch.log_softmax(x, -1) for x in scaled)
    whole = log_q.exp()
    q, p = whole.clamp(max=0.75), log_p.exp().clamp(max=0.75)
    shares = weights / (1.0 - p)
    explicit = weights * alpha
    if kappa is not None:
        ratio = weight_of_ratio(log_p, (log_p - log_q).detach(), kappa, ratio_max)
        explicit = torch.where(weights == 0, 0.0, explicit * ratio)
    factors = explicit - shares * beta
    terms = torch.where(p == 0, 0.0, p * (log_p - log_q))
    terms = terms + (1.0 - p) * (torch.log1p(-p) - torch.log1p(-q))
    # What is infinite here KL is too, from which no part of it is taken off.
    finite = torch.where(terms.isinf(), 0.0, terms) if transformed() else _finite(terms)
    sums = (factors * finite).sum(-1)
    infinite = ((terms == torch.inf) & (explicit > 0)).any(-1)
    sums = sums + torch.where(infinite, torch.inf, 0.0)
    return _Others(sums, shares.sum(-1), factors, p, q, whole)


def _plain(
    student: Tensor, teacher: Tensor, weights: Tensor, temperature: Any, numbers: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """The sums and shares of each row, differentiable as often as one likes."""
    return _others(student, teacher, weights, temperature, **numbers)[:2]


class _Finite(torch.autograd.Function):
    """0 for what is infinite, whose gradient stays."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.where(x.isinf(), 0.0, x)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        return upstream


class _Written(torch.autograd.Function):
    """Likewise in blocks that stay in the cache, with their gradient."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, weights: Tensor, temperature: Any,
        numbers: dict[str, Any],
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        rows, classes = student.shape
        sums, shares = (student.new_empty(rows, dtype=torch.float64) for _ in range(2))
        gradient = torch.empty_like(student)
        step = max(_BLOCK // classes, 1) if student.is_cpu else max(rows, 1)
        for begin in range(0, rows, step):
            at = slice(begin, begin + step)
            heat = temperature[at] if isinstance(temperature, Tensor) else temperature
            row = _others(student[at], teacher[at], weights[at], heat, **numbers)
            slopes = row.factors.mul_(row.q - row.p).div_(1.0 - row.q)  # by log q
            slopes = slopes - row.whole * slopes.sum(-1, keepdim=True)
            gradient[at] = slopes.div_(heat)
            sums[at], shares[at] = row.sums, row.shares
        ctx.save_for_backward(student, gradient)
        ctx.mark_non_differentiable(shares)
        return sums, shares

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        student, gradient = ctx.saved_tensors
        gradient = (gradient * upstream.unsqueeze(-1)).to(gradient.dtype)
        if torch.is_grad_enabled():
            gradient = once(gradient, upstream, student)
        return gradient, None, None, None, None


_BLOCK = 1 << 14
"""Classes of a block."""
_finite: Callable[[Tensor], Tensor] = _Finite.apply
_written: Callable[..., tuple[Tensor, Tensor]] = _Written.apply

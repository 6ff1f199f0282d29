"""The losses once more, from their papers, apart from the project: what fuzz.py believes.

Losses of logits take (rows, classes) in extended precision and return a value a row, the gradient,
and the size of the terms whose difference each of its elements is, all closed forms; correlations
and losses of features return one value, and autograd in float64 differentiates their plain
formulas. Nothing here imports the project.

The conventions at the edges are the README's: a class that the teacher excludes contributes 0, one
that only the student excludes makes the value +inf and leaves the gradient finite; a row that is
all -inf or holds NaN or +inf is NaN; a term whose weight is 0 is not there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

WIDE = np.longdouble
Array = Any
Rows = tuple[Array, Array, Array]


# Losses of logits: (student, teacher, target, options) -> values, gradient, size of its terms.


def bad_rows(x: Array) -> Array:
    return np.isnan(x).any(1) | (x == np.inf).any(1) | (x == -np.inf).all(1)


def nan_rows(x: Array) -> Array:
    return np.isnan(x).any(1)


def log_softmax(x: Array) -> Array:
    """Over the last axis; all -inf where there is no class."""
    top = x.max(-1, keepdims=True, initial=-np.inf)
    top = np.where(np.isfinite(top), top, 0)
    shifted = x - top
    total = np.exp(shifted).sum(-1, keepdims=True)
    return np.where(total == 0, -np.inf, shifted - np.log(np.where(total == 0, 1, total)))


def series(d: Any) -> Any:
    """exp(-d) - 1 + d for small d: d^2/2 (1 - d/3 (1 - d/4 (...)))."""
    total = 1 - d * 0
    for n in range(18, 2, -1):
        total = 1 - d / n * total
    return d * d / 2 * total


def kl(log_p: Array, log_q: Array, floor: float) -> Array:
    """sum p log(p / q) as sum p (exp(-d) - 1 + d), which does not cancel.

    A probability below ``floor`` is 0 in the arithmetic on trial, as which it counts where q = 0.
    """
    p, q = np.exp(log_p), np.exp(log_q)
    p = np.where((log_q == -np.inf) & (p < floor), 0, p)
    d = np.where(p == 0, 0, log_p - np.where(p == 0, 0, log_q))
    terms = np.where(abs(d) < 0.25, p * series(np.where(abs(d) < 0.25, d, 0)), q - p + p * d)
    return np.where((p == 0).all(-1), 0, np.where(p == 0, q, terms).sum(-1))


def times(weight: Array, value: Array) -> Array:
    """0 where a term has weight 0, were it infinite."""
    off = (np.asarray(weight) == 0) & (value == np.inf)
    return weight * np.where(off, 0, value)


def standardised(x: Array) -> tuple[Array, Array]:
    deviation = x.std(-1, ddof=1, keepdims=True)
    return (x - x.mean(-1, keepdims=True)) / (deviation + WIDE(1e-7)), deviation


def softened(function: Callable[..., Rows]) -> Callable[..., Rows]:
    """A loss of log-probabilities' logits, as one of logits: temperature, T^2, standardisation."""

    def loss(
        s: Array, t: Array, target: Array, options: dict[str, Any], move: Callable[[Array], Array]
    ) -> Rows:
        temperature = WIDE(options["temperature"])
        bad = bad_rows(s) | bad_rows(t)
        s, t = (np.where(bad[:, None], 0, x) for x in (s, t))
        if options["standardize"]:
            bad = bad | ~np.isfinite(s).all(1) | ~np.isfinite(t).all(1)
            s, t = (np.where(bad[:, None], 0, x) for x in (s, t))
            raw = s - s.mean(-1, keepdims=True)
            (s, deviation), (t, _) = standardised(s), standardised(t)
        s, t = s / temperature, t / temperature
        if options["standardize"]:  # whose mean and deviation are rounded too
            s, t = (move(x) + 3 * (move(x) - x) for x in (s, t))
        value, slope, size = function(move(s), move(t), target, options)
        slope, size = slope / temperature, size / temperature
        if options["standardize"]:
            spread = deviation + WIDE(1e-7)
            still = deviation == 0
            freedom = np.where(still, 1, deviation) * (s.shape[1] - 1) * spread
            pull = np.where(still, 0, (slope * raw).sum(-1, keepdims=True) / freedom)
            centred = slope - slope.mean(-1, keepdims=True)
            slope = centred / spread - np.where(still, 0, raw * pull / spread)
            z = abs(raw) / spread
            along = z * (size * z).sum(-1, keepdims=True) / (s.shape[1] - 1)
            size = (size + size.mean(-1, keepdims=True) + along) / spread
        factor = temperature * temperature * WIDE(options["loss_weight"])
        value, slope, size = times(factor, value), factor * slope, abs(factor) * size
        return np.where(bad, np.nan, value), np.where(bad[:, None], np.nan, slope), size

    return loss


def hard(s: Array, t: Array, target: Array, weight: Any, move: Callable[[Array], Array]) -> Rows:
    """The cross-entropy of the target at temperature 1; bad rows of the teacher are NaN too."""
    bad = bad_rows(s) | bad_rows(t)
    log_q = log_softmax(move(np.where(bad[:, None], 0, s)))
    rows, q = np.arange(len(s)), np.exp(log_q)
    by_logit = q.copy()
    others = q.copy()
    others[rows, target] = 0
    by_logit[rows, target] = -others.sum(-1)
    # Of a certain label, log q is as good as 0, and its complement is not.
    value = np.where(q[rows, target] > 0.5, -np.log1p(-others.sum(-1)), -log_q[rows, target])
    value = times(weight, value)
    value, by_logit = np.where(bad, np.nan, value), np.where(bad[:, None], np.nan, by_logit)
    return value, weight * by_logit, abs(weight * by_logit) + abs(weight) * q


def expected(
    formula: Callable[..., Rows],
    probabilities: Array,
    s: Array,
    t: Array,
    target: Array,
    options: Any,
    move: Callable[[Array], Array],
) -> Rows:
    """The expectation of a formula over the target's class."""
    total: list[Any] = [np.zeros(len(s), WIDE), np.zeros(s.shape, WIDE), np.zeros(s.shape, WIDE)]
    for y in range(s.shape[1]):
        weight = probabilities[:, y]
        made = formula(s, t, np.full_like(target, y), options, move)
        for i, x in enumerate(made):
            factor = weight if x.ndim == 1 else weight[:, None]
            total[i] = total[i] + np.where(factor == 0, 0, factor * np.where(factor == 0, 0, x))
    return total[0], total[1], total[2]


@softened
def kd(s: Array, t: Array, target: Array, options: dict[str, Any]) -> Rows:
    log_q, log_p = log_softmax(s), log_softmax(t)
    p, q = np.exp(log_p), np.exp(log_q)
    return kl(log_p, log_q, options["floor"]), q - p, q + p


def two_terms(
    s: Array,
    t: Array,
    target: Array,
    options: dict[str, Any],
    weigh: Callable[[Array, Array], Array],
) -> Rows:
    """alpha w TCKD + beta NCKD."""
    alpha, beta, floor = WIDE(options["alpha"]), WIDE(options["beta"]), options["floor"]
    rows = np.arange(len(s))

    def split(x: Array) -> tuple[Array, Array]:
        others = x.copy()
        others[rows, target] = -np.inf
        rest = np.logaddexp.reduce(others, -1)
        return log_softmax(np.stack([x[rows, target], rest], -1)), log_softmax(others)

    (pair_q, log_q), (pair_p, log_p) = split(s), split(t)
    weight = weigh(pair_p[:, 0], pair_q[:, 0])
    none_p, none_q = (log_p == -np.inf).all(1), (log_q == -np.inf).all(1)
    implicit = np.where(none_p, 0, np.where(none_q, np.inf, kl(log_p, log_q, floor)))
    value = times(alpha, times(weight, kl(pair_p, pair_q, floor))) + times(beta, implicit)
    p, q = np.exp(log_p), np.exp(log_q)
    on_target = alpha * weight * (np.exp(pair_p[:, 1]) - np.exp(pair_q[:, 1]))
    rare = np.exp(pair_p[:, 0]) < np.exp(pair_p[:, 1])
    on_target = np.where(
        rare, alpha * weight * (np.exp(pair_q[:, 0]) - np.exp(pair_p[:, 0])), on_target
    )
    slope = -on_target[:, None] * q + beta * np.where((none_p | none_q)[:, None], 0, q - p)
    slope[rows, target] = on_target
    # The difference of the rarer outcome's probabilities: the target's, or that of all others.
    rarer = np.where(rare, 0, 1)
    outcome = abs(alpha) * weight * sum(np.exp(x[rows, rarer]) for x in (pair_p, pair_q))
    size = outcome[:, None] * q + abs(beta) * (p + q)
    size[rows, target] = outcome
    return value, slope, size


@softened
def dkd(s: Array, t: Array, target: Array, options: dict[str, Any]) -> Rows:
    return two_terms(s, t, target, options, lambda p, q: np.ones_like(p))


@softened
def aekt(s: Array, t: Array, target: Array, options: dict[str, Any]) -> Rows:
    kappa, most = WIDE(options["kappa"]), np.log(WIDE(options["ratio_max"]))

    def ratio(log_p: Array, log_q: Array) -> Array:
        impossible = log_p == -np.inf
        gap = np.where(impossible, 0, log_p) - np.where(impossible, 0, log_q)
        grown = np.exp(np.minimum(gap, most) * kappa)
        return np.where(impossible, 1 if kappa == 0 else 0, grown)

    return two_terms(s, t, target, options, ratio)


def of_tokens(function: Callable[..., Rows]) -> Callable[..., Rows]:
    """A loss of token distributions: the temperature divides, and there is no T^2."""

    def loss(
        s: Array, t: Array, target: Array, options: dict[str, Any], move: Callable[[Array], Array]
    ) -> Rows:
        temperature, weight = WIDE(options["temperature"]), WIDE(options["loss_weight"])
        bad = bad_rows(s) | bad_rows(t)
        s, t = (np.where(bad[:, None], 0, x) / temperature for x in (s, t))
        value, slope, size = function(log_softmax(move(s)), log_softmax(move(t)), options)
        value, factor = times(weight, value), weight / temperature
        slope = factor * slope
        return (
            np.where(bad, np.nan, value),
            np.where(bad[:, None], np.nan, slope),
            abs(factor) * size,
        )

    return loss


def _collected(q: Array, size: Array) -> Array:
    """Autograd of the reference gives the likeliest class minus the sum of the others' slopes."""
    likeliest = q > 0.999 * q.max(-1, keepdims=True)  # rounded logits may tie
    return np.where(likeliest, size.sum(-1, keepdims=True), size)


def _projected(
    q: Array, by_log_q: Array, options: dict[str, Any], least: Array | None = None
) -> tuple[Array, Array]:
    """q (x - sum q x), and the size of its terms; NaN where a class makes it infinite.

    The terms are those from a pivot, unless the arithmetic on trial is autograd of the plain
    formula. Then sum q x has terms of one sign, and n additions of nearly equal terms err by up to
    n / 4 roundings of their sum, where fuzz.py allows 16; and the likeliest class has minus the sum
    of the others' gradients, whose errors it collects.
    """
    floor = options["floor"]
    # Where the value counts a probability below the floor as 0, see kl, so does the gradient.
    x = np.where((q == 0) | ((q < floor) & np.isinf(by_log_q)), 0, by_log_q)
    # From the likeliest class, by which nothing changes and a certain row's digits are kept.
    x = np.where(q == 0, 0, x - np.take_along_axis(x, q.argmax(-1)[:, None], -1))
    mean = (q * x).sum(-1, keepdims=True)
    size = q * (abs(x) + (q * abs(x)).sum(-1, keepdims=True) + 1)
    slope = np.where(np.isfinite(mean), q * (x - mean), np.nan)
    if not options["pivot"]:
        far = np.where(np.isfinite(by_log_q), abs(by_log_q), 0)
        # The exponential of a logarithm errs by the rounding of that, of which fuzz.py allows 32.
        with np.errstate(divide="ignore"):
            far = far * np.maximum(1, np.where(q == 0, 0, -np.log(q)) / 32)
        total = (q * far).sum(-1, keepdims=True) * (1 + q.shape[-1] / 64)
        size = np.maximum(size, q * (far + total))
        size = _collected(q, size)
    # A probability below the floor is 0, or has few digits, in the arithmetic on trial; where it or
    # the mixture's (the least) is, 1 / m is held at that of a normal number. The quotient q / m
    # falls short by up to 2^24, of doubles 2^53, then, and its logarithm by 37: the class errs by
    # itself and by that. Slopes of a ratio instead, which is bounded, err by less.
    lost = (q if least is None else np.minimum(q, least)) < floor
    error = q * (np.where(np.isfinite(by_log_q), abs(by_log_q), 0) + abs(x) + 37)
    error = np.where(np.isfinite(mean), error + q * abs(mean), error)
    return slope, np.where(lost, size + error / options["unit"], size)


def _reverse_kl(log_q: Array, log_p: Array, options: dict[str, Any]) -> Rows:
    q = np.exp(log_q)
    both = (log_q == -np.inf) & (log_p == -np.inf)
    gap = np.where(both, 0, log_q - np.where(both, 0, log_p))
    return kl(log_q, log_p, options["floor"]), *_projected(q, gap, options)


def _jsd(log_q: Array, log_p: Array, options: dict[str, Any]) -> Rows:
    beta, floor = WIDE(options["beta"]), options["floor"]
    p, q = np.exp(log_p), np.exp(log_q)
    if beta == 0:
        return kl(log_p, log_q, floor), q - p, q + p
    if beta == 1:
        return _reverse_kl(log_q, log_p, options)
    log_m = np.logaddexp(np.log(beta) + log_p, np.log1p(-beta) + log_q)
    value = beta * kl(log_p, log_m, floor) + (1 - beta) * kl(log_q, log_m, floor)
    none = log_q == -np.inf
    by_log_q = np.where(none, 0, log_q - np.where(none, 0, log_m))
    slope, size = _projected(q, by_log_q, options, np.exp(log_m))
    return value, (1 - beta) * slope, (1 - beta) * size


def _mixed_kl(log_q: Array, log_p: Array, options: dict[str, Any]) -> Rows:
    weight, floor = WIDE(options["forward_weight"]), options["floor"]
    p, q = np.exp(log_p), np.exp(log_q)
    forward = kl(log_p, log_q, floor)
    if weight == 1:
        return forward, q - p, q + p
    reverse, slope, size = _reverse_kl(log_q, log_p, options)
    value = times(weight, forward) + times(1 - weight, reverse)
    slope = weight * (q - p) + (1 - weight) * slope
    return value, slope, weight * (q + p) + (1 - weight) * size


def _skew(log_own: Array, log_other: Array, alpha: Array, floor: float) -> tuple[Array, Array]:
    """KL of a distribution from its mixture with another one, and the logarithm of the mixture."""
    log_m = np.logaddexp(np.log(alpha) + log_own, np.log1p(-alpha) + log_other)
    return kl(log_own, log_m, floor), log_m


def _skew_kl(log_q: Array, log_p: Array, options: dict[str, Any]) -> Rows:
    alpha, floor = WIDE(options["alpha"]), options["floor"]
    p, q = np.exp(log_p), np.exp(log_q)
    if alpha == 0:
        return kl(log_p, log_q, floor), q - p, q + p
    if alpha == 1:
        return 0 * p.sum(-1), 0 * p, 0 * p + 1e-300
    value, log_m = _skew(log_p, log_q, alpha, floor)
    ratio = np.where(log_m == -np.inf, 0, np.exp(log_p - np.where(log_m == -np.inf, 0, log_m)))
    slope, size = _projected(q, 1 - ratio, options, np.exp(log_m))
    return value, (1 - alpha) * slope, (1 - alpha) * size


def _skew_reverse_kl(log_q: Array, log_p: Array, options: dict[str, Any]) -> Rows:
    alpha, floor = WIDE(options["alpha"]), options["floor"]
    p, q = np.exp(log_p), np.exp(log_q)
    if alpha == 0:
        return _reverse_kl(log_q, log_p, options)
    if alpha == 1:
        return 0 * p.sum(-1), 0 * p, 0 * p + 1e-300
    value, log_m = _skew(log_q, log_p, alpha, floor)
    none = log_q == -np.inf
    log_ratio = np.where(none, 0, log_q - np.where(none, 0, log_m))
    by_log_q = log_ratio + alpha * (1 - np.exp(log_ratio))
    return value, *_projected(q, by_log_q, options, np.exp(log_m))


def _tv(log_q: Array, log_p: Array, options: dict[str, Any]) -> Rows:
    p, q = np.exp(log_p), np.exp(log_q)
    slope, size = _projected(q, np.sign(q - p) / 2, options)
    # Where both are nearly equal the sign is that of a rounding error.
    jumps = (abs(p - q) < 1e-3 * q) & (q > 0)
    touched = jumps | (jumps * q).sum(-1, keepdims=True).astype(bool)
    # A certain class differs by what the others do, of which 1 - x would lose the digits.
    gap = p - q
    at = q.argmax(-1)[:, None]
    np.put_along_axis(gap, at, 0, -1)
    np.put_along_axis(gap, at, -gap.sum(-1, keepdims=True), -1)
    return abs(gap).sum(-1) / 2, slope, np.where(touched, 1e18 * q, size)


def _acceptance(log_q: Array, log_p: Array, options: dict[str, Any]) -> Rows:
    distance, slope, size = _tv(log_q, log_p, options)
    overlap = np.exp(np.minimum(log_q, log_p)).sum(-1)
    if options["kind"] == "log":
        least = WIDE(options["tiny"]) * 2**36
        value = -np.log(np.maximum(overlap, least))
        value = np.where(distance < 0.5, -np.log1p(-np.minimum(distance, 0.5)), value)
        factor = np.where(overlap < least, 0, 1 / np.maximum(overlap, least))[:, None]
        at_floor = (abs(overlap / least - 1) < 1e-3)[:, None]
        return value, slope * factor, np.where(at_floor, 1e18, 1) * size * factor
    p, q, eta = np.exp(log_p), np.exp(log_q), WIDE(options["eta"])
    weight = np.exp(eta * (distance - 1))
    value = times(weight, kl(log_p, log_q, options["floor"])) + times(1 - weight, distance)
    weight = weight[:, None]
    return value, weight * (q - p) + (1 - weight) * slope, weight * (q + p) + (1 - weight) * size


def _alpha_beta(log_q: Array, log_p: Array, options: dict[str, Any]) -> Rows:
    alpha, beta = WIDE(options["alpha"]), WIDE(options["beta"])
    total = alpha + beta
    # A power of what counts as 0 is 0; options["floor"] says what does.
    least = np.log(options["floor"]) / (1 if options["pivot"] else total)
    lost = np.maximum(log_p, log_q) < least
    q = np.exp(log_q)
    neither = (log_p == -np.inf) & (log_q == -np.inf)
    gap = np.where(neither, 0, log_p - np.where(neither, 0, log_q))
    value, slope = np.zeros_like(q), np.zeros_like(q)
    for mine, a, b in ((gap < 0, alpha, beta), (gap >= 0, beta, alpha)):  # a: of the smaller one
        x = np.where(mine, abs(gap), 0)
        top = np.exp(np.where(neither | ~mine, 0, total * np.maximum(log_p, log_q)))
        top = np.where(neither, 0, top)
        small = np.where(x < 0.25, x, 0)
        # 1 / (a b) (a / s exp(-s x) + b / s - exp(-a x)), term by term of its series.
        near, power = np.zeros_like(x), np.ones_like(x)
        for k in range(1, 24):
            power = power * -small / k
            powers = sum((total**j * a ** (k - 2 - j) for j in range(k - 1)), WIDE(0))
            near = near + power * powers
        with np.errstate(all="ignore"):
            e_a, e_s = np.exp(-a * x), np.exp(-total * x)
            if a == 0:
                far = (np.expm1(-b * x) + b * x) / b**2
            elif b == 0:
                far = (1 - (1 + np.where(e_a == 0, 0, a * x)) * e_a) / a**2
            else:
                far = (a / total * e_s + b / total - e_a) / (a * b)
            own = x if a == 0 else -np.expm1(-a * x) / a
            others = x if b == 0 else -np.expm1(-b * x) / b
        value = value + np.where(mine, top * np.where(x < 0.25, near, far), 0)
        of_student = gap < 0
        by = np.where(of_student, own, -np.where(e_a == 0, 0, others * e_a))
        slope = slope + np.where(mine, top * by, 0)
    infinite = ~np.isfinite(slope).all(-1) | np.isinf(value).any(-1)
    size = abs(np.where(np.isfinite(slope), slope, 0))
    # The arithmetic on trial may keep such a probability, as a number of few digits: at worst of
    # one, rounded up from half of it, whose power (at most the second) is four times too large
    # then. All classes have a share of the error, by the mean.
    size = np.where(lost, size * 4 / options["unit"], size)
    value, slope = (np.where(lost, 0, x) for x in (value, slope))
    mean = np.where(np.isfinite(slope), slope, 0).sum(-1, keepdims=True)
    # A certain class's log-probability, nearly 0, errs by roundings of 1, and with it its slope.
    size = size + 4 * q * (1 + size.sum(-1, keepdims=True))
    size = size if options["pivot"] else _collected(q, size)
    gradient = slope - q * mean
    return value.sum(-1), np.where(infinite[:, None], np.nan, gradient), size


def sigmoid_kd(
    s: Array, t: Array, target: Array, options: dict[str, Any], move: Callable[[Array], Array]
) -> Rows:
    """Two outcomes a class. NaN is its class's alone, and infinite logits are certain ones."""
    temperature = WIDE(options["temperature"])
    s, t = move(s / temperature), move(t / temperature)
    nan = np.isnan(s) | np.isnan(t)
    s, t = (np.where(nan, 0, x) for x in (s, t))
    (log_q, log_p) = (-np.stack([np.logaddexp(0, -x), np.logaddexp(0, x)], -1) for x in (s, t))
    value = kl(log_p, log_q, options["floor"]).sum(-1)
    p, q = np.exp(log_p), np.exp(log_q)
    likely = s > 0
    slope = np.where(likely, p[..., 1] - q[..., 1], q[..., 0] - p[..., 0])
    size = np.where(likely, p[..., 1] + q[..., 1], q[..., 0] + p[..., 0])
    factor = temperature * WIDE(options["loss_weight"])
    value = np.where(nan.any(-1), np.nan, times(factor * temperature, value))
    return value, np.where(nan, np.nan, factor * slope), abs(factor) * size


def held(name: str, options: dict[str, Any]) -> Any:
    """What a class of a mixture may lose of a value, over the number that a mixture is held at.

    Of p log(p / m), where m falls short of it: p is at most m over the mixture's smaller share.
    """
    if name not in MIXTURES:
        return 0
    share = WIDE(options[MIXTURES[name]])
    return 1 / min(x for x in (share, 1 - share) if x > 0)


MIXTURES = {"jsd": "beta", "skew_kl": "alpha", "skew_reverse_kl": "alpha"}
ROWS: dict[str, Callable[..., Rows]] = {
    "sigmoid_kd": sigmoid_kd,
    "kd": kd,
    "dkd": dkd,
    "aekt": aekt,
    "reverse_kl": of_tokens(_reverse_kl),
    "jsd": of_tokens(_jsd),
    "mixed_kl": of_tokens(_mixed_kl),
    "skew_kl": of_tokens(_skew_kl),
    "skew_reverse_kl": of_tokens(_skew_reverse_kl),
    "tv": of_tokens(_tv),
    "alpha_beta": of_tokens(_alpha_beta),
    "acceptance": of_tokens(_acceptance),
}


# Losses of a batch: tensors in float64, options -> 0-d value, for autograd.


def dist(s: Tensor, t: Tensor, labels: Tensor | None = None, *, ignore_index: int, beta: Any,
         gamma: Any, tau: Any, eps: Any, reduction: str, loss_weight: Any, move: Any = None,
         floor: float = 1e-28, sigmoids: bool = False) -> Tensor:  # fmt: skip
    if labels is not None:
        s, t = (x[labels.flatten().long() != ignore_index] for x in (s, t))
    if len(s) == 0:
        return s.sum()
    q, p = (torch.sigmoid(x / tau) if sigmoids else torch.softmax(x / tau, 1) for x in (s, t))
    total: Any = 0.0
    for dim, weight in ((1, beta), (0, gamma)):
        means = [x.mean(dim, keepdim=True) for x in (q, p)]
        # The slopes sum to 0: through the mean nothing passes, but errors would be projected.
        means = [m if move is None else m.detach() for m in means]
        a, b = (x - m for x, m in zip((q, p), means, strict=True))
        for x, y in ((a, q), (b, p)):  # the rounding of a constant's mean is no signal
            noise = 4e-16 * y.detach().amax(dim, keepdim=True)
            x.data[(x.detach().abs() <= noise).all(dim, keepdim=True).expand(x.shape)] = 0
        if move is not None:  # a constant stays one
            a, b = (
                x + torch.where((x == 0).all(dim, keepdim=True), 0.0, (move(y) - y).detach())
                for x, y in ((a, q), (b, p))
            )
        squares = (a * a).sum(dim), (b * b).sum(dim)
        norms = [torch.where(x == 0, 0.0, torch.where(x == 0, 1.0, x).sqrt()) for x in squares]
        product = norms[0] * norms[1] + eps
        if move is None and eps < 1e-12 and any(((x > 0) & (x < floor)).any() for x in squares):
            return s.sum() * torch.nan  # what float32 loses depends on the order of its operations
        # A constant has the correlation 0 and no slope, whatever eps is.
        rho = (a * b).sum(dim) / torch.where(product == 0, 1.0, product)
        far = 1 - torch.where(product == 0, 0.0, rho)
        total = total + weight * (far.sum() if reduction == "sum" else far.mean())
    return loss_weight * tau * tau * total


sigmoid_dist = functools.partial(dist, sigmoids=True)


def _unit(x: Tensor) -> Tensor:
    squares = x.square().sum(1, keepdim=True)
    tiny = squares < 1e-24
    return torch.where(tiny, x / 1e-12, x / torch.where(tiny, 1.0, squares).sqrt())


def iekd(inh: Tensor, exp: Tensor, t: Tensor, *, inheritance_weight: Any, exploration_weight: Any,
         similarity: str, reduction: str, loss_weight: Any) -> Tensor:  # fmt: skip
    a, b, c = (_unit(x.flatten(1)) for x in (inh, exp, t))
    if similarity == "l1":
        near, far = (a - c).abs().mean(1), -(b - c).abs().mean(1)
    else:
        near, far = 1 - (a * c).sum(1), (b * c).sum(1).abs()
    total = (inheritance_weight * near + exploration_weight * far).sum()
    return loss_weight * total / (1 if reduction == "sum" else max(len(a), 1))


def attention(s: Tensor, t: Tensor, *, p: Any, reduction: str, loss_weight: Any) -> Tensor:
    def attended(x: Tensor) -> Tensor:
        return _unit(x.abs().pow(p).mean(1).flatten(1))

    gap = (attended(s) - attended(t)).square()
    return loss_weight * gap.sum() / (1 if reduction == "sum" else max(gap.numel(), 1))


def hint(s: Tensor, t: Tensor, *, reduction: str, loss_weight: Any) -> Tensor:
    gap = (s - t).square()
    return loss_weight * gap.sum() / (1 if reduction == "sum" else max(gap.numel(), 1))


def pkd(s: Tensor, t: Tensor, *, reduction: str, loss_weight: Any) -> Tensor:
    def normalised(x: Tensor) -> Tensor:
        centred = x - x.mean((0, 2, 3), keepdim=True)
        count = x.numel() // x.shape[1]
        variance = centred.square().sum((0, 2, 3), keepdim=True) / (count - 1)
        still = variance == 0
        deviation = torch.where(still, 0.0, torch.where(still, 1.0, variance).sqrt())
        return centred / (deviation + 1e-6)

    gap = (normalised(s) - normalised(t)).square()
    return loss_weight * gap.sum() / 2 / (1 if reduction == "sum" else gap.numel())


def rkd(s: Tensor, t: Tensor, *, distance_weight: Any, angle_weight: Any, reduction: str,
        loss_weight: Any) -> Tensor:  # fmt: skip
    samples = len(s)
    if samples == 0:
        return s.sum()

    def relations(x: Tensor) -> tuple[Tensor, Tensor]:
        gaps = x[None] - x[:, None]  # [i, j] = x_j - x_i
        squares = gaps.square().sum(-1)
        same = squares == 0
        length = torch.where(same, 0.0, torch.where(same, 1.0, squares).sqrt())
        unit = gaps / torch.where(same, 1.0, length)[..., None]
        apart = torch.where(same, 1e-6, length) * (1 - torch.eye(samples, dtype=x.dtype))
        mean = apart.sum() / max(samples * (samples - 1), 1)
        return apart / mean.clamp(min=1e-12), unit @ unit.transpose(1, 2)

    (d_s, a_s), (d_t, a_t) = relations(s), relations(t)
    huber = lambda x: torch.where(x.abs() < 1, x * x / 2, x.abs() - 0.5)  # noqa: E731
    means = (1, 1) if reduction == "sum" else (samples**2, samples**3)
    distance, angle = huber(d_s - d_t).sum() / means[0], huber(a_s - a_t).sum() / means[1]
    return loss_weight * (distance_weight * distance + angle_weight * angle)


def near_kl(logits_p: Tensor, logits_q: Tensor) -> Tensor:
    """KL of softmaxes over the last axis, in float64 torch."""
    log_p, log_q = torch.log_softmax(logits_p, -1), torch.log_softmax(logits_q, -1)
    d = log_p - log_q
    small = d.abs() < 0.25
    near = log_p.exp() * series(torch.where(small, d, 0.0))
    return torch.where(small, near, log_q.exp() - log_p.exp() + log_p.exp() * d).sum(-1)


def tuple_matching(s: Tensor, t: Tensor, target: Tensor, *, temperature: Any, margin: Any,
                   reduction: str, loss_weight: Any) -> Tensor:  # fmt: skip
    def distances(x: Tensor) -> Tensor:
        gaps = _unit(x)[None] - _unit(x)[:, None]
        squares = gaps.square().sum(-1)
        same = squares < 1e-14
        return torch.where(same, 0.0, torch.where(same, 1.0, squares).sqrt())

    d_s, d_t = distances(s), distances(t)
    total, tuples = s.sum() * 0, 0
    for a in range(len(s)):
        for p in range(len(s)):
            if a == p or target[a] != target[p]:
                continue
            gap = (d_s[a] - d_s[a, p]).detach()
            members = (target != target[a]) & (gap > 0) & (gap <= margin)
            if not members.any():
                continue
            tuples += 1
            logits = [-torch.cat([d[a, p][None], d[a, members]]) / temperature for d in (d_s, d_t)]
            total = total + near_kl(logits[1], logits[0])
    return loss_weight * total / (1 if reduction == "sum" else max(tuples, 1))


def local_classifier(s: Tensor, t: Tensor, centers: Tensor, target: Tensor, *, temperature: Any,
                     ignore_index: int, reduction: str, loss_weight: Any) -> Tensor:  # fmt: skip
    counted = target.long() != ignore_index
    present = torch.unique(target.long()[counted])
    taught = (t[counted] @ centers.T)[:, present]
    rows = loss_weight * near_kl(taught / temperature, s[counted][:, present] / temperature)
    if reduction == "none":
        return torch.zeros(len(s), dtype=rows.dtype).masked_scatter(counted, rows)
    return rows.sum() / (1 if reduction == "sum" else max(len(rows), 1))


def sampled_kl(s: Tensor, ids: Tensor, logprob: Tensor, *, estimator: str, reduction: str,
               loss_weight: Any, **_: Any) -> Tensor:  # fmt: skip
    classes = 1 if s.dim() in (2, 4) else 2
    own = s.log_softmax(classes).gather(classes, ids.long().unsqueeze(classes)).squeeze(classes)
    d = logprob - own
    rows = loss_weight * {"k1": -d, "k2": d * d / 2, "k3": torch.expm1(d) - d}[estimator]
    if reduction == "none":
        return rows
    return rows.sum() / (1 if reduction == "sum" else max(rows.numel(), 1))


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL of log-probabilities, of which some may be -inf."""
    none, bare = log_p == -torch.inf, log_q == -torch.inf
    a, b = torch.where(none, 0.0, log_p), torch.where(none | bare, 0.0, log_q)
    d = torch.where(none, 0.0, a - b)
    small = d.abs() < 0.25
    near = a.exp() * series(torch.where(small, d, 0.0))
    far = log_q.exp() - log_p.exp() + torch.where(none, 0.0, log_p.exp() * d)
    terms = torch.where(small & ~none & ~bare, near, far)
    return torch.where(bare & ~none, torch.inf, terms).sum(-1)


def topk_kd(s: Tensor, ids: Tensor, logprobs: Tensor, *, temperature: Any, divergence: str,
            beta: Any, tail: str, reduction: str, loss_weight: Any,
            **_: Any) -> Tensor:  # fmt: skip
    s = s.movedim(1, -1) if s.dim() == 4 else s
    present = logprobs > -torch.inf
    index = torch.where(present, ids.long(), 0)
    full = s / temperature  # of which the constant of a row does not matter
    full = full if tail == "renormalize" else full.log_softmax(-1)
    apart = torch.zeros(s.shape).scatter_add(-1, index, present.float()) > 0
    left = (~apart & (full > -torch.inf)).any(-1, keepdim=True)
    rest = torch.where(apart & left, -torch.inf, full).logsumexp(-1, keepdim=True)
    rest = torch.where(left, rest, -torch.inf)
    log_q = torch.cat([torch.where(present, full.gather(-1, index), -torch.inf), rest], -1)
    mass = logprobs.exp().sum(-1, keepdim=True)
    nothing = torch.full_like(mass, -torch.inf)
    over = torch.log1p(-mass.clamp(max=1)) if tail == "bucket" else nothing
    log_p = torch.cat([logprobs, over], -1)
    if tail == "renormalize":
        log_q = torch.cat([log_q[..., :-1], nothing], -1)
    counts = present.any(-1)
    log_p, log_q = (torch.where(counts.unsqueeze(-1), x, 0.0) for x in (log_p, log_q))
    log_p = log_p - log_p.logsumexp(-1, keepdim=True)
    log_q = log_q - log_q.logsumexp(-1, keepdim=True)
    if divergence == "tv":
        rows = (log_p.exp() - log_q.exp()).abs().sum(-1) / 2
    elif divergence == "kl" or (divergence == "jsd" and beta == 0):
        rows = _kl(log_p, log_q)
    elif divergence == "reverse_kl" or beta == 1:
        rows = _kl(log_q, log_p)
    else:
        m = torch.log(beta * log_p.exp() + (1 - beta) * log_q.exp())
        rows = beta * _kl(log_p, m) + (1 - beta) * _kl(log_q, m)
    if tail == "drop":
        rows = mass[..., 0] * rows + torch.xlogy(mass, mass)[..., 0]
    rows = torch.where(counts, loss_weight * rows, 0.0)
    if reduction == "none":
        return rows
    return rows.sum() / (1 if reduction == "sum" else max(int(counts.sum()), 1))


BATCHES: dict[str, Callable[..., Tensor]] = {
    name: globals()[name]
    for name in (
        "dist", "sigmoid_dist", "iekd", "attention", "hint", "pkd", "rkd", "tuple_matching",
        "local_classifier", "sampled_kl", "topk_kd",
    )
}  # fmt: skip

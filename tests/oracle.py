"""The judge of numbers: a result may err as much as its dtype explains, and no more.

``truth`` is the float64 reference on the same rounded inputs, ``baseline`` the reference in the
working dtype. A result passes if

    err(result) <= 2 err(baseline) + K sensitivity + eps(dtype) scale

where ``sensitivity`` is how much the truth moves when every logit moves by one rounding error (an
ill-conditioned loss deserves no exact digits), or one rounding error of the terms that cancel in
it, whose size is that of the loss of ordinary, unrelated logits. The last term is the rounding of
the result, felt in half precision. The comparison is written ``not (err <= bound)``, so that NaN
fails. Shapes, dtypes and the places of NaN and inf are compared first and exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from cases import Case, row_weights, value_and_grad
from layouts import as_rows, like_rows
from torch import Tensor

K = 16.0


@dataclass
class Expected:
    """The truth of one tensor, with what is needed to judge an approximation of it."""

    truth: Tensor
    baseline: Tensor
    sensitivity: Tensor


def check(actual: Tensor, expected: Expected, what: str = "value") -> None:
    """Compare in the maximum norm of each row (the last dimension)."""
    difference, base, truth, sensitivity, eps = _prepare(actual, expected, what)
    noise = K * (_rowmax(sensitivity) + _tiny(actual.dtype))
    bound = 2 * _rowmax(base) + noise + eps * _rowmax(truth)
    _require(_rowmax(difference), bound, f"{what}: largest error of a row")


def check_gradient(actual: Tensor, expected: Expected, what: str = "gradient") -> None:
    """``check`` each row of (rows, classes), then the aggregates that single elements hide."""
    check(actual, expected, what)
    difference, base, truth, sensitivity, eps = _prepare(actual, expected, what)
    norm = truth.norm()
    tiny = _tiny(actual.dtype) * truth.numel() ** 0.5
    slack = K * (sensitivity.norm() + tiny)
    _require(difference.norm(), 2 * base.norm() + slack + eps * norm, f"{what}: L2 error")

    # Rounding errors are independent, so their mean shrinks: a small bias of all elements shows.
    weight = truth / norm.clamp(min=1e-300)
    spread = weight.square().norm()  # 1 / sqrt(effective number of elements)
    bias = lambda d: (d * weight).sum().abs()  # noqa: E731
    _require(bias(difference), 2 * bias(base) + slack + 2 * eps * norm * spread, f"{what}: bias")

    # The losses do not change when a constant is added to a row of logits.
    total = lambda d: d.sum(-1).abs().amax()  # noqa: E731
    mass = truth.abs().sum(-1).amax()
    width = truth.shape[-1]
    bound = 2 * total(base) + eps * mass + K * (sensitivity.sum(-1).amax() + width * tiny)
    _require(total(difference), bound, f"{what}: sum of a row")


def _prepare(
    actual: Tensor, expected: Expected, what: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
    """Metadata and non-finite elements first; then finite float64 differences."""
    truth, baseline = expected.truth, expected.baseline
    for other in (truth, baseline):
        assert actual is not other, f"{what}: compared with itself"
        assert not _alias(actual, other), f"{what}: shares memory with what it is compared with"
    assert actual.dtype == baseline.dtype, f"{what}: dtype {actual.dtype}, not {baseline.dtype}"
    assert actual.shape == truth.shape, f"{what}: shape {actual.shape}, not {truth.shape}"
    assert baseline.shape == truth.shape, f"{what}: the baseline has shape {baseline.shape}"
    a, b, t = (x.detach().cpu().double() for x in (actual, baseline, truth))
    # Beyond the largest number of the dtype (or within its last digit) both are right.
    limit = torch.finfo(actual.dtype).max
    overflow = torch.isfinite(t) & (t.abs() >= limit * (1 - 2 * torch.finfo(actual.dtype).eps))
    a = torch.where(overflow, t, a)
    for name, test in (("NaN", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
        wrong = test(a) != test(t)
        assert not wrong.any(), f"{what}: {name} at {wrong.nonzero()[:4].tolist()}, truth differs"
    keep = torch.isfinite(t) & ~overflow
    zero = torch.zeros((), dtype=torch.float64)
    difference = torch.where(keep, a - t, zero)
    base = torch.where(keep & torch.isfinite(b), b - t, zero)
    sensitivity = _finite(expected.sensitivity.cpu().double())
    return difference, base, torch.where(keep, t, zero), sensitivity, torch.finfo(actual.dtype).eps


def _alias(a: Tensor, b: Tensor) -> bool:
    return a.numel() > 0 and a.data_ptr() == b.data_ptr()


def _finite(x: Tensor) -> Tensor:
    """Zero where there is no finite number to compare with."""
    return torch.where(torch.isfinite(x), x, torch.zeros_like(x))


def _rowmax(x: Tensor) -> Tensor:
    if x.dim() == 0:
        return x.abs()
    if x.shape[-1] == 0:
        return x.new_zeros(x.shape[:-1])
    return x.abs().amax(-1)


def _tiny(dtype: torch.dtype) -> float:
    """What may be lost to underflow; float16 cannot afford to lose its subnormal numbers."""
    info = torch.finfo(dtype)
    return info.smallest_normal * (info.eps if dtype == torch.float16 else 1.0)


def _require(error: Tensor, bound: Tensor, what: str) -> None:
    wrong = ~(error <= bound)
    if wrong.any():
        error, bound = error.flatten(), bound.expand_as(error).flatten()
        worst = int(
            torch.where(wrong.flatten(), error / bound, -torch.inf)
            .nan_to_num(nan=torch.inf)
            .argmax()
        )
        raise AssertionError(f"{what} is {error[worst]:.3e}, bound {bound[worst]:.3e}")


def expectation(
    function: Callable[..., Tensor],
    student: Tensor,
    teacher: Tensor,
    *args: Any,
    upstream: Tensor | None = None,
    **options: Any,
) -> tuple[Expected, Expected]:
    """What a loss and its gradient (as rows) must be; ``function`` runs the reference."""
    s, t = student.detach().contiguous(), teacher.detach().contiguous()
    args = tuple(a.contiguous() if isinstance(a, Tensor) else a for a in args)

    def run(s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return value_and_grad(function, s, t, *args, upstream=upstream, **options)

    truth = run(s.double(), t.double())
    baseline = run(s, t)
    double = torch.float64 in (s.dtype, t.dtype)
    eps = torch.finfo(torch.float64 if double else torch.float32).eps
    nudged = [run(_nudge(s, eps, seed), _nudge(t, eps, seed + 10)) for seed in (0, 1)]
    others = [
        run(s.double(), like_rows(_other(t), t)),
        run(like_rows(_ordinary(s), s), like_rows(_other(t), t)),
    ]
    results = []
    for i, layout in enumerate((lambda x: x.unsqueeze(-1), as_rows)):
        # A value stands alone: every row of a batch is a problem of its own.
        moves = [_finite((n[i] - truth[i]).abs()) for n in nudged]
        terms = [eps * _finite(x[i].abs()) for x in (truth, *others)]
        sensitivity = torch.stack([*moves, *terms]).amax(0)
        results.append(Expected(*map(layout, (truth[i], baseline[i], sensitivity))))
    return results[0], results[1]


def _ordinary(x: Tensor) -> Tensor:
    """Rows of the same order whose finite logits spread by 1: nothing is saturated."""
    rows = as_rows(x.double())
    finite = torch.isfinite(rows)
    count = finite.sum(1, keepdim=True).clamp(min=1)
    mean = _finite(rows).sum(1, keepdim=True) / count
    centred = torch.where(finite, rows - mean, rows)
    spread = (_finite(centred).square().sum(1, keepdim=True) / count).sqrt()
    return torch.where(finite, centred / spread.clamp(min=1e-6), rows)


def _other(x: Tensor) -> Tensor:
    """Ordinary rows that have nothing to do with those of ``x``."""
    rows = _ordinary(x).flip(1)
    return rows + torch.linspace(-1, 1, rows.shape[1]).to(rows)


def _nudge(x: Tensor, eps: float, seed: int) -> Tensor:
    """Move every element by one rounding error, up or down."""
    generator = torch.Generator().manual_seed(seed)
    sign = torch.randint(2, x.shape, generator=generator).to(x.device).double() * 2 - 1
    x = x.double()
    return torch.where(torch.isfinite(x), x + sign * eps * x.abs().clamp(min=1.0), x)


def verify(
    case: Case,
    student: Tensor,
    teacher: Tensor,
    index: Tensor | None = None,
    /,
    *,
    upstream: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Run a case and judge its value and gradient; returns both."""

    def reference(s: Tensor, t: Tensor, y: Tensor | None, **kw: Any) -> Tensor:
        return Case(case.spec, "reference", case.device)(s, t, y, **kw)

    args = (teacher, index)
    loss, gradient = value_and_grad(case, student, *args, upstream=upstream, **options)
    if upstream is None:
        upstream = row_weights(loss)
    for_value, for_gradient = expectation(reference, student, *args, upstream=upstream, **options)
    assert gradient.shape == student.shape
    check(loss.unsqueeze(-1), for_value, "loss")
    check_gradient(as_rows(gradient), for_gradient)
    return loss, gradient

"""What a loss must be at sizes that the float64 reference cannot hold: in chunks, on some rows.

The value is that of all rows, and the gradient that of sampled rows, both in float64 from the same
rounded logits. A row loss is the reference on chunks of rows. DIST's columns couple the rows: its
moments are summed over chunks first, and the gradient of a row is that of the moments in which
only this row varies.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kdkernels.registry import SPECS

CHUNK = 2**25
"""Elements that are float64 at the same time."""
EPS = 1e-8


class Truth(NamedTuple):
    """The mean-reduced loss, and its gradient at the sampled rows."""

    value: float
    rows: Tensor
    gradient: Tensor


def as_rows(logits: Tensor) -> Tensor:
    """(rows, classes); the classes of four dimensions are the second one."""
    return logits.movedim(1, -1).reshape(-1, logits.shape[1]) if logits.dim() == 4 else logits


def sample(rows: int, count: int = 16) -> Tensor:
    """The first and the last rows, and some between."""
    return torch.linspace(0, rows - 1, min(count, rows), dtype=torch.float64).long().unique()


def truth(
    name: str, student: Tensor, teacher: Tensor, target: Tensor | None, rows: Tensor | None = None
) -> Truth:
    s, t = as_rows(student.detach()), as_rows(teacher)
    y = None if target is None else target.reshape(-1)
    rows = (sample(len(s)) if rows is None else rows).to(s.device)
    return (_correlation if name == "dist" else _by_row)(name, s, t, y, rows)


def _by_row(name: str, s: Tensor, t: Tensor, y: Tensor | None, rows: Tensor) -> Truth:
    spec = SPECS[name]

    def loss(student: Tensor, teacher: Tensor, target: Tensor | None) -> Tensor:
        extra = (target,) if spec.needs_target else ()
        return spec.function(
            student, teacher.double(), *extra, reduction="sum", backend="reference"
        )

    step = max(1, CHUNK // s.shape[1])
    total = 0.0
    with torch.no_grad():
        for at in range(0, len(s), step):
            part = slice(at, at + step)
            total += loss(s[part].double(), t[part], None if y is None else y[part]).item()
    x = s[rows].double().requires_grad_()
    value = loss(x, t[rows], None if y is None else y[rows])
    (gradient,) = torch.autograd.grad(value, x)
    return Truth(total / len(s), rows, gradient / len(s))


def _correlation(name: str, s: Tensor, t: Tensor, y: Tensor | None, rows: Tensor) -> Truth:
    """DIST with its default options."""
    count, classes = s.shape
    step = max(1, CHUNK // classes)
    moments = torch.zeros(5, classes, dtype=torch.float64, device=s.device)
    inter = torch.zeros((), dtype=torch.float64, device=s.device)
    with torch.no_grad():
        for at in range(0, count, step):
            q, p = (x[at : at + step].double().softmax(1) for x in (s, t))
            moments += _sums(q, p)
            inter += _pearson(q, p).sum()
    x = s[rows].double().requires_grad_()
    q, p = x.softmax(1), t[rows].double().softmax(1)
    sums, own = _sums(q, p), _pearson(q, p).sum()
    varying = moments - sums.detach() + sums
    mean_row = (inter - own.detach() + own) / count
    loss = (1 - mean_row) + (1 - _columns(varying, count).mean())
    (gradient,) = torch.autograd.grad(loss, x)
    return Truth(loss.item(), rows, gradient)


def _sums(q: Tensor, p: Tensor) -> Tensor:
    return torch.stack([x.sum(0) for x in (q, p, q * q, p * p, q * p)])


def _pearson(q: Tensor, p: Tensor) -> Tensor:
    q, p = (x - x.mean(1, keepdim=True) for x in (q, p))
    return (q * p).sum(1) / (q.norm(dim=1) * p.norm(dim=1) + EPS)


def _columns(moments: Tensor, count: int) -> Tensor:
    """Pearson of each column from raw moments, which float64 can afford."""
    q, p, qq, pp, qp = moments
    norms = (qq - q * q / count).clamp(min=0).sqrt() * (pp - p * p / count).clamp(min=0).sqrt()
    return (qp - q * p / count) / (norms + EPS)


def errors(value: Tensor, gradient: Tensor, expected: Truth) -> dict[str, float]:
    """Relative errors of the value and of the gradient at the sampled rows."""
    got = as_rows(gradient)[expected.rows].double()
    difference = got - expected.gradient
    size = expected.gradient.norm().item()
    largest = expected.gradient.abs().max().item()
    error = value.item() - expected.value
    return {
        "value": abs(error) / max(abs(expected.value), 1e-300),
        "gradient": difference.norm().item() / max(size, 1e-300),
        "largest element": difference.abs().max().item() / max(largest, 1e-300),
    }

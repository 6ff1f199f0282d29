"""Losses of tokens equal what other toolkits compute, part 2; and what a step in parts must equal.

Each right side is written here from its published definition, in float64. Part 1 is
``test_language_models.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import ROW_LOSSES, Case, each, same_bits, value_and_grad
from inputs import make
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributions import Categorical, kl_divergence

from kdkernels.functional import (
    jsd_loss,
    kd_loss,
    mixed_kl_loss,
    reverse_kl_loss,
    skew_kl_loss,
    skew_reverse_kl_loss,
    tv_loss,
)
from kdkernels.registry import SPECS

IGNORED = -100
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
Rows = Callable[[Tensor, Tensor], Tensor]
"""Student and teacher to one number a row."""


def _tokens() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(11)
    student, teacher = 2 * torch.randn(2, 3, 8, 29, generator=generator, dtype=torch.float64)
    labels = torch.randint(29, (3, 8), generator=generator)
    labels[:, :3] = IGNORED
    return student, teacher, labels


def over(rows: Rows, items: float | None = None) -> Loss:
    """The mean over the labels' rows, or their sum over the items of the step."""

    def loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        kept = rows(student, teacher)[labels != IGNORED]
        return kept.sum() / (kept.numel() if items is None else items)

    return loss


def forward_kl(student: Tensor, teacher: Tensor) -> Tensor:
    return kl_divergence(Categorical(logits=teacher), Categorical(logits=student))


def reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    return kl_divergence(Categorical(logits=student), Categorical(logits=teacher))


def of_torch(student: Tensor, teacher: Tensor) -> Tensor:
    logs = (F.log_softmax(x, -1) for x in (student, teacher))
    return F.kl_div(*logs, reduction="none", log_target=True).sum(-1)


def jensen_shannon(beta: float) -> Rows:
    """By entropies: that of the mixture less the mixture of them; the ends are KLs by name."""

    def rows(student: Tensor, teacher: Tensor) -> Tensor:
        if beta in (0.0, 1.0):
            return reverse_kl(student, teacher) if beta else forward_kl(student, teacher)
        q, p = student.softmax(-1), teacher.softmax(-1)
        apart = beta * Categorical(p).entropy() + (1 - beta) * Categorical(q).entropy()
        return Categorical(beta * p + (1 - beta) * q).entropy() - apart

    return rows


def total_variation(student: Tensor, teacher: Tensor) -> Tensor:
    """Liger's and speculators': of probabilities."""
    return 0.5 * (student.softmax(-1) - teacher.softmax(-1)).abs().sum(-1)


def mixture(weight: float) -> Rows:
    """``weight`` is that of forward KL, as in NeMo-RL's ``mixed_kl_weight``."""
    return lambda s, t: weight * forward_kl(s, t) + (1 - weight) * reverse_kl(s, t)


def cakld(gamma: float) -> Rows:
    """BitDistiller's: ``gamma`` is the weight of reverse KL."""
    return lambda s, t: gamma * reverse_kl(s, t) + (1 - gamma) * forward_kl(s, t)


def symmetric(ratio: float) -> Loss:
    """torchtune's, whose forward part is a cross-entropy; less the entropy, which is constant."""

    def rows(student: Tensor, teacher: Tensor) -> Tensor:
        p = teacher.softmax(-1)
        forward = -(p * student.log_softmax(-1)).sum(-1) - Categorical(p).entropy()
        return ratio * forward + (1 - ratio) * reverse_kl(student, teacher)

    return over(rows)


def orda(beta: float) -> Rows:
    """``skew_forward``: ``beta`` is the student's share of the mixture."""

    def rows(student: Tensor, teacher: Tensor) -> Tensor:
        p = teacher.softmax(-1)
        mixed = beta * student.softmax(-1) + (1 - beta) * p
        return (p * (p / mixed).log()).sum(-1)

    return rows


def automodel(temperature: float) -> Rows:
    return lambda s, t: forward_kl(s / temperature, t / temperature) * temperature**2


BETAS = (0.0, 0.1, 0.5, 0.9, 1.0)
ITEMS = 37
SMOOTHED = 15 + 1e-5
"""speculators' denominator: the tokens and a little."""
EQUAL: dict[str, tuple[Loss, Loss]] = {
    "F.kl_div": (lambda s, t, y: kd_loss(s, t, 1.0, target=y), over(of_torch)),
    **{
        f"Automodel {T}": (lambda s, t, y, T=T: kd_loss(s, t, T, labels=y), over(automodel(T)))
        for T in (1.0, 2.0, 7.5)
    },
    **{
        f"Liger and TRL {b}": (
            lambda s, t, y, b=b: jsd_loss(s, t, y, b),
            over(jensen_shannon(b)),
        )
        for b in BETAS
    },
    **{
        f"TRL {b} items": (
            lambda s, t, y, b=b: jsd_loss(s, t, y, b, num_items_in_batch=ITEMS),
            over(jensen_shannon(b), ITEMS),
        )
        for b in BETAS
    },
    "speculators kl": (
        lambda s, t, y: kd_loss(s, t, 1.0, labels=y, num_items_in_batch=SMOOTHED),
        over(forward_kl, SMOOTHED),
    ),
    "speculators reverse": (
        lambda s, t, y: reverse_kl_loss(s, t, y, num_items_in_batch=SMOOTHED),
        over(reverse_kl, SMOOTHED),
    ),
    "speculators js": (
        lambda s, t, y: jsd_loss(s, t, y, num_items_in_batch=SMOOTHED),
        over(jensen_shannon(0.5), SMOOTHED),
    ),
    "speculators tv": (
        lambda s, t, y: tv_loss(s, t, y, num_items_in_batch=SMOOTHED),
        over(total_variation, SMOOTHED),
    ),
    "Liger TVD": (lambda s, t, y: tv_loss(s, t, y), over(total_variation)),
    "torchtune reverse": (lambda s, t, y: reverse_kl_loss(s, t, y), symmetric(0.0)),
    "torchtune symmetric": (lambda s, t, y: mixed_kl_loss(s, t, y, 0.3), symmetric(0.3)),
    "NeMo-RL mixed": (
        lambda s, t, y: mixed_kl_loss(s, t, y, 0.3, num_items_in_batch=ITEMS),
        over(mixture(0.3), ITEMS),
    ),
    "CAKLD": (lambda s, t, y: mixed_kl_loss(s, t, y, 1 - 0.3), over(cakld(0.3))),
    "orda": (lambda s, t, y: skew_kl_loss(s, t, y, 0.3), over(orda(1 - 0.3))),
}  # fmt: skip


def _assert_equal(ours: Loss, theirs: Loss, rtol: float = 1e-10) -> None:
    student, teacher, labels = _tokens()
    student.requires_grad_()
    losses = [loss(student, teacher, labels) for loss in (ours, theirs)]
    torch.testing.assert_close(*losses, rtol=rtol, atol=1e-13)
    gradients = (torch.autograd.grad(loss, student)[0] for loss in losses)
    torch.testing.assert_close(*gradients, rtol=rtol, atol=max(1e-13, rtol / 1e3))


@pytest.mark.parametrize(("ours", "theirs"), EQUAL.values(), ids=EQUAL.keys())
def test_equals(ours: Loss, theirs: Loss) -> None:
    _assert_equal(ours, theirs)


def test_skews_tend_to_the_divergences_they_smooth() -> None:
    _assert_equal(lambda s, t, y: skew_kl_loss(s, t, y, 1e-12), over(forward_kl), 1e-7)
    _assert_equal(lambda s, t, y: skew_reverse_kl_loss(s, t, y, 1e-12), over(reverse_kl), 1e-7)


def test_adaptive_weights_of_tokens_have_the_gradient_of_constants() -> None:
    """AKL: a weight a token, of the gaps on the teacher's head and tail."""

    def weights(student: Tensor, teacher: Tensor) -> Tensor:
        p, q = teacher.softmax(-1), student.detach().softmax(-1)
        shares = torch.empty(p.shape[:-1], dtype=p.dtype)
        for at in torch.cartesian_prod(*map(torch.arange, p.shape[:-1])).tolist():
            row, other = p[tuple(at)], q[tuple(at)]
            head, mass = 0.0, 0.0
            for c in row.argsort(descending=True).tolist():
                head += abs(row[c] - other[c]).item() * (mass < 0.5)
                mass += row[c].item()
            shares[tuple(at)] = head / (row - other).abs().sum().item()
        return shares

    def theirs(student: Tensor, teacher: Tensor) -> Tensor:
        w = weights(student, teacher)
        return w * forward_kl(student, teacher) + (1 - w) * reverse_kl(student, teacher)

    def ours(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        return mixed_kl_loss(student, teacher, labels, weights(student, teacher))

    _assert_equal(ours, over(theirs))


@each(ROW_LOSSES, dtype={"f32": torch.float32, "bf16": torch.bfloat16}, shared=("dtype",))
def test_ignored_rows_may_be_dropped_or_moved(case: Case, dtype: torch.dtype) -> None:
    """No bit of the others changes, value or gradient, even beside rows of NaN."""
    student, teacher, target = make("gaussian", 9, 37, dtype=dtype, device=case.device)
    ignored = torch.tensor([0, 1, 0, 0, 1, 1, 0, 1, 0], dtype=torch.bool, device=case.device)
    target[ignored] = IGNORED
    student[1], teacher[4] = float("nan"), float("inf")
    order = torch.tensor(
        [4, 0, 7, 2, 3, 1, 6, 5, 8], device=case.device
    )  # of the others: as it was
    for reduction in ("none", "mean"):
        results = []
        for rows in (torch.arange(9, device=case.device), order, (~ignored).nonzero()[:, 0]):
            upstream = torch.ones(len(rows), device=case.device) if reduction == "none" else None
            given = {"target": target[rows], "reduction": reduction, "upstream": upstream}
            loss, gradient = value_and_grad(case, student[rows], teacher[rows], **given)
            kept = ~ignored[rows]
            results.append((loss[kept] if reduction == "none" else loss, gradient[kept]))
        for loss, gradient in results[1:]:
            assert same_bits(gradient, results[0][1])
            if reduction == "none":
                assert same_bits(loss, results[0][0])
            else:  # a sum of rows in other places
                torch.testing.assert_close(loss, results[0][0], rtol=1e-6, atol=0)


@each(ROW_LOSSES, parts=(2, 5), shared=("parts",))
def test_micro_batches_are_the_step(case: Case, parts: int) -> None:
    """In float32, whatever the split: counts of tokens of the parts differ."""
    student, teacher, target = make("gaussian", 23, 101, device=case.device)
    target[torch.arange(23, device=case.device) % 4 == 1] = IGNORED
    items = (target != IGNORED).sum()
    whole, slope = value_and_grad(case, student, teacher, target=target)
    total, slopes = torch.zeros((), dtype=torch.float64), []
    for part in torch.arange(23).tensor_split(parts):
        given: dict[str, Any] = {"target": target[part], "num_items_in_batch": items}
        loss, gradient = value_and_grad(case, student[part], teacher[part], **given)
        total, slopes = total + loss.cpu().double(), [*slopes, gradient]
    assert abs(total.item() / whole.item() - 1) < 1e-6
    off = (torch.cat(slopes) - slope).abs().max() / slope.abs().max()
    assert off < 1e-6


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


SCHEDULED = (
    "kd",
    "reverse_kl",
    "mixed_kl",
    "skew_kl",
    "skew_reverse_kl",
    "jsd",
    "tv",
    "acceptance",
)


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("name", SCHEDULED)
def test_fifty_temperatures_and_batches_compile_twice(name: str) -> None:
    """In one graph: a temperature that is annealed and a batch that has another size each step."""
    loss = SPECS[name].function
    counter = CompileCounterWithBackend("aot_eager")

    def step(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        value: Tensor = loss(student, teacher, temperature=temperature)
        return value

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    generator = torch.Generator().manual_seed(0)
    for index in range(50):
        student, teacher = torch.randn(2, 2 + index % 7, 13, generator=generator)
        temperature = 1 + 3 * math.cos(index / 50 * math.pi / 2)
        leaf = student.requires_grad_()
        losses = [f(leaf, teacher, temperature) for f in (compiled, step)]
        torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-7)
        gradients = (torch.autograd.grad(x, leaf)[0] for x in losses)
        torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)
    assert counter.frame_count <= 2, f"{counter.frame_count} compilations"

"""Losses of tokens against what trainers of language models compute, written as they publish it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import LOSSES, Case, each
from torch import Tensor

from kdkernels import functional
from kdkernels.functional import (
    acceptance_loss,
    alpha_beta_loss,
    jsd_loss,
    kd_loss,
    mixed_kl_loss,
    reverse_kl_loss,
    skew_kl_loss,
    skew_reverse_kl_loss,
    tv_loss,
)

IGNORED = -100


def trl(beta: float, items: int | None = None) -> Callable[..., Tensor]:
    """TRL's ``generalized_jsd_loss``: KL at 0, reverse KL at 1, the mixture by logsumexp."""

    def loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        log_q, log_p = F.log_softmax(student, -1), F.log_softmax(teacher, -1)
        if beta == 0:
            terms = F.kl_div(log_q, log_p, reduction="none", log_target=True)
        elif beta == 1:
            terms = F.kl_div(log_p, log_q, reduction="none", log_target=True)
        else:
            shares = torch.stack([log_q + math.log1p(-beta), log_p + math.log(beta)])
            log_m = torch.logsumexp(shares, 0)
            terms = beta * F.kl_div(log_m, log_p, reduction="none", log_target=True)
            terms = terms + (1 - beta) * F.kl_div(log_m, log_q, reduction="none", log_target=True)
        valid = labels != IGNORED
        return terms[valid].sum() / (valid.sum() if items is None else items)

    return loss


def _entropy(teacher: Tensor, labels: Tensor) -> Tensor:
    p = torch.softmax(teacher, -1)
    return -(p * p.log()).sum(-1)[labels != IGNORED].mean()


def torchtune_forward(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """torchtune's ``ForwardKLLoss`` is a cross-entropy: KL and the teacher's entropy."""
    p = F.softmax(teacher, dim=-1, dtype=student.dtype)
    x = -(p * F.log_softmax(student, dim=-1)).sum(-1)
    return (x * (labels != IGNORED)).sum() / (labels != IGNORED).sum()


def torchtune_symmetric(ratio: float) -> Callable[..., Tensor]:
    """``SymmetricKLLoss``: the forward one times the ratio, the reverse one with the rest."""

    def loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        q = F.softmax(student, -1)
        reverse = (q * (q.log() - F.log_softmax(teacher, -1))).sum(-1)
        reverse = (reverse * (labels != IGNORED)).sum() / (labels != IGNORED).sum()
        return ratio * torchtune_forward(student, teacher, labels) + (1 - ratio) * reverse

    return loss


def distillm(reverse: bool, alpha: float = 0.1) -> Callable[..., Tensor]:
    """DistiLLM's skewed divergences, from probabilities; the forward one lacks an entropy."""

    def loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        p, q = F.softmax(teacher, -1), F.softmax(student, -1)
        if reverse:
            mixed = (1 - alpha) * p + alpha * q
            x = (q * (q.log() - mixed.log())).sum(-1)
        else:
            mixed = alpha * p + (1 - alpha) * q
            x = -(p * mixed.log()).sum(-1)
        mask = (labels != IGNORED).to(x.dtype)
        return (x.view(-1) * mask.view(-1)).sum() / mask.sum()

    return loss


def categorical(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    q, p = (torch.distributions.Categorical(logits=x) for x in (student, teacher))
    return torch.distributions.kl_divergence(q, p)[labels != IGNORED].mean()


def abkd(alpha: float, beta: float) -> Callable[..., Tensor]:
    """ABKD's divergence and its limits, which the published code divides by the exponent once."""

    def loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        q, p = F.softmax(student, -1), F.softmax(teacher, -1)
        if beta == 0:
            terms = (p**alpha * (p**alpha / q**alpha).log() - p**alpha + q**alpha) / alpha / alpha
        elif alpha == 0:
            terms = (q**beta * (q**beta / p**beta).log() - q**beta + p**beta) / beta / beta
        else:
            total = alpha + beta
            terms = alpha / total * p**total + beta / total * q**total - p**alpha * q**beta
            terms = terms / (alpha * beta)
        return terms.sum(-1)[labels != IGNORED].mean()

    return loss


def acceptance(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """What speculative decoding rejects: one minus the sum of the smaller probabilities."""
    accepted = torch.minimum(F.softmax(student, -1), F.softmax(teacher, -1)).sum(-1)
    return (1 - accepted)[labels != IGNORED].mean()


def speculators(hybrid: bool, eta: float = 3.0) -> Callable[..., Tensor]:
    """``nla_loss`` and ``lk_hybrid``: each token's own weight, a constant."""

    def loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        q, p = F.softmax(student, -1), F.softmax(teacher, -1)
        accepted = torch.minimum(p, q).sum(-1)
        x = -accepted.clamp_min(1e-5).log()
        if hybrid:
            weight = torch.exp(-eta * accepted.detach())
            kl = (p * (p.log() - q.log())).sum(-1)
            x = weight * kl + (1 - weight) * (1 - accepted)
        return x[labels != IGNORED].mean()

    return loss


LK = speculators(True, 2.0)


def specforge(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """LK ``alpha``: the rates are multiplied by a mask, and bounded."""
    accepted = torch.minimum(F.softmax(student, -1), F.softmax(teacher, -1)).sum(-1)
    mask = (labels != IGNORED) & (accepted > 1e-5)
    return -(accepted.clamp_min(1e-5).log() * mask).sum() / (labels != IGNORED).sum()


def automodel(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float = 2.5) -> Tensor:
    """NeMo Automodel's ``KDLoss``: T^2 is in."""
    s, t = (x[labels != IGNORED] / temperature for x in (student, teacher))
    p = F.softmax(t, -1)
    kl = (p * (F.log_softmax(t, -1) - F.log_softmax(s, -1))).sum(-1).mean()
    return kl * temperature**2


Rows = list[tuple[str, Callable[..., Tensor], Callable[..., Tensor], bool]]
EQUAL: Rows = [
    *(
        (
            f"abkd-{a}-{b}",
            lambda s, t, y, a=a, b=b: alpha_beta_loss(s, t, y, a, b),
            abkd(a, b),
            False,
        )
        for a, b in (
            (0.2, 0.7),
            (1.0, 0.0),
            (0.0, 1.0),
            (0.6, 0.0),
            (0.0, 0.5),
            (0.5, 0.5),
            (1.0, 1.0),
        )
    ),
    ("TRL 0", lambda s, t, y: kd_loss(s, t, 1.0, target=y), trl(0.0), False),
    *(
        (f"TRL {beta}", lambda s, t, y, beta=beta: jsd_loss(s, t, y, beta), trl(beta), False)
        for beta in (0.0, 0.1, 0.5, 0.9, 1.0)
    ),
    ("TRL items", lambda s, t, y: jsd_loss(s, t, y, num_items_in_batch=11), trl(0.5, 11), False),
    ("TRL reverse", lambda s, t, y: reverse_kl_loss(s, t, y), trl(1.0), False),
    ("Categorical", lambda s, t, y: reverse_kl_loss(s, t, y), categorical, False),
    ("torchtune", lambda s, t, y: kd_loss(s, t, 1.0, labels=y), torchtune_forward, True),
    (
        "torchtune symmetric",
        lambda s, t, y: mixed_kl_loss(s, t, y, forward_weight=1.0),
        torchtune_symmetric(1.0),
        True,
    ),
    (
        "torchtune reverse",
        lambda s, t, y: mixed_kl_loss(s, t, y, forward_weight=0.0),
        torchtune_symmetric(0.0),
        False,
    ),
    ("DistiLLM", lambda s, t, y: skew_kl_loss(s, t, y), distillm(False), True),
    ("DistiLLM reverse", lambda s, t, y: skew_reverse_kl_loss(s, t, y), distillm(True), False),
    ("acceptance", lambda s, t, y: tv_loss(s, t, y), acceptance, False),
    ("speculators", lambda s, t, y: acceptance_loss(s, t, y), speculators(False), False),
    (
        "speculators hybrid",
        lambda s, t, y: acceptance_loss(s, t, y, "hybrid", 2.0),
        LK,
        False,
    ),
    ("SpecForge", lambda s, t, y: acceptance_loss(s, t, y), specforge, False),
    ("Automodel", lambda s, t, y: kd_loss(s, t, 2.5, labels=y), automodel, False),
]


def _tokens(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    student, teacher = 2 * torch.randn(2, 3, 7, 31, generator=generator, dtype=torch.float64)
    labels = torch.randint(31, (3, 7), generator=generator)
    labels[:, :3] = IGNORED
    return student.to(dtype), teacher.to(dtype), labels


@pytest.mark.parametrize(
    ("ours", "theirs", "entropy"), [x[1:] for x in EQUAL], ids=[x[0] for x in EQUAL]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equals(
    ours: Callable[..., Tensor], theirs: Callable[..., Tensor], entropy: bool, dtype: torch.dtype
) -> None:
    """Value and gradient; some leave out the teacher's entropy, which has no gradient."""
    student, teacher, labels = _tokens(dtype)
    leaf, wide = student.clone().requires_grad_(), student.double().requires_grad_()
    loss, expected = ours(leaf, teacher, labels), theirs(wide, teacher.double(), labels)
    if entropy:
        expected = expected - _entropy(teacher.double(), labels)
    tolerance: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-13}
    if dtype != torch.float64:
        tolerance = {"rtol": 1e-5, "atol": 1e-7}
    torch.testing.assert_close(loss.double(), expected, **tolerance)
    (gradient,), (wanted,) = torch.autograd.grad(loss, leaf), torch.autograd.grad(expected, wide)
    if dtype == torch.bfloat16:
        tolerance = {"rtol": 2**-8, "atol": 1e-6}
        if theirs is LK:  # two gradients, each of which is rounded, and their sum
            tolerance["rtol"] = 2**-7
    torch.testing.assert_close(gradient.double(), wanted, **tolerance)


def test_jsd_tends_to_kl_but_is_kl_at_the_end() -> None:
    student, teacher, labels = _tokens()
    kl = kd_loss(student, teacher, 1.0, labels=labels)
    torch.testing.assert_close(
        jsd_loss(student, teacher, labels, 1e-9) / 1e-9, kl, rtol=1e-6, atol=0
    )
    assert jsd_loss(student, teacher, labels, 0.0) == kl
    assert jsd_loss(100 * student, teacher, labels) <= math.log(2)


def _mixture_in_extended_precision(student: Tensor, teacher: Tensor, a: Any, b: Any) -> Any:
    """a KL(p || m) + b KL(q || m), m = (1 - alpha) of the other side, as published."""
    wide = np.longdouble
    q, p = (np.exp(x.double().numpy().astype(wide)) for x in (student, teacher))
    q, p = q / q.sum(-1, keepdims=True), p / p.sum(-1, keepdims=True)
    alpha = wide(0.999)
    m = alpha * p + (1 - alpha) * q if a else (1 - alpha) * p + alpha * q
    return (a * p * np.log(p / m) + b * q * np.log(q / m)).sum(-1).mean()


@each(
    [spec for spec in LOSSES if spec.name in ("skew_kl", "skew_reverse_kl")],
    dtype=[torch.float32, torch.float64],
)
def test_a_share_near_one_keeps_the_digits(case: Case, dtype: torch.dtype) -> None:
    """Far from equality too, where two terms of the size of the other share cancel."""
    student, teacher, _ = _tokens(dtype)
    student, teacher = student[..., :10], teacher[..., :10]
    forward = case.spec.name == "skew_kl"
    truth = _mixture_in_extended_precision(student, teacher, 1.0 * forward, 1.0 * (not forward))
    rows = [x.reshape(-1, 10).to(case.device) for x in (student, teacher)]
    loss = case(*rows, alpha=0.999)
    relative = abs(loss.item() / float(truth) - 1)
    assert relative < (3e-6 if dtype == torch.float32 else 1e-13), relative


@each([spec for spec in LOSSES if spec.name == "tv"], gap=[9.0, 14.0, 40.0])
def test_total_variation_of_certain_rows_keeps_the_digits(case: Case, gap: float) -> None:
    """Both are certain of the same class, of whose difference 1 - x would lose the digits."""
    student, teacher, _ = _tokens(torch.float32)
    student, teacher = student.reshape(-1, 31), teacher.reshape(-1, 31)
    student[:, 3] = teacher[:, 3] = gap
    others = [i for i in range(31) if i != 3]
    q, p = (torch.softmax(x.double(), -1)[:, others] for x in (student, teacher))
    truth = ((p - q).abs().sum(-1) + (p - q).sum(-1).abs()) / 2
    loss = case(student.to(case.device), teacher.to(case.device), reduction="none").cpu()
    assert ((loss / truth - 1).abs() < 3e-6).all(), (loss / truth - 1).abs().max()


@each([spec for spec in LOSSES if spec.name == "acceptance"], gap=[0.1, 1.0, 30.0, 57.0, 70.0])
def test_acceptance_is_exact_at_both_ends(case: Case, gap: float) -> None:
    """1 - a and a keep their digits; a teacher that is certain gives the cross-entropy."""
    student, teacher, labels = (x[0] for x in _tokens(torch.float32))
    teacher = student + gap * teacher if gap < 1 else torch.full_like(teacher, -torch.inf)
    if gap >= 1:
        labels = labels.clamp(min=0)
        teacher.scatter_(-1, labels.unsqueeze(-1), 0.0)
        student = student.scatter(-1, labels.unsqueeze(-1), -gap)
    q, p = (torch.softmax(x.double(), -1) for x in (student, teacher))
    truth = -torch.log1p(-(p - q).abs().sum(-1) / 2)
    leaf = student.clone().to(case.device).requires_grad_()
    if gap >= 1:
        truth = F.cross_entropy(student.double(), labels, reduction="none").clamp(max=62.3832462)
    loss = case(leaf, teacher.to(case.device), reduction="none")
    assert ((loss.detach().cpu() / truth - 1).abs() < 3e-6).all(), loss
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    if 1 <= gap < 60:
        torch.testing.assert_close(gradient.cpu().double(), q - p, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("low", [-math.inf, -120.0, -1e4])
def test_finite_where_the_published_forms_are_not_numbers(low: float) -> None:
    """Classes that both exclude, and probabilities that underflow on both sides."""
    student, teacher, labels = _tokens(torch.float32)
    student[..., :4] = low
    teacher[..., 1:5] = low
    for loss in (jsd_loss, skew_kl_loss, skew_reverse_kl_loss, tv_loss, acceptance_loss):
        leaf = student.clone().requires_grad_()
        value = loss(leaf, teacher, labels)
        (gradient,) = torch.autograd.grad(value, leaf)
        assert value.isfinite() and gradient.isfinite().all(), loss.__name__
    both = student.clone()
    both[..., :5] = low
    teacher[..., :5] = low
    for loss in (reverse_kl_loss, mixed_kl_loss):
        leaf = both.clone().requires_grad_()
        value = loss(leaf, teacher, labels)
        (gradient,) = torch.autograd.grad(value, leaf)
        assert value.isfinite() and gradient.isfinite().all(), loss.__name__


README = Path(__file__).parents[1] / "README.md"
ALPHA, BETA, RATIO, LAM, ITEMS, T, W, ETA = 0.8, 0.3, 0.7, 0.2, 11, 2.5, 0.6, 2.0


def beside_cross_entropy(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """What trainers add by hand."""
    hard = F.cross_entropy(student.flatten(0, -2), labels.flatten(), ignore_index=IGNORED)
    return trl(0.5)(student, teacher, labels) + W * hard


def liger_jsd(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """beta P log P + (1 - beta) Q log Q - M log M of the rows that count, over their number."""
    x, y = (F.log_softmax(z[labels != IGNORED], -1) for z in (student, teacher))
    m = BETA * y.exp() + (1 - BETA) * x.exp()
    return (BETA * y.exp() * y + (1 - BETA) * x.exp() * x - m * m.log()).sum() / len(x)


def liger_tvd(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    x, y = (F.softmax(z[labels != IGNORED], -1) for z in (student, teacher))
    return 0.5 * (x - y).abs().sum() / len(x)


WRITTEN: dict[str, tuple[Callable[..., Tensor], float]] = {
    "TRL's `generalized_jsd_loss(s, t, labels, beta)`": (trl(BETA), 0.0),
    "TRL's `generalized_jsd_loss(s, t, labels, beta, num": (trl(BETA, ITEMS), 0.0),
    "Liger's `LigerJSD": (liger_jsd, 0.0),
    "Liger's `LigerTVDLoss": (liger_tvd, 0.0),
    "torchtune's `ForwardKLLoss`": (torchtune_forward, 1.0),
    "torchtune's `ReverseKLLoss`": (torchtune_symmetric(0.0), 0.0),
    "torchtune's `SymmetricKLLoss": (torchtune_symmetric(RATIO), RATIO),
    "DistiLLM's `skewed_forward": (distillm(False, LAM), 1.0),
    "DistiLLM's `skewed_reverse": (distillm(True, LAM), 0.0),
    "NeMo Automodel's": (automodel, 0.0),
    "ABKD's divergence": (abkd(ALPHA, BETA), 0.0),
    "any of them beside": (beside_cross_entropy, 0.0),
    "one minus the acceptance": (acceptance, 0.0),
    "speculators' `nla": (speculators(False), 0.0),
    "speculators' `lk_hybrid": (speculators(True, ETA), 0.0),
}


def _rows() -> dict[str, str]:
    """The table of README: what one has, and the call to write."""
    text = README.read_text(encoding="utf-8").split("### Losses of language models")[1]
    found = re.findall(r"^\| (?!you have|---)(.*?) \| `(.*?)` \|$", text.split("\n### ")[0], re.M)
    return dict(found)


def test_every_row_of_readme_is_known() -> None:
    assert len(_rows()) == len(WRITTEN) > 5


@pytest.mark.parametrize("start", WRITTEN)
def test_the_row_of_readme_is_their_loss(start: str) -> None:
    (code,) = (code for left, code in _rows().items() if left.startswith(start))
    theirs, entropy = WRITTEN[start]
    s, t, labels = _tokens()
    s.requires_grad_()
    names = {
        "s": s,
        "t": t,
        "labels": labels,
        "beta": BETA,
        "ratio": RATIO,
        "lam": LAM,
        "T": T,
        "w": W,
    }
    names |= {"alpha": ALPHA, "eta": ETA}
    ours = eval(code, {**vars(functional), **names, "n": ITEMS})
    expected = theirs(s, t, labels) - entropy * _entropy(t, labels)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-13)
    gradients = (torch.autograd.grad(loss, s)[0] for loss in (ours, expected))
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-13)

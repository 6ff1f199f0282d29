"""KL from sampled tokens: what the estimators expect, and the keywords that tokens have."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels import _dispatch
from kdkernels.functional import kd_loss, reverse_kl_loss, sampled_kl_loss
from kdkernels.registry import SPECS

SPEC = SPECS["sampled_kl"]
BACKENDS = [
    pytest.param(name, marks=[pytest.mark.skip(reason="; ".join(why))] if (why := lacks) else [])
    for name in SPEC.backends
    for lacks in [_dispatch.why_not(SPEC, name, torch.empty(0))]
]
each_backend = pytest.mark.parametrize("backend", BACKENDS)
IGNORED = -100


def _tokens(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    student, teacher = torch.randn(2, 2, 6, 11, generator=generator, dtype=torch.float64)
    ids = torch.randint(11, (2, 6), generator=generator)
    logprob = teacher.log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    labels = ids.clone()
    labels[:, :2] = IGNORED
    ids[:, :2] = 10**6  # of ignored rows nothing is asked
    return student.to(dtype), ids, logprob.to(dtype), labels


def published(
    student: Tensor, ids: Tensor, logprob: Tensor, labels: Tensor, estimator: str
) -> Tensor:
    """verl's and torchrl's ``kl_penalty``, then the mean over the mask."""
    keep = labels != IGNORED
    own = F.log_softmax(student[keep], -1).gather(-1, ids[keep].unsqueeze(-1)).squeeze(-1)
    if estimator == "k1":
        return (own - logprob[keep]).mean()
    if estimator == "k2":
        return (0.5 * (own - logprob[keep]).square()).mean()
    kl = logprob[keep] - own
    return (kl.exp() - kl - 1).mean()


@each_backend
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equals_the_published_forms(estimator: str, dtype: torch.dtype, backend: str) -> None:
    student, ids, logprob, labels = _tokens(dtype)
    wide = student.double().requires_grad_()
    expected = published(wide, ids, logprob.double(), labels, estimator)
    (wanted,) = torch.autograd.grad(expected, wide)
    for mask in (labels, labels != IGNORED):
        leaf = student.clone().requires_grad_()
        loss = sampled_kl_loss(leaf, ids, logprob, mask, estimator, backend=backend)
        (gradient,) = torch.autograd.grad(loss, leaf)
        near = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 1e-2}[dtype]
        small = 1e-5 if dtype != torch.float64 else 1e-12
        assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(loss.double(), expected, rtol=min(near, 2e-5), atol=small)
        torch.testing.assert_close(gradient.double(), wanted, rtol=near, atol=small)


@each_backend
def test_what_the_estimators_expect(backend: str) -> None:
    """All samples of five classes, each with its probability: values, and gradients apart."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 1, 5, generator=generator, dtype=torch.float64)
    student.requires_grad_()
    q = student.detach().softmax(-1)[0]
    reverse, forward = reverse_kl_loss(student, teacher), kd_loss(student, teacher, 1.0)
    of_reverse, of_forward = (torch.autograd.grad(x, student)[0] for x in (reverse, forward))
    gradients = {"k1": 0 * of_reverse, "k2": of_reverse, "k3": of_forward}
    for estimator, gradient in gradients.items():
        rows = sampled_kl_loss(
            student.expand(5, 5),
            torch.arange(5),
            teacher.log_softmax(-1)[0],
            estimator=estimator,
            reduction="none",
            backend=backend,
        )
        expected = (q * rows).sum()
        if estimator != "k2":
            torch.testing.assert_close(expected, reverse)
        torch.testing.assert_close(torch.autograd.grad(expected, student)[0], gradient)


@each_backend
def test_keywords_of_tokens(backend: str) -> None:
    student, ids, logprob, labels = _tokens()
    generator = torch.Generator().manual_seed(3)
    weight = torch.rand(2, 6, generator=generator, dtype=torch.float64)

    def loss(**options: Any) -> Any:
        leaf = student.clone().requires_grad_()
        given = sampled_kl_loss(leaf, ids, logprob, labels, backend=backend, **options)
        value, parts = given if isinstance(given, tuple) else (given, None)
        upstream = torch.arange(1.0, 1 + value.numel(), dtype=value.dtype).view_as(value)
        return value.detach(), torch.autograd.grad(value, leaf, upstream)[0], parts

    rows, _, _ = loss(reduction="none")
    assert (rows[:, :2] == 0).all() and (rows[:, 2:] > 0).all()
    value, gradient, _ = loss()
    torch.testing.assert_close(value, rows.sum() / 8)
    assert (gradient[:, :2] == 0).all()
    torch.testing.assert_close(loss(num_items_in_batch=5)[0], rows.sum() / 5)
    torch.testing.assert_close(loss(token_weight=weight)[0], (rows * weight).sum() / 8)
    torch.testing.assert_close(loss(loss_weight=torch.tensor(3.0))[0], 3 * rows.sum() / 8)
    both, added, parts = loss(hard_weight=0.5, return_parts=True)
    leaf = student.clone().requires_grad_()
    hard = 0.5 * F.cross_entropy(leaf.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
    torch.testing.assert_close(both, value + hard.detach())
    torch.testing.assert_close(added, gradient + torch.autograd.grad(hard, leaf)[0])
    torch.testing.assert_close((parts.distillation, parts.hard), (value, hard.detach()))
    log_q = student.log_softmax(-1)
    entropy = -(log_q.exp() * log_q).sum(-1) * (labels != IGNORED)
    torch.testing.assert_close(parts.entropy, entropy)


@each_backend
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_what_ignored_rows_hold_does_not_matter(estimator: str, backend: str) -> None:
    """Caches pad log-probabilities with -inf, and logits may be anything there."""
    student, ids, logprob, labels = _tokens()
    results = []
    for fill in (0.0, -torch.inf, torch.nan):
        leaf = student.clone()
        leaf[:, :2], logprob[:, :2] = fill, fill
        leaf.requires_grad_()
        loss = sampled_kl_loss(leaf, ids, logprob, labels, estimator, backend=backend)
        results.append((loss.detach(), torch.autograd.grad(loss, leaf)[0]))
    for loss, gradient in results[1:]:
        assert torch.equal(loss, results[0][0]) and torch.equal(gradient, results[0][1])


@each_backend
def test_an_id_that_is_the_ignored_index_counts(backend: str) -> None:
    """The index ignores labels, not sampled ids."""
    student, ids, logprob, labels = _tokens()
    ids[:, :2] = 4
    for mask in (None, labels):
        rows = [
            sampled_kl_loss(student, ids, logprob, x, ignore_index=index, reduction="none",
                            backend=backend)
            for index, x in ((IGNORED, mask), (3, None if mask is None else
                             torch.where(mask == IGNORED, 3, 5)))
        ]  # fmt: skip
        ids_of_3 = sampled_kl_loss(student, ids.fill_(3), logprob, None, ignore_index=3,
                                   backend=backend)  # fmt: skip
        assert torch.equal(*rows) and ids_of_3 > 0


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_bad_ids_and_logprobs_are_named(backend: str) -> None:
    student, ids, logprob, labels = _tokens()
    if _dispatch.why_not(SPEC, backend, student):
        backend = "reference"
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"sampled_ids": ids.float()}, TypeError, "sampled_ids must be integer class indices"),
        ({"sampled_ids": ids[0]}, ValueError, r"sampled_ids must be of shape \(2, 6\)"),
        ({"labels": None}, ValueError, r"sampled_ids must be in \[0, 11\)"),
        ({"teacher_logprob": logprob[0]}, ValueError, r"teacher_logprob must be of shape \(2, 6\)"),
        ({"teacher_logprob": logprob.requires_grad_()}, ValueError, "teacher_logprob must be"),
    ]
    given = {"sampled_ids": ids, "teacher_logprob": logprob.detach(), "labels": labels}
    for changed, kind, text in cases:
        with pytest.raises(kind, match=f"^{text}"):
            sampled_kl_loss(student, **{**given, **changed}, backend=backend)

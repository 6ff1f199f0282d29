"""Sparse teachers: the published forms of each tail, and the keywords that tokens have."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels import LossParts, TopKKDLoss, TopKMass, _dispatch, _topk
from kdkernels._calls import NO_ID
from kdkernels.functional import jsd_loss, kd_loss, reverse_kl_loss, topk_kd_loss, tv_loss
from kdkernels.registry import SPECS

SPEC = SPECS["topk_kd"]
LACKS = {name: _dispatch.why_not(SPEC, name, torch.empty(0)) for name in SPEC.backends}
BACKENDS = [
    pytest.param(name, marks=[pytest.mark.skip(reason="; ".join(why))] if why else [])
    for name, why in LACKS.items()
]
each_backend = pytest.mark.parametrize("backend", BACKENDS)
IGNORED = -100
DENSE = {"kl": kd_loss, "reverse_kl": reverse_kl_loss, "jsd": jsd_loss, "tv": tv_loss}
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
NEAR = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}


def draw(
    rows: tuple[int, ...] = (2, 3), classes: int = 23, k: int = 5, temperature: float = 1.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits, the ids and log-probabilities of a teacher's likeliest classes, and its full ones."""
    generator = torch.Generator().manual_seed(4)
    student, teacher = 2 * torch.randn(2, *rows, classes, generator=generator, dtype=torch.float64)
    full = (teacher / temperature).log_softmax(-1)
    logprobs, ids = full.topk(k)
    return student, ids, logprobs, full


def published(
    student: Tensor,
    ids: Tensor,
    logprobs: Tensor,
    divergence: str,
    tail: str,
    temperature: float = 1.0,
    log_rest: Tensor | None = None,
) -> Tensor:
    """Rows, as the toolkits write them down.

    bucket: DistillKit's SYMMETRIC_UNIFORM, TRL's ``add_tail_bucket``, Megatron's ghost token.
    renormalize: NeMo-RL and ms-swift. teacher: axolotl, DistillKit's ZERO. drop: verl.
    """
    log_q = (student / temperature).log_softmax(-1).gather(-1, ids.long())
    p, q = logprobs.exp(), log_q.exp()
    some = p > 0
    if tail == "drop":
        return torch.where(some, p * (logprobs - log_q), 0.0).sum(-1)
    if tail in ("renormalize", "teacher"):
        p = p / p.sum(-1, keepdim=True)
    if tail == "renormalize":
        q = torch.where(some, q, 0.0)
        q = q / q.sum(-1, keepdim=True)
    q = torch.where(some, q, 0.0)
    mass_p, mass_q = p.sum(-1), q.sum(-1)
    rest_p = torch.zeros_like(mass_p) if tail != "bucket" else 1 - mass_p
    if log_rest is not None:
        rest_p = log_rest.exp()
    rest_q = torch.zeros_like(mass_q) if tail == "renormalize" else 1 - mass_q
    if divergence == "tv":
        return 0.5 * ((p - q).abs().sum(-1) + (rest_p - rest_q).abs())
    p, q = torch.cat([p, rest_p.unsqueeze(-1)], -1), torch.cat([q, rest_q.unsqueeze(-1)], -1)

    def kl(a: Tensor, b: Tensor) -> Tensor:
        none = a == 0
        ratio = torch.where(none, 1.0, a) / torch.where(none, 1.0, b)
        return torch.where(none, 0.0, a * ratio.log()).sum(-1)

    if divergence == "kl":
        return kl(p, q)
    if divergence == "reverse_kl":
        return kl(q, p)
    m = 0.3 * p + 0.7 * q
    return 0.3 * kl(p, m) + 0.7 * kl(q, m)


def pairs() -> list[tuple[str, str]]:
    every = [(d, t) for d in DENSE for t in ("bucket", "renormalize", "teacher", "drop")]
    infinite = ("reverse_kl", "teacher")
    return [x for x in every if x != infinite and (x[1] != "drop" or x[0] == "kl")]


def forms() -> list[Any]:
    """Every divergence, tail and dtype; for Triton, which is interpreted, the dtypes in turn."""
    return [
        pytest.param(*pair, dtype, *param.values, marks=param.marks)
        for param in BACKENDS
        for turn, pair in enumerate(pairs())
        for dtype in FLOATS
        if param.values[0] != "triton" or dtype == FLOATS[turn % len(FLOATS)]
    ]


def of(divergence: str) -> dict[str, Any]:
    return {"divergence": divergence, **({"beta": 0.3} if divergence == "jsd" else {})}


@pytest.mark.parametrize(("divergence", "tail", "dtype", "backend"), forms())
def test_equals_the_published_forms(
    divergence: str, tail: str, dtype: torch.dtype, backend: str
) -> None:
    temperature = 2.0
    student, ids, logprobs, _ = draw(temperature=temperature)
    logprobs[1, 2, 3:], ids[1, 2, 3:] = -torch.inf, 0  # absent entries share an id with others
    logprobs[0, 1, :4], ids[0, 1, :4] = -torch.inf, 10**9
    student = student.to(dtype)
    working = torch.float64 if dtype == torch.float64 else torch.float32
    logprobs = logprobs.to(working)
    wide = student.double().requires_grad_()
    known = torch.where(logprobs > -torch.inf, ids, 0)
    expected = published(wide, known, logprobs.double(), divergence, tail, temperature)
    weights = torch.linspace(0.5, 2.0, 6, dtype=torch.float64).view(2, 3)
    (wanted,) = torch.autograd.grad(expected, wide, weights)
    leaf = student.clone().requires_grad_()
    loss = topk_kd_loss(
        leaf, ids, logprobs, temperature=temperature, tail=tail, reduction="none",
        backend=backend, **of(divergence),
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(loss, leaf, weights.to(loss))
    assert loss.dtype == working and gradient.dtype == dtype
    near = min(NEAR[dtype], 2e-5)
    torch.testing.assert_close(loss.double(), expected, rtol=near, atol=near / 10)
    size = float(wanted.abs().max())
    torch.testing.assert_close(
        gradient.double(), wanted, rtol=NEAR[dtype], atol=size * min(NEAR[dtype], 2e-5) + 1e-7
    )


@each_backend
@pytest.mark.parametrize("divergence", DENSE)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_all_ids_are_the_dense_loss(dtype: torch.dtype, divergence: str, backend: str) -> None:
    student, ids, logprobs, full = draw(classes=9, k=9, temperature=0.5)
    student, logprobs = student.to(dtype), logprobs.to(dtype)
    dense = torch.empty_like(logprobs).scatter(-1, ids, logprobs)
    options = {"beta": 0.3} if divergence == "jsd" else {}
    results = []
    for sparse in (True, False):
        leaf = student.clone().requires_grad_()
        if sparse:
            none = torch.full((2, 3), -torch.inf)
            loss = topk_kd_loss(leaf, ids, logprobs, temperature=0.5, log_rest=none,
                                backend=backend, **of(divergence))  # fmt: skip
        else:
            scale = {"loss_weight": 4.0} if divergence == "kl" else {}  # T^2 is out
            loss = DENSE[divergence](leaf, 0.5 * dense, temperature=0.5, **scale, **options)
        results.append((loss.detach(), torch.autograd.grad(loss, leaf)[0]))
    assert full.exp().sum(-1).allclose(torch.ones(2, 3, dtype=torch.float64))
    torch.testing.assert_close(*results, rtol=2e-2 if dtype == torch.bfloat16 else 1e-9, atol=1e-4)


@each_backend
@pytest.mark.parametrize("kind", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8])
def test_one_id_of_any_integer_type(kind: torch.dtype, backend: str) -> None:
    student, ids, logprobs, _ = draw(classes=300, k=1)
    ids = ids % 100
    expected = published(student, ids, logprobs, "kl", "bucket").mean()
    loss = topk_kd_loss(student, ids.to(kind), logprobs, backend=backend)
    torch.testing.assert_close(loss, expected)
    one = topk_kd_loss(student, ids.to(kind), logprobs, tail="renormalize", backend=backend)
    assert one == 0


@each_backend
def test_what_a_certain_student_leaves_keeps_its_digits(backend: str) -> None:
    """The rest's probability is 1e-13: 1 less the ids' sum would be 0 in float32."""
    student, ids, logprobs, _ = draw((4,), 50, 3)
    student.scatter_(-1, ids[:, :1], student.amax(-1, keepdim=True) + 34)
    rest = torch.log1p(-logprobs.exp().sum(-1))
    leaf = student.float().requires_grad_()
    loss = topk_kd_loss(leaf, ids, logprobs.float(), log_rest=rest.float(), backend=backend)
    wide = student.float().double().requires_grad_()
    log_q = wide.log_softmax(-1)
    beside = torch.ones(4, 50, dtype=torch.bool).scatter(-1, ids, False)
    log_rest = log_q.masked_fill(~beside, -torch.inf).logsumexp(-1)
    assert (log_rest < math.log(1e-12)).all()
    p = logprobs.exp()
    value = (p * (logprobs - log_q.gather(-1, ids))).sum(-1) + rest.exp() * (rest - log_rest)
    torch.testing.assert_close(loss.double(), value.mean(), rtol=1e-6, atol=0)
    (wanted,) = torch.autograd.grad(value.mean(), wide)
    (gradient,) = torch.autograd.grad(loss, leaf)
    torch.testing.assert_close(gradient.double(), wanted, rtol=1e-4, atol=1e-7)
    shared = gradient.double()[beside].view(4, -1)  # as q among themselves, to the last digits
    torch.testing.assert_close(shared, wanted[beside].view(4, -1), rtol=1e-5, atol=0)


@each_backend
def test_log_rest_saves_what_half_precision_lost(backend: str) -> None:
    """Of float16 log-probabilities whose sum is nearly 1 nothing is left to subtract."""
    student, ids, logprobs, full = draw((8,), 40, 6)
    full = (6 * full).log_softmax(-1)
    logprobs, ids = full.topk(6)
    rest = full.masked_fill(torch.zeros(8, 40).scatter(-1, ids, 1.0) > 0, -torch.inf).logsumexp(-1)
    half = logprobs.half()
    options = {"divergence": "reverse_kl", "backend": backend}
    true = published(student, ids, logprobs, "reverse_kl", "bucket", log_rest=rest).mean()
    known = topk_kd_loss(student, ids, half, log_rest=rest, **options)
    guessed = topk_kd_loss(student, ids, half, **options)
    assert (known - true).abs() < 5e-3 * true < (guessed - true).abs()


@each_backend
@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
def test_keywords_of_tokens(tail: str, backend: str) -> None:
    student, ids, logprobs, _ = draw()
    generator = torch.Generator().manual_seed(3)
    weight = torch.rand(2, 3, generator=generator, dtype=torch.float64)
    labels = torch.tensor([[IGNORED, 4, int(ids[0, 2, 1])], [7, IGNORED, 0]])
    student[0, 0] = torch.nan  # ignored, and so not read
    ids[0, 0], logprobs[1, 1] = -9, torch.nan
    keep = labels != IGNORED

    def loss(mask: Tensor = labels, **options: Any) -> tuple[Tensor, Tensor, Any]:
        leaf = student.clone().requires_grad_()
        given = topk_kd_loss(leaf, ids, logprobs, mask, tail=tail, backend=backend, **options)
        value, *more = given if isinstance(given, tuple) else (given,)
        upstream = torch.arange(1.0, 1 + value.numel(), dtype=value.dtype).view_as(value)
        return value.detach(), torch.autograd.grad(value, leaf, upstream)[0], more

    expected = published(student[keep], ids[keep], logprobs[keep], "kl", tail)
    rows, _, _ = loss(reduction="none")
    torch.testing.assert_close(rows[keep], expected)
    assert (rows[~keep] == 0).all()
    value, gradient, _ = loss()
    torch.testing.assert_close(value, expected.sum() / 4)
    assert (gradient[~keep] == 0).all() and gradient.isfinite().all()
    assert torch.equal(loss(keep)[0], value) and torch.equal(loss(keep)[1], gradient)
    torch.testing.assert_close(loss(reduction="sum")[0], expected.sum())
    torch.testing.assert_close(loss(num_items_in_batch=5)[0], expected.sum() / 5)
    torch.testing.assert_close(loss(token_weight=weight)[0], (rows * weight).sum() / 4)
    torch.testing.assert_close(loss(loss_weight=torch.tensor(3.0))[0], 3 * value)
    torch.testing.assert_close(loss(loss_weight=0.5)[1], gradient / 2)

    both, added, (parts, mass) = loss(hard_weight=0.5, return_parts=True, return_mass=True)
    assert isinstance(parts, LossParts) and isinstance(mass, TopKMass)
    leaf = student.clone().requires_grad_()
    hard = 0.5 * F.cross_entropy(leaf[keep], labels[keep])
    torch.testing.assert_close(both, value + hard.detach())
    of_hard = torch.autograd.grad(hard, leaf)[0]
    torch.testing.assert_close(added[keep], (gradient + of_hard)[keep])
    torch.testing.assert_close((parts.distillation, parts.hard), (value, hard.detach()))
    log_q = student[keep].log_softmax(-1)
    torch.testing.assert_close(parts.entropy[keep], -(log_q.exp() * log_q).sum(-1))
    assert (parts.entropy[~keep] == 0).all()
    own = log_q.exp().gather(-1, ids[keep]).sum(-1)
    torch.testing.assert_close((mass.student[keep], mass.teacher[keep]),
                               (own, logprobs[keep].exp().sum(-1)))  # fmt: skip
    assert (mass.student[~keep] == 0).all() and (mass.teacher[~keep] == 0).all()
    assert not mass.student.requires_grad and mass.student.shape == (2, 3)
    assert isinstance(loss(return_mass=True)[2][0], TopKMass)


@each_backend
def test_rows_of_absent_entries(backend: str) -> None:
    """Nothing is known of them: no loss, no gradient, no place in the mean."""
    student, ids, logprobs, _ = draw((4,))
    logprobs[1], logprobs[3] = -torch.inf, -torch.inf
    for tail in ("bucket", "renormalize", "teacher", "drop"):
        leaf = student.clone().requires_grad_()
        loss = topk_kd_loss(leaf, ids, logprobs, tail=tail, backend=backend)
        some = published(student[::2], ids[::2], logprobs[::2], "kl", tail)
        torch.testing.assert_close(loss.detach(), some.mean())
        assert (torch.autograd.grad(loss, leaf)[0][1::2] == 0).all()
        # The labels' cross-entropy is a term of the same rows.
        hard = topk_kd_loss(student, ids, logprobs, torch.tensor([1, 2, 3, 4]), tail=tail,
                            hard_weight=1.0, ignore_index=None, backend=backend)  # fmt: skip
        alone = F.cross_entropy(student[::2], torch.tensor([1, 3]))
        torch.testing.assert_close(hard, some.mean() + alone)
    rest = torch.tensor([-1.0, 0.0, -1.0, -torch.inf], dtype=torch.float64)
    rows = topk_kd_loss(student, ids, logprobs, log_rest=rest, reduction="none", backend=backend)
    assert rows[1] == 0 and rows[3] == 0  # what is known of the second, is certain of both


@each_backend
def test_images_and_strides(backend: str) -> None:
    """Classes in dim 1, and logits that do not lie in order."""
    student, ids, logprobs, _ = draw((2, 3, 2))
    expected = published(student, ids, logprobs, "kl", "bucket")
    image = student.movedim(-1, 1)
    assert not image.is_contiguous()
    leaf = image.clone(memory_format=torch.contiguous_format).requires_grad_()
    loss = topk_kd_loss(leaf, ids, logprobs, reduction="none", backend=backend)
    torch.testing.assert_close(loss, expected)
    flat = student.clone().requires_grad_()
    tokens = topk_kd_loss(flat.flatten(0, 2), ids.flatten(0, 2), logprobs.flatten(0, 2),
                          backend=backend)  # fmt: skip
    gradients = (torch.autograd.grad(x, y)[0] for x, y in ((loss.mean(), leaf), (tokens, flat)))
    torch.testing.assert_close(next(gradients), next(gradients).movedim(-1, 1))
    for given in (image, image.to(memory_format=torch.channels_last)):
        again = topk_kd_loss(given, ids.int(), logprobs, reduction="none", backend=backend)
        torch.testing.assert_close(again, expected)


@each_backend
def test_a_temperature_that_is_a_tensor(backend: str) -> None:
    student, ids, logprobs, _ = draw()
    heats = torch.tensor([[0.5, 1.0, 2.0], [3.0, 1.5, 0.7]])
    rows = topk_kd_loss(student, ids, logprobs, temperature=heats, reduction="none",
                        backend=backend)  # fmt: skip
    for i in range(2):
        for j in range(3):
            expected = published(
                student[i, j],
                ids[i, j],
                logprobs[i, j],
                "kl",
                "bucket",
                float(heats[i, j].double()),
            )
            torch.testing.assert_close(rows[i, j], expected)


@pytest.mark.parametrize("backend", [None, "reference"])
def test_wrong_teachers_are_named(backend: str | None) -> None:
    student, ids, logprobs, _ = draw()
    twice = ids.clone()
    twice[1, 1, 2] = twice[1, 1, 4]
    rows = torch.zeros(2, 3)
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"teacher_ids": ids.float()}, TypeError, "teacher_ids must be of an integer dtype"),
        ({"teacher_ids": ids[0]}, ValueError, r"teacher_ids must be of shape \(2, 3, K\), K from"),
        ({"teacher_ids": ids + 20}, ValueError, r"teacher_ids must be in \[0, 23\), got"),
        ({"teacher_ids": ids - 23}, ValueError, r"teacher_ids must be in \[0, 23\), got -"),
        ({"teacher_ids": torch.full_like(ids, NO_ID)}, ValueError, r"teacher_ids must be in \[0"),
        ({"teacher_ids": twice}, ValueError, "teacher_ids must be different within a row, got"),
        ({"teacher_logprobs": logprobs[..., :3]}, ValueError, "teacher_logprobs must be of the"),
        ({"teacher_logprobs": ids}, TypeError, "teacher_logprobs must be float64, float32"),
        ({"teacher_logprobs": logprobs.clone().requires_grad_()}, ValueError,
         "teacher_logprobs must be a constant"),
        ({"log_rest": rows[0]}, ValueError, r"log_rest must be of shape \(2, 3\)"),
        ({"tail": "zero"}, ValueError, "tail must be 'bucket', 'renormalize', 'teacher' or"),
        ({"divergence": "js"}, ValueError, "divergence must be 'kl', 'reverse_kl', 'jsd' or"),
        ({"beta": 2.0}, ValueError, r"beta must be in \[0, 1\]"),
        ({"tail": "drop", "divergence": "tv"}, ValueError, "divergence must be 'kl' where tail"),
        ({"tail": "teacher", "divergence": "reverse_kl"}, ValueError, "tail must be 'bucket' or"),
        ({"tail": "teacher", "divergence": "jsd", "beta": 1.0}, ValueError, "tail must be"),
        ({"return_mass": 1}, TypeError, "return_mass must be a bool"),
        ({"hard_weight": 1.0}, TypeError, "labels must be a Tensor of class indices, got None"),
        ({"hard_weight": 1.0, "labels": torch.full((2, 3), 23)}, ValueError, "class indices must"),
    ]  # fmt: skip
    given = {"teacher_ids": ids, "teacher_logprobs": logprobs}
    for changed, kind, text in cases:
        with pytest.raises(kind, match=f"^{text}"):
            topk_kd_loss(student, **{**given, **changed}, backend=backend)
    many = torch.zeros(2, 3, 1025, dtype=torch.long)
    with pytest.raises(ValueError, match="teacher_ids must be of shape"):
        topk_kd_loss(student, many, many.double(), backend=backend)


def test_nothing_is_written_into_the_tensors_of_the_user() -> None:
    student, ids, logprobs, _ = draw()
    labels, rest = torch.zeros(2, 3, dtype=torch.long), torch.full((2, 3), -1.0)
    logprobs[0, 0, 1] = -torch.inf
    given = (student.requires_grad_(), ids, logprobs, labels, rest)
    before = [(x._version, x.detach().clone()) for x in given]
    loss = topk_kd_loss(student, ids, logprobs, labels, log_rest=rest, hard_weight=1.0)
    loss.backward()
    for x, (version, copy) in zip(given, before, strict=True):
        assert x._version == version and torch.equal(x.detach(), copy)


def test_teacher_of_inference_mode_and_modules() -> None:
    student, ids, logprobs, _ = draw()
    with torch.inference_mode():
        held = ids.clone(), logprobs.clone(), torch.zeros(2, 3, dtype=torch.long)
    leaf = student.clone().requires_grad_()
    module = TopKKDLoss(2.0, tail="teacher", hard_weight=0.5)
    module(leaf, *held).backward()
    expected = topk_kd_loss(student, *held, 2.0, tail="teacher", hard_weight=0.5)
    assert torch.equal(module(student, *held), expected)
    assert leaf.grad is not None and leaf.grad.abs().sum() > 0


def test_compiles_as_one_graph() -> None:
    student, ids, logprobs, _ = draw()
    labels = torch.tensor([[1, 2, IGNORED], [3, 4, 5]])

    def loss(student: Tensor, temperature: float) -> Any:
        return topk_kd_loss(
            student, ids, logprobs, labels, temperature, hard_weight=0.5, return_mass=True
        )

    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for temperature in (1.0, 2.0, 3.0):
        results = []
        for function in (compiled, loss):
            leaf = student.clone().requires_grad_()
            value, mass = function(leaf, temperature)
            results.append((value.detach(), torch.autograd.grad(value, leaf)[0], *mass))
        torch.testing.assert_close(*results)


def test_transforms_and_forward_mode_run_through_the_reference() -> None:
    student, ids, logprobs, _ = draw()
    by_reference = student.clone().requires_grad_()
    loss = topk_kd_loss(by_reference, ids, logprobs, backend="reference")
    (wanted,) = torch.autograd.grad(loss, by_reference)
    made = torch.func.grad(lambda x: topk_kd_loss(x, ids, logprobs))(student)
    torch.testing.assert_close(made, wanted)
    _, slope = torch.func.jvp(lambda x: topk_kd_loss(x, ids, logprobs), (student,), (student,))
    torch.testing.assert_close(slope, (wanted * student).sum())


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("tail", ["bucket", "renormalize", "teacher"])
def test_at_once_as_in_two_passes(
    monkeypatch: pytest.MonkeyPatch, tail: str, reduction: str, dtype: torch.dtype
) -> None:
    """The gradient computed in the forward pass is that of the backward pass: rows long enough to
    be fetched ahead and of a width that fills no vector, some ignored, with weights and
    cross-entropies."""
    if LACKS["native"]:
        pytest.skip("; ".join(LACKS["native"]))
    student, ids, logprobs, _ = draw((9,), 5003, 7)
    student, logprobs = student.to(dtype), logprobs.float()
    student[0, ids[0, 1]] = student[0].max() + 1  # an id above the rest
    student[2, 2] = student[2].max() + 1  # the label, which is no id
    logprobs[0, 0] = -math.inf
    labels = torch.arange(9)
    labels[[1, 4, 8]] = IGNORED
    student[labels == IGNORED] = math.nan
    weight = torch.linspace(0.5, 2.0, 9)
    heats = torch.linspace(0.7, 1.9, 9)
    looked: list[bool] = []
    at_once = _topk.at_once

    def look(*given: Any) -> bool:
        looked.append(at_once(*given))
        return looked[-1]

    def step(temperature: Any, hard: float) -> tuple[Tensor, Tensor, LossParts]:
        """Beside parts the row's exponentials are made again, without them they are kept."""
        found, parts = [], None
        for return_parts in (True, False):
            leaf = student.clone().requires_grad_()
            given = topk_kd_loss(
                leaf, ids, logprobs, labels, temperature, tail=tail, reduction=reduction,
                hard_weight=hard, token_weight=weight, return_parts=return_parts, backend="native",
            )  # fmt: skip
            loss, parts = given if return_parts else (given, parts)
            (0.5 * loss).backward()
            assert leaf.grad is not None
            found.append((loss.detach(), leaf.grad))
        size = float(found[0][1].abs().max())
        torch.testing.assert_close(*found, rtol=NEAR[dtype], atol=NEAR[dtype] * size)
        assert parts is not None
        return *found[1], parts

    for temperature, hard in ((1.0, 0.0), (1.0, 0.7), (3.0, 0.7), (heats, 0.7)):
        monkeypatch.setattr(_topk, "at_once", look)
        loss, gradient, parts = step(temperature, hard)
        monkeypatch.setattr(_topk, "at_once", lambda *_: False)
        other_loss, other_gradient, other_parts = step(temperature, hard)
        near = {"rtol": NEAR[dtype], "atol": NEAR[dtype] * float(other_gradient.abs().max())}
        torch.testing.assert_close(gradient, other_gradient, **near)
        torch.testing.assert_close(loss, other_loss, rtol=1e-5, atol=0.0)
        for part, other in zip(parts, other_parts, strict=True):
            torch.testing.assert_close(part, other, rtol=1e-4, atol=1e-6)
    assert looked == [dtype != torch.float16] * 8

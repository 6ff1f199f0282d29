"""Losses through the output layer: the losses of its logits, without the logits."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_memory import _peak
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import kdkernels
from kdkernels import FusedLinearKDLoss, _dispatch, linear_kd_loss
from kdkernels.linear.kd import DIVERGENCES
from kdkernels.registry import SPECS
from kdkernels.teacher import LinearTeacher, TopKTeacher, top_k

N, WIDTH, VOCAB = 21, 12, 37
TOLERANCE = {torch.float64: 1e-11, torch.float32: 4e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@dataclasses.dataclass
class Setup:
    """A student's hidden states and layer, a teacher in each form, labels of which some count."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor
    of_teacher: LinearTeacher
    labels: Tensor

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.hidden, self.weight, self.bias


def setup(dtype: torch.dtype = torch.float64, rows: tuple[int, ...] = (N,)) -> Setup:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    student = normal(*rows, WIDTH), normal(VOCAB, WIDTH) / 3, normal(VOCAB)
    teacher = normal(*rows, 7), normal(VOCAB, 7) / 2, normal(VOCAB)
    labels = torch.randint(VOCAB, rows, generator=generator)
    labels.view(-1)[::4] = -100
    of_teacher = LinearTeacher(*(x.to(dtype) for x in teacher), softcap=8.0, logit_scale=1.5)
    return Setup(*(x.to(dtype).requires_grad_() for x in student), of_teacher, labels)


def layer(
    hidden: Tensor, weight: Tensor, bias: Any, softcap: float | None = None, scale: float = 1.0
) -> Tensor:
    logits = scale * (hidden @ weight.T + (0 if bias is None else bias))
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def teacher_logits(given: LinearTeacher) -> Tensor:
    wide = [None if x is None else x.double() for x in (given.hidden, given.weight, given.bias)]
    return layer(*wide, given.softcap, given.logit_scale)


def expected(given: Setup, divergence: str, teacher: Tensor, **options: Any) -> tuple[Any, ...]:
    """Value and gradients in float64, of the loss on logits that autograd saw being made."""
    leaves = [x.detach().double().requires_grad_() for x in given.leaves]
    head = {k: options.pop(k) for k in ("softcap", "scale") if k in options}
    function = DIVERGENCES[divergence].function
    options.setdefault("temperature", 1.0)
    if divergence == "kl":  # KD has T^2
        options["loss_weight"] = options.get("loss_weight", 1.0) / options["temperature"] ** 2
    value = function(layer(*leaves, **head), teacher, backend="reference", **options)
    return value.detach(), torch.autograd.grad(value.sum(), leaves)


def compare(actual: Any, leaves: Any, wanted: tuple[Any, ...], dtype: torch.dtype) -> None:
    value, gradients = wanted
    limit = TOLERANCE[dtype]
    torch.testing.assert_close(actual.double(), value, rtol=limit, atol=limit)
    made = torch.autograd.grad(actual.sum(), leaves)
    for x, one, other in zip(leaves, made, gradients, strict=True):
        assert one.dtype == x.dtype
        assert (one.double() - other).abs().max() <= limit * other.abs().max()


BACKENDS = [
    pytest.param(name, marks=[pytest.mark.skip(reason="; ".join(why))] if (why := lacks) else [])
    for name in _dispatch.BACKENDS
    for lacks in [_dispatch.why_not(SPECS["kd"], name, torch.empty(0))]
]
each_backend = pytest.mark.parametrize("backend", BACKENDS)


@each_backend
@pytest.mark.parametrize("form", ["logits", "linear"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_every_divergence(divergence: str, form: str, backend: str) -> None:
    given = setup()
    options: dict[str, Any] = {"temperature": 2.0, "hard_weight": 0.3, "loss_weight": 0.7}
    teacher: Any = given.of_teacher if form == "linear" else teacher_logits(given.of_teacher)
    loss = linear_kd_loss(
        given.hidden, given.weight, teacher, given.labels, student_bias=given.bias, softcap=3.0,
        logit_scale=0.8, divergence=divergence, chunk_tokens=8, backend=backend, **options,
    )  # fmt: skip
    key = "target" if divergence == "kl" else "labels"
    wanted = expected(
        given, divergence, teacher_logits(given.of_teacher), softcap=3.0, scale=0.8,
        **{key: given.labels}, **options,
    )  # fmt: skip
    compare(loss, given.leaves, wanted, torch.float64)


@each_backend
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_dtypes_and_reductions(dtype: torch.dtype, reduction: str, backend: str) -> None:
    given = setup(dtype, (3, 7))
    weight = torch.rand(3, 7, generator=torch.Generator().manual_seed(1))
    options: dict[str, Any] = {"reduction": reduction, "token_weight": weight}
    loss = linear_kd_loss(
        given.hidden, given.weight, given.of_teacher, given.labels, student_bias=given.bias,
        divergence="jsd", beta=0.2, chunk_tokens=5, backend=backend, **options,
    )  # fmt: skip
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert loss.shape == ((3, 7) if reduction == "none" else ())
    teacher = teacher_logits(given.of_teacher)
    options["token_weight"] = weight.double()
    wanted = expected(given, "jsd", teacher, labels=given.labels, beta=0.2, **options)
    compare(loss, given.leaves, wanted, dtype)


TAILS = [
    ("kl", "bucket"), ("kl", "renormalize"), ("kl", "teacher"), ("kl", "drop"),
    ("reverse_kl", "bucket"), ("jsd", "teacher"), ("tv", "renormalize"), ("tv", "bucket"),
]  # fmt: skip
INTERPRETED = {("kl", "drop", "mean"), ("tv", "renormalize", "none")}


@each_backend
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(("divergence", "tail"), TAILS)
def test_sparse_teachers(divergence: str, tail: str, reduction: str, backend: str) -> None:
    """As ``topk_kd_loss`` of the logits, with absent entries and a row of them alone."""
    if backend == "triton" and (divergence, tail, reduction) not in INTERPRETED:
        pytest.skip("interpreted: tests/test_topk.py has every tail")
    given = setup(rows=(3, 3) if backend == "triton" else (3, 7))
    known = top_k(teacher_logits(given.of_teacher), 5, 2.0)
    known.logprobs[0, 2, 3] = -math.inf
    known.logprobs[1, 1] = -math.inf
    known.ids[1, 1] = 0
    rest = known.log_rest
    assert rest is not None
    rest[1, 1] = -math.inf
    generator = torch.Generator().manual_seed(1)
    weight = torch.rand(given.labels.shape, generator=generator, dtype=torch.float64)
    options: dict[str, Any] = {
        "temperature": 2.0, "hard_weight": 0.3, "loss_weight": 0.7, "token_weight": weight,
        "reduction": reduction, "divergence": divergence, "tail": tail, "return_parts": True,
    }  # fmt: skip
    for labels in (given.labels, None):
        if labels is None:
            options["hard_weight"] = 0.0
            if backend == "triton":
                break
        loss, parts = linear_kd_loss(
            given.hidden, given.weight, known, labels, student_bias=given.bias, softcap=3.0,
            chunk_tokens=8, backend=backend, **options,
        )  # fmt: skip
        leaves = [x.detach().requires_grad_() for x in given.leaves]
        value, wanted = kdkernels.topk_kd_loss(
            layer(*leaves, 3.0), known.ids, known.logprobs, labels, log_rest=rest,
            backend="reference", **options,
        )  # fmt: skip
        gradients = torch.autograd.grad(value.sum(), leaves)
        compare(loss, given.leaves, (value.detach(), gradients), torch.float64)
        for one, other in zip(parts, wanted, strict=True):
            torch.testing.assert_close(one, other)


def test_a_sparse_teacher_in_half_precision() -> None:
    """As a cache has it: int32 ids, float16 log-probabilities, a float32 rest."""
    given = setup(torch.float32)
    known = top_k(teacher_logits(given.of_teacher).float(), 6)
    cached = TopKTeacher(known.ids.int(), known.logprobs.half(), known.log_rest)
    loss = linear_kd_loss(given.hidden, given.weight, cached, given.labels)
    exact = linear_kd_loss(given.hidden, given.weight, known, given.labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=2e-3, atol=1e-4)
    for change, error, text in (
        ({"divergence": "skew_kl"}, ValueError, "divergence must be 'kl', 'reverse_kl'"),
        ({"vocab": "truncate"}, ValueError, "vocab must be None where teacher is a TopKTeacher"),
        ({"tail": "ghost"}, ValueError, "tail must be 'bucket'"),
        ({"divergence": "tv", "tail": "drop"}, ValueError, "divergence must be 'kl' where tail"),
    ):
        with pytest.raises(error, match=text):
            linear_kd_loss(given.hidden, given.weight, cached, **change)  # type: ignore[arg-type]
    cached.ids[1, 0] = VOCAB
    for backend in _dispatch.BACKENDS:
        if not _dispatch.why_not(SPECS["kd"], backend, torch.empty(0)):
            with pytest.raises(ValueError, match=r"teacher_ids must be in \[0, 37\)"):
                linear_kd_loss(given.hidden, given.weight, cached, backend=backend)


def test_published_form() -> None:
    """KL as trainers write it, from nothing of this library."""
    given = setup()
    logits = layer(*given.leaves)
    p, q = teacher_logits(given.of_teacher).log_softmax(-1), logits.log_softmax(-1)
    counted = given.labels != -100
    rows = nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)
    wanted = (rows * counted).sum() / counted.sum()
    wanted = wanted + 0.5 * nn.functional.cross_entropy(logits, given.labels)
    loss = linear_kd_loss(
        given.hidden, given.weight, given.of_teacher, given.labels, student_bias=given.bias,
        hard_weight=0.5,
    )  # fmt: skip
    gradients = torch.autograd.grad(wanted, given.leaves)
    compare(loss, given.leaves, (wanted.detach(), gradients), torch.float64)


@each_backend
def test_chunks_change_no_bit_of_a_row(backend: str) -> None:
    """Small integers make every product exact, so that only the rows' arithmetic is left."""
    generator = torch.Generator().manual_seed(0)
    count = 7 if backend == "triton" else N
    hidden = torch.randint(-3, 4, (count, 8), generator=generator).float()
    weight = torch.randint(-3, 4, (VOCAB, 8), generator=generator).float()
    teacher = torch.randn(count, VOCAB, generator=generator)
    rows = []
    for tokens in (1, 4, None) if backend == "triton" else (1, 4, 7, N, 1000, None):
        leaf = hidden.clone().requires_grad_()
        loss = linear_kd_loss(
            leaf, weight, teacher, divergence="jsd", reduction="none", chunk_tokens=tokens,
            backend=backend,
        )  # fmt: skip
        rows.append((loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]))
    for value, gradient in rows[1:]:
        assert torch.equal(value, rows[0][0])
        torch.testing.assert_close(gradient, rows[0][1], rtol=1e-5, atol=1e-6)


def test_ignored_rows_are_not_read() -> None:
    given = setup(torch.float32)
    dirty = given.hidden.detach().clone()
    dirty[given.labels == -100] = math.nan
    dirty.requires_grad_()
    clean = linear_kd_loss(given.hidden, given.weight, given.of_teacher, given.labels)
    loss = linear_kd_loss(dirty, given.weight, given.of_teacher, given.labels)
    masked = linear_kd_loss(given.hidden, given.weight, given.of_teacher, given.labels != -100)
    assert torch.equal(loss, clean) and torch.equal(masked, clean)
    of_clean = torch.autograd.grad(clean, (given.hidden, given.weight))
    of_dirty = torch.autograd.grad(loss, (dirty, given.weight))
    for one, other in zip(of_clean, of_dirty, strict=True):
        assert torch.equal(one, other)
    assert not of_clean[0][given.labels == -100].any()


@pytest.mark.parametrize("rows", ["none", "ignored"])
def test_nothing_counted_is_zero_with_a_graph(rows: str) -> None:
    given = setup(torch.float32)
    hidden, teacher, labels = given.hidden, given.of_teacher.logits(), given.labels * 0 - 100
    if rows == "none":
        hidden, teacher, labels = hidden[:0], teacher[:0], labels[:0]
    loss = linear_kd_loss(hidden, given.weight, teacher, labels, student_bias=given.bias)
    assert loss == 0
    for gradient in torch.autograd.grad(loss, given.leaves):
        assert not gradient.any()


def test_shifted_logits_are_not_copied_whole() -> None:
    """``logits[:, :-1]`` of the teacher is no matrix of rows; it is copied a chunk at a time."""
    given = setup(rows=(2, 9))
    teacher = teacher_logits(given.of_teacher)
    longer = torch.cat([teacher, teacher[:, :1] * 0], 1)[:, :-1]
    with pytest.raises(RuntimeError):
        longer.view(-1, VOCAB)
    options: dict[str, Any] = {"student_bias": given.bias, "chunk_tokens": 5}
    for labels in (None, given.labels):
        whole = linear_kd_loss(given.hidden, given.weight, teacher, labels, **options)
        shifted = linear_kd_loss(given.hidden, given.weight, longer, labels, **options)
        assert torch.equal(whole, shifted)


def test_shifted_logits_and_a_mask_take_two_chunks() -> None:
    rows, vocab, tokens = 256, 4096, 64
    hidden = torch.randn(2, rows, 8)
    weight, teacher = torch.randn(vocab, 8), torch.randn(2, rows + 1, vocab)[:, :-1]
    labels = torch.zeros(2, rows, dtype=torch.int64)
    labels[:, ::3] = -100

    def step() -> None:
        linear_kd_loss(hidden, weight, teacher, labels, chunk_tokens=tokens)

    step()
    assert _peak(step, "cpu") <= 1.1 * 2 * tokens * vocab * 4


def test_a_scale_and_no_labels() -> None:
    """Slices of rows, whose gradient is written where it belongs."""
    given = setup()
    teacher = teacher_logits(given.of_teacher)
    loss = linear_kd_loss(
        given.hidden, given.weight, teacher, student_bias=given.bias, logit_scale=0.6,
        chunk_tokens=8,
    )  # fmt: skip
    compare(loss, given.leaves, expected(given, "kl", teacher, scale=0.6), torch.float64)


def test_parts_and_denominators() -> None:
    given = setup()
    options: dict[str, Any] = {"student_bias": given.bias, "hard_weight": 0.5}
    call = (given.hidden, given.weight, given.of_teacher, given.labels)
    plain = linear_kd_loss(*call, **options)
    loss, parts = linear_kd_loss(*call, return_parts=True, **options)
    assert torch.equal(loss, plain)
    torch.testing.assert_close(parts.distillation + parts.hard, loss.detach())
    log_q = layer(*given.leaves).detach().log_softmax(-1)
    entropy = -(log_q.exp() * log_q).sum(-1) * (given.labels != -100)
    torch.testing.assert_close(parts.entropy, entropy)
    rows, by_row = linear_kd_loss(*call, reduction="none", return_parts=True, **options)
    torch.testing.assert_close(by_row.distillation + by_row.hard, rows.detach())
    for items in (10, torch.tensor(10), torch.tensor(10.0, dtype=torch.float64)):
        total = linear_kd_loss(*call, num_items_in_batch=items, **options)
        torch.testing.assert_close(total, rows.sum() / 10)
    weight = torch.tensor(0.25)
    torch.testing.assert_close(
        linear_kd_loss(*call, loss_weight=weight, **options),
        linear_kd_loss(*call, loss_weight=0.25, **options),
    )


def test_a_wide_denominator_does_not_widen_the_loss() -> None:
    given = setup(torch.float32)
    items = torch.tensor(10.0, dtype=torch.float64)
    loss = linear_kd_loss(
        given.hidden, given.weight, given.of_teacher, num_items_in_batch=items,
        student_bias=given.bias,
    )  # fmt: skip
    assert loss.dtype == torch.float32


def test_backward_twice_differentiated_twice_and_no_grad() -> None:
    given = setup()
    call = (given.hidden, given.weight, given.of_teacher)
    for reduction in ("mean", "none"):
        loss = linear_kd_loss(*call, reduction=reduction).sum()
        first = torch.autograd.grad(loss, given.leaves[:2], retain_graph=True)
        kept = [x.clone() for x in first]
        for x in first:
            x.zero_()
        again = torch.autograd.grad(3 * loss, given.leaves[:2])
        for one, other in zip(kept, again, strict=True):
            torch.testing.assert_close(3 * one, other)
        loss = linear_kd_loss(*call, reduction=reduction).sum()
        (gradient,) = torch.autograd.grad(loss, given.hidden, create_graph=True)
        with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
            gradient.sum().backward()
    with torch.no_grad(), torch.profiler.profile() as profile:
        linear_kd_loss(*call)
    names = [event.name for event in profile.events()]
    assert names.count("aten::mm") == 1  # the logits'; the teacher's has a bias
    small = Setup(
        *(x.detach()[:3].requires_grad_() for x in given.leaves), given.of_teacher, given.labels
    )
    teacher = teacher_logits(given.of_teacher)[:3, :3]
    assert torch.autograd.gradgradcheck(
        lambda h: linear_kd_loss(h, small.weight, teacher, backend="reference"), (small.hidden,)
    )


def test_a_frozen_layer_gets_no_gradient() -> None:
    """Nothing of the layer's size is allocated, and the hidden states' gradient is the same."""
    given = setup(torch.float32)
    loss = linear_kd_loss(given.hidden, given.weight, given.of_teacher)
    (wanted,) = torch.autograd.grad(loss, given.hidden)
    frozen = given.weight.detach()
    loss = linear_kd_loss(given.hidden, frozen, given.of_teacher)
    assert torch.equal(torch.autograd.grad(loss, given.hidden)[0], wanted)
    leaf = given.weight.detach().requires_grad_()
    loss = linear_kd_loss(given.hidden.detach(), leaf, given.of_teacher)
    assert torch.autograd.grad(loss, leaf)[0].any()


@pytest.mark.parametrize("frozen", [False, True])
def test_memory(frozen: bool) -> None:
    rows, width, vocab, tokens = 512, 16, 4096, 32
    hidden = torch.randn(rows, width, requires_grad=True)
    weight = torch.randn(vocab, width, requires_grad=not frozen)
    teacher = LinearTeacher(torch.randn(rows, 8), torch.randn(vocab, 8))

    def step() -> None:
        linear_kd_loss(hidden, weight, teacher, chunk_tokens=tokens).backward()

    step()
    hidden.grad = weight.grad = None
    logits = rows * vocab * 4
    allowed = 2 * tokens * vocab * 4 + 4 * hidden.numel() * 4
    allowed += 0 if frozen else weight.numel() * 4
    assert _peak(step, "cpu") <= 1.1 * allowed < logits / 4


def test_half_masked_costs_half_of_the_products() -> None:
    given = setup(torch.float32)
    counted = int((given.labels != -100).sum())
    with torch.profiler.profile(record_shapes=True) as profile:
        linear_kd_loss(
            given.hidden, given.weight, given.of_teacher.logits(), given.labels
        ).backward()
    rows = [e.input_shapes[0][0] for e in profile.events() if e.name == "aten::mm"]
    assert rows and set(rows) <= {counted, VOCAB}


def test_autocast_is_that_of_linear() -> None:
    given = setup(torch.float32)
    teacher = given.of_teacher.logits()
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_kd_loss(given.hidden, given.weight, teacher, student_bias=given.bias)
    low = [x.detach().bfloat16().requires_grad_() for x in given.leaves]
    wanted = linear_kd_loss(low[0], low[1], teacher, student_bias=low[2])
    assert torch.equal(loss, wanted)
    gradients = torch.autograd.grad(loss, given.leaves)
    for one, other in zip(gradients, torch.autograd.grad(wanted, low), strict=True):
        assert one.dtype == torch.float32 and torch.equal(one, other.float())


def test_tied_weights_and_lora() -> None:
    given = setup()
    embedding = given.weight.detach().clone().requires_grad_()
    ids = given.labels.clamp(min=0)
    loss = linear_kd_loss(embedding[ids], embedding, given.of_teacher)
    (tied,) = torch.autograd.grad(loss, embedding)
    leaf = embedding.detach().requires_grad_()
    plain = kdkernels.kd_loss(leaf[ids] @ leaf.T, teacher_logits(given.of_teacher), 1.0)
    torch.testing.assert_close(tied, torch.autograd.grad(plain, leaf)[0])
    a = torch.randn(2, WIDTH, dtype=torch.float64, requires_grad=True)
    b = torch.randn(VOCAB, 2, dtype=torch.float64, requires_grad=True)
    base = given.weight.detach()
    loss = linear_kd_loss(given.hidden, base + b @ a, given.of_teacher)
    adapted = given.hidden @ base.T + (given.hidden @ a.T) @ b.T
    plain = kdkernels.kd_loss(adapted, teacher_logits(given.of_teacher), 1.0)
    for one, other in zip(
        torch.autograd.grad(loss, (a, b)), torch.autograd.grad(plain, (a, b)), strict=True
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("wider", ["student", "teacher"])
@pytest.mark.parametrize("form", ["logits", "linear"])
def test_vocabularies(wider: str, form: str) -> None:
    """A padded vocabulary is refused, or cut to the common prefix and normalised there."""
    given = setup()
    extra = torch.full((5, WIDTH), 9.0, dtype=torch.float64)
    weight, of_teacher = given.weight, given.of_teacher
    if wider == "student":
        weight = torch.cat([weight, extra])
    else:
        padded = torch.cat([of_teacher.weight, extra[:, :7]])
        bias = torch.cat([of_teacher.bias, extra[:, 0]])
        of_teacher = dataclasses.replace(of_teacher, weight=padded, bias=bias)
    teacher: Any = of_teacher if form == "linear" else teacher_logits(of_teacher)
    with pytest.raises(ValueError, match=r"teacher must be of the student's \d+ classes"):
        linear_kd_loss(given.hidden, weight, teacher)
    leaf = weight.detach().requires_grad_()
    loss = linear_kd_loss(given.hidden, leaf, teacher, vocab="truncate")
    wanted = linear_kd_loss(given.hidden, given.weight, given.of_teacher)
    torch.testing.assert_close(loss, wanted)
    gradient = torch.autograd.grad(loss, leaf)[0]
    torch.testing.assert_close(gradient[:VOCAB], torch.autograd.grad(wanted, given.weight)[0])
    assert not gradient[VOCAB:].any()


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("form", ["logits", "linear"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_fullgraph(reduction: str, form: str) -> None:
    given = setup()

    def step(hidden: Tensor, weight: Tensor, teacher: Any, labels: Tensor, t: float) -> Tensor:
        return linear_kd_loss(
            hidden, weight, teacher, labels, temperature=t, hard_weight=0.5, reduction=reduction
        )

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    teacher: Any = given.of_teacher if form == "linear" else teacher_logits(given.of_teacher)
    for temperature in (1.0, 1.5, 1.75, 2.5, 3.0):
        call = (given.hidden, given.weight, teacher, given.labels, temperature)
        one, other = compiled(*call), step(*call)
        torch.testing.assert_close(one, other)
        made = torch.autograd.grad(one.sum(), given.leaves[:2])
        for x, y in zip(made, torch.autograd.grad(other.sum(), given.leaves[:2]), strict=True):
            torch.testing.assert_close(x, y)
    assert counter.frame_count <= 2


def test_module() -> None:
    given = setup()
    module = FusedLinearKDLoss("skew_kl", 2.0, alpha=0.3, hard_weight=0.1, softcap=4.0)
    options: dict[str, Any] = {"student_bias": given.bias}
    loss = module(given.hidden, given.weight, given.of_teacher, given.labels, **options)
    wanted = linear_kd_loss(
        given.hidden, given.weight, given.of_teacher, given.labels, divergence="skew_kl",
        temperature=2.0, alpha=0.3, hard_weight=0.1, softcap=4.0, **options,
    )  # fmt: skip
    assert torch.equal(loss, wanted)
    assert "alpha=0.3" in repr(module) and not list(module.parameters())
    module.reduction, module.temperature = "sum", 1.5
    changed = module(given.hidden, given.weight, given.of_teacher, given.labels, **options)
    wanted = linear_kd_loss(
        given.hidden, given.weight, given.of_teacher, given.labels, "skew_kl", 1.5, alpha=0.3,
        hard_weight=0.1, softcap=4.0, reduction="sum", **options,
    )  # fmt: skip
    assert torch.equal(changed, wanted)
    with pytest.raises(TypeError, match="beta must be None where divergence is 'kl'"):
        FusedLinearKDLoss(beta=0.1)
    for wrong in ({"tail": "none"}, {"softcap": -1.0}, {"vocab": "cut"}, {"chunk_tokens": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
            FusedLinearKDLoss(**wrong)


def test_every_loss_of_tokens_with_a_rule_is_offered() -> None:
    names = {n for n, s in SPECS.items() if s.target_name == "labels" and s.family == "divergence"}
    assert set(DIVERGENCES) == {"kl"} | {n for n in names if SPECS[n].steps is None}


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"student_weight": torch.randn(37, 5)}, ValueError, r"student_weight must be \(V, 12\)"),
        ({"student_weight": torch.randn(37, 12)}, TypeError, "student_weight must be of the dtype"),
        ({"student_hidden": torch.randn(12)}, ValueError, "student_hidden must be"),
        ({"student_bias": torch.randn(3).double()}, ValueError, "student_bias must be of shape"),
        ({"teacher": None}, TypeError, "teacher must be a Tensor of logits, a LinearTeacher or"),
        ({"teacher": torch.randn(20, 37)}, ValueError, "teacher must be of the rows"),
        ({"teacher": torch.randn(21, 37, requires_grad=True)}, ValueError, "teacher must be a con"),
        ({"divergence": "dist"}, ValueError, "divergence must be 'kl', "),
        ({"beta": 0.5}, TypeError, "beta must be None where divergence is 'kl', got 0.5"),
        ({"divergence": "jsd", "beta": 2}, ValueError, r"beta must be in \[0, 1\]"),
        ({"temperature": 0}, ValueError, "temperature must be > 0"),
        ({"softcap": -1}, ValueError, "softcap must be > 0"),
        ({"logit_scale": math.nan}, ValueError, "logit_scale must be finite"),
        ({"chunk_tokens": 0}, ValueError, "chunk_tokens must be >= 1"),
        ({"chunk_tokens": 1.5}, TypeError, "chunk_tokens must be an int"),
        ({"hard_weight": 1.0}, TypeError, "labels must be a Tensor of class indices, got None"),
        (
            {"labels": torch.full((21,), 40), "hard_weight": 1.0},
            ValueError,
            "class indices must be in",
        ),
        ({"labels": torch.zeros(20).long()}, ValueError, r"labels must be of shape \(21,\)"),
        ({"vocab": "pad"}, ValueError, "vocab must be 'truncate'"),
        ({"reduction": "max"}, ValueError, "reduction must be"),
        ({"token_weight": torch.rand(3)}, ValueError, "token_weight must be of shape"),
        ({"return_parts": 1}, TypeError, "return_parts must be a bool"),
        ({"num_items_in_batch": 0}, ValueError, "num_items_in_batch must be > 0"),
        ({"backend": "fast"}, ValueError, "backend must be"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_errors(change: dict[str, Any], error: type[Exception], text: str) -> None:
    given = setup()
    call = {
        "student_hidden": given.hidden,
        "student_weight": given.weight,
        "teacher": given.of_teacher,
    }
    with pytest.raises(error, match=text):
        linear_kd_loss(**{**call, **change})  # type: ignore[arg-type]

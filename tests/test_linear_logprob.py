"""Log-probabilities through the output layer: those of its logits, without the logits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_linear_head import TOLERANCE, VOCAB, WIDTH, Setup, each_backend, layer, setup
from test_memory import _peak
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from kdkernels import _toolchain, linear_logprob
from kdkernels._calls import NO_ID


def ids_of(rows: tuple[int, ...], k: int | None) -> Tensor:
    """Some rows ask for a token twice."""
    shape = rows if k is None else (*rows, k)
    ids = torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(5))
    if k is not None and k > 1:
        ids[..., -1] = ids[..., 0]
    return ids


def published(
    given: Setup, ids: Tensor, temperature: float, **how: Any
) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    """``selective_log_softmax`` and ``entropy_from_logits`` as TRL has them, in float64."""
    leaves = [x.detach().double().requires_grad_() for x in given.leaves]
    logits = layer(*leaves, **how) / temperature
    log_q = logits.log_softmax(-1)
    index = ids.long() if ids.dim() == logits.dim() else ids.long().unsqueeze(-1)
    picked = log_q.gather(-1, index).reshape(ids.shape)
    entropy = -(log_q.exp() * log_q).sum(-1)
    return (picked, logits.logsumexp(-1), entropy), leaves


@each_backend
@pytest.mark.parametrize("k", [None, 1, 5])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_equals_the_published_form(dtype: torch.dtype, k: int | None, backend: str) -> None:
    if backend == "triton" and (k == 1 or dtype == torch.float16):
        pytest.skip("interpreted: two numbers of ids and three dtypes are enough")
    rows = (3, 2) if backend == "triton" else (3, 7)
    given = setup(dtype, rows)
    ids = ids_of(rows, k)
    how = {"softcap": 4.0, "logit_scale": 0.5}
    found = linear_logprob(
        given.hidden, given.weight, ids, bias=given.bias, temperature=1.5, chunk_tokens=5,
        backend=backend, **how,
    )  # fmt: skip
    wanted, leaves = published(given, ids, 1.5, softcap=4.0, scale=0.5)
    work = torch.float64 if dtype == torch.float64 else torch.float32
    limit = TOLERANCE[dtype]
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == work and one.shape == other.shape
        torch.testing.assert_close(one.double(), other.detach(), rtol=limit, atol=limit)
    assert not found.lse.requires_grad and not found.entropy.requires_grad
    upstream = torch.randn(ids.shape, generator=torch.Generator().manual_seed(6), dtype=work)
    made = torch.autograd.grad(found.logprob, given.leaves, upstream)
    right = torch.autograd.grad(wanted[0], leaves, upstream.double())
    for x, one, other in zip(given.leaves, made, right, strict=True):
        assert one.dtype == x.dtype
        assert (one.double() - other).abs().max() <= limit * other.abs().max()


def test_equals_cross_entropy() -> None:
    given = setup()
    ids = ids_of((21,), None)
    found = linear_logprob(given.hidden, given.weight, ids)
    logits = given.hidden @ given.weight.T
    torch.testing.assert_close(-found.logprob, F.cross_entropy(logits, ids, reduction="none"))


@each_backend
def test_a_certain_token_keeps_its_digits(backend: str) -> None:
    """float32: 1 less the others' probability of 1e-9 would be 0."""
    hidden, weight = torch.eye(WIDTH)[:1] * 21.0, torch.zeros(VOCAB, WIDTH)
    weight[3, 0] = 1.0
    found = linear_logprob(hidden, weight, torch.tensor([3]), backend=backend)
    wanted = -math.log1p((VOCAB - 1) * math.exp(-21.0))
    limit = 1e-6 if backend != "reference" else 1.0  # torch's log_softmax in float32
    assert float(found.logprob) == pytest.approx(wanted, rel=limit, abs=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("several", [False, True])
def test_the_gradient_of_a_certain_token_keeps_its_digits(
    several: bool, dtype: torch.dtype
) -> None:
    """1 - q = 36 exp(-40): 0 in either dtype, if it were a difference."""
    hidden = torch.eye(WIDTH, dtype=dtype)[:1] * 40.0
    weight = torch.zeros(VOCAB, WIDTH, dtype=dtype)
    weight[3, 0] = 1.0
    hidden.requires_grad_()
    ids = torch.tensor([[3, 5, 3]]) if several else torch.tensor([[3]])
    upstream = torch.tensor([[1.0, 0.0, 1.0]] if several else [[2.0]], dtype=dtype)
    found = linear_logprob(hidden, weight, ids).logprob
    rest = 36 * math.exp(-40.0)
    assert float(found.detach()[0, 0]) == pytest.approx(-math.log1p(rest), rel=1e-6, abs=0)
    (made,) = torch.autograd.grad(found, hidden, upstream)
    assert float(made[0, 0]) == pytest.approx(2 * rest / (1 + rest), rel=1e-5, abs=0)


def test_tensors_of_inference_mode() -> None:
    """Ids of a rollout are such; a head under inference mode likewise."""
    given = setup()
    wanted = linear_logprob(given.hidden, given.weight.detach(), ids_of((21,), 2)).logprob.sum()
    (right,) = torch.autograd.grad(wanted, given.hidden)
    with torch.inference_mode():
        ids, weight = ids_of((21,), 2), given.weight.clone()
    found = linear_logprob(given.hidden, weight, ids).logprob.sum()
    (made,) = torch.autograd.grad(found, given.hidden)
    assert torch.equal(found, wanted) and torch.equal(made, right)


@pytest.mark.skipif(_toolchain.compiler() is None, reason="torch.compile needs a C++ compiler")
def test_compiled_with_strided_hidden_states() -> None:
    hidden = torch.randn(WIDTH, 21).T.requires_grad_()
    weight, ids = torch.randn(VOCAB, WIDTH), ids_of((21,), None)

    def step(hidden: Tensor) -> Tensor:
        return linear_logprob(hidden, weight, ids).logprob.sum()

    torch._dynamo.reset()
    (made,) = torch.autograd.grad(torch.compile(step, fullgraph=True)(hidden), hidden)
    torch.testing.assert_close(made, torch.autograd.grad(step(hidden), hidden)[0])


def test_many_ids_a_row_take_the_memory_of_ids() -> None:
    rows, vocab, k = 256, 2048, 1024
    hidden = torch.randn(rows, 8, requires_grad=True)
    weight, ids = torch.randn(vocab, 8), torch.randint(vocab, (rows, k))
    found = linear_logprob(hidden, weight, ids, chunk_tokens=rows)

    def step() -> None:
        linear_logprob(hidden, weight, ids, chunk_tokens=rows).logprob.sum().backward()

    step()
    assert _peak(step, "cpu") < rows * k * k / 4
    logits = hidden.detach() @ weight.T
    torch.testing.assert_close(found.logprob, logits.log_softmax(-1).gather(1, ids))


def test_memory() -> None:
    rows, width, vocab, tokens = 512, 16, 4096, 32
    hidden = torch.randn(rows, width, requires_grad=True)
    weight = torch.randn(vocab, width, requires_grad=True)
    ids = torch.randint(vocab, (rows,))

    def step() -> None:
        linear_logprob(hidden, weight, ids, chunk_tokens=tokens).logprob.sum().backward()

    step()
    hidden.grad = weight.grad = None
    allowed = tokens * vocab * 4 + weight.numel() * 4 + 4 * hidden.numel() * 4
    assert _peak(step, "cpu") <= 1.15 * allowed < rows * vocab


def test_frozen_weights_second_derivatives_and_no_rows() -> None:
    given = setup()
    ids = ids_of((21,), None)
    found = linear_logprob(given.hidden, given.weight.detach(), ids).logprob.sum()
    (gradient,) = torch.autograd.grad(found, given.hidden)
    both = linear_logprob(given.hidden, given.weight, ids).logprob.sum()
    assert torch.equal(torch.autograd.grad(both, given.hidden)[0], gradient)
    both = linear_logprob(given.hidden, given.weight, ids).logprob.sum()
    (gradient,) = torch.autograd.grad(both, given.hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        gradient.sum().backward()
    nothing = linear_logprob(given.hidden[:0], given.weight, ids[:0])
    assert nothing.logprob.shape == (0,)
    assert not torch.autograd.grad(nothing.logprob.sum(), given.weight)[0].any()


def test_fullgraph() -> None:
    torch._dynamo.reset()
    given = setup()
    ids = ids_of((21,), 3)

    def step(hidden: Tensor, weight: Tensor, ids: Tensor, t: float) -> tuple[Tensor, ...]:
        return linear_logprob(hidden, weight, ids, temperature=t)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for temperature in (1.0, 1.5, 1.75, 2.5):
        call = (given.hidden, given.weight, ids, temperature)
        one, other = compiled(*call), step(*call)
        for x, y in zip(one, other, strict=True):
            torch.testing.assert_close(x, y)
        made = torch.autograd.grad(one[0].sum(), given.leaves[:2])
        for x, y in zip(made, torch.autograd.grad(other[0].sum(), given.leaves[:2]), strict=True):
            torch.testing.assert_close(x, y)
    assert counter.frame_count <= 2


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"ids": torch.zeros(20).long()}, ValueError, r"ids must be of shape \(21,\) or"),
        ({"ids": torch.zeros(21, 0).long()}, ValueError, "ids must be of shape"),
        ({"ids": torch.zeros(21, 1025).long()}, ValueError, "K from 1 to 1024"),
        ({"ids": torch.full((21,), NO_ID)}, ValueError, r"ids must be in \[0, 37\)"),
        ({"ids": torch.zeros(21)}, TypeError, "ids must be of an integer dtype"),
        ({"ids": torch.full((21,), VOCAB)}, ValueError, r"ids must be in \[0, 37\), got 37"),
        ({"ids": None}, TypeError, "ids must be a Tensor"),
        ({"hidden": torch.randn(WIDTH)}, ValueError, "hidden must be"),
        ({"weight": torch.randn(4, 3)}, ValueError, "weight must be"),
        ({"temperature": 0.0}, ValueError, "temperature must be > 0"),
        ({"chunk_tokens": -1}, ValueError, "chunk_tokens must be >= 1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_errors(change: dict[str, Any], error: type[Exception], text: str) -> None:
    given = setup()
    call = {"hidden": given.hidden, "weight": given.weight, "ids": ids_of((21,), None)}
    with pytest.raises(error, match=text):
        linear_logprob(**{**call, **change})

"""Containers of teachers: what they accept, what they say of the rest, rows, logits of a head."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from kdkernels.teacher import LinearTeacher, TopKTeacher

CONSTANT = (
    "a constant (call .detach() on it, or run the teacher under torch.no_grad()),"
    " got a tensor that requires grad"
)
FLOAT = "float64, float32, float16 or bfloat16"
INF = float("inf")


def sparse(*shape: int, k: int = 3, rest: bool = True, **kwargs: Any) -> TopKTeacher:
    generator = torch.Generator().manual_seed(0)
    full = torch.log_softmax(torch.randn(*shape, 7, generator=generator, **kwargs), -1)
    logprobs, ids = full.topk(k)
    log_rest = full.scatter(-1, ids, -INF).logsumexp(-1)
    return TopKTeacher(ids, logprobs, log_rest if rest else None)


def exactly(text: str) -> str:
    return re.escape(text) + "$"


@pytest.mark.parametrize("ids", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_dtypes(ids: torch.dtype, dtype: torch.dtype) -> None:
    made = sparse(2, 5)
    teacher = TopKTeacher(made.ids.to(ids), made.logprobs.to(dtype), made.log_rest)
    assert (teacher.shape, teacher.k, teacher.dtype, len(teacher)) == ((2, 5), 3, dtype, 2)
    assert teacher.device == torch.device("cpu")
    teacher.check(7)


BAD_SPARSE: dict[str, tuple[tuple[Any, ...], type[Exception], str]] = {
    "ids_type": (([1], torch.zeros(1)), TypeError, "ids must be a Tensor, got list"),
    "ids_dtype": (
        (torch.zeros(2, 3), torch.zeros(2, 3)),
        TypeError,
        "ids must be of an integer dtype, got torch.float32",
    ),
    "ids_0d": (
        (torch.tensor(1), torch.tensor(0.0)),
        ValueError,
        "ids must be (..., K) with K >= 1, got shape ()",
    ),
    "no_entries": (
        (torch.zeros(2, 0, dtype=torch.long), torch.zeros(2, 0)),
        ValueError,
        "ids must be (..., K) with K >= 1, got shape (2, 0)",
    ),
    "logprobs_type": (
        (torch.zeros(2, 3, dtype=torch.long), None),
        TypeError,
        "logprobs must be a Tensor, got NoneType",
    ),
    "logprobs_dtype": (
        (torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 3, dtype=torch.long)),
        TypeError,
        f"logprobs must be {FLOAT}, got torch.int64",
    ),
    "logprobs_shape": (
        (torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 4)),
        ValueError,
        "logprobs must be of shape (2, 3), that of ids, got (2, 4)",
    ),
    "logprobs_device": (
        (torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 3, device="meta")),
        ValueError,
        "logprobs must be on the device of ids, cpu, got meta",
    ),
    "logprobs_grad": (
        (torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 3, requires_grad=True)),
        ValueError,
        f"logprobs must be {CONSTANT}",
    ),
    "sparse_tensor": (
        (torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 3).to_sparse()),
        TypeError,
        "logprobs must be a dense Tensor (call .to_dense() on it), got a torch.sparse_coo tensor",
    ),
    "rest_type": (
        (torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 3), 0.0),
        TypeError,
        "log_rest must be a Tensor or None, got float",
    ),
    "rest_shape": (
        (torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 3), torch.zeros(2, 1)),
        ValueError,
        "log_rest must be of shape (2,), one number a row of ids, got (2, 1)",
    ),
    "rest_grad": (
        (
            torch.zeros(2, 3, dtype=torch.long),
            torch.zeros(2, 3),
            torch.zeros(2, requires_grad=True),
        ),
        ValueError,
        f"log_rest must be {CONSTANT}",
    ),
}


@pytest.mark.parametrize(("arguments", "kind", "text"), BAD_SPARSE.values(), ids=BAD_SPARSE)
def test_bad_sparse_teachers(arguments: tuple[Any, ...], kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=exactly(text)):
        TopKTeacher(*arguments)


def test_it_is_frozen() -> None:
    teacher = sparse(2)
    with pytest.raises(AttributeError):
        teacher.ids = teacher.ids  # type: ignore[misc]


INDICES: dict[str, Any] = {
    "int": 1,
    "slice": slice(1, None),
    "two": (0, 2),
    "column": (slice(None), 1),
    "ellipsis": (..., 2),
    "ellipsis_slice": (0, ..., slice(1, 3)),
    "none": (None, 1),
    "list": [1, 0],
    "tensor": torch.tensor([[1, 1], [0, 1]]),
    "mask": torch.arange(8).view(2, 4) % 3 == 0,
    "row_mask": torch.tensor([False, True]),
    "empty": slice(0, 0),
}


@pytest.mark.parametrize("rest", [True, False])
@pytest.mark.parametrize("index", INDICES.values(), ids=INDICES)
def test_rows_by_any_index(index: Any, rest: bool) -> None:
    """As the rows' numbers are indexed, so are the rows."""
    teacher = sparse(2, 4, rest=rest)
    numbers = torch.arange(8).view(2, 4)[index]
    part, flat = teacher[index], teacher.flatten()
    assert part.shape == numbers.shape and part.k == teacher.k
    assert torch.equal(part.ids, flat.ids[numbers])
    assert torch.equal(part.logprobs, flat.logprobs[numbers])
    assert (part.log_rest is not None) == rest
    if part.log_rest is not None and flat.log_rest is not None:
        assert torch.equal(part.log_rest, flat.log_rest[numbers])


@pytest.mark.parametrize("index", [(0, 0, 0), (..., 0, 0, 0), 2, (0, slice(None), 1)])
def test_an_index_does_not_reach_the_entries(index: Any) -> None:
    with pytest.raises(IndexError):
        sparse(2, 4)[index]
    with pytest.raises(IndexError):
        sparse(2, 4, rest=False)[index]


def test_one_row_has_no_length() -> None:
    with pytest.raises(TypeError, match="teacher must be of at least one dimension of rows"):
        len(sparse(2)[0])
    assert sparse(2)[0].flatten().shape == (1,)


def test_rows_are_iterated() -> None:
    teacher = sparse(3, 2)
    rows = list(teacher)
    assert len(rows) == 3 and torch.equal(rows[2].ids, teacher.ids[2])


def test_to() -> None:
    teacher = sparse(2, dtype=torch.float64)
    half = teacher.to(dtype=torch.float16)
    assert half.dtype == torch.float16 and half.ids is teacher.ids
    assert half.log_rest is teacher.log_rest, "the rest keeps its digits"
    assert teacher.to(torch.bfloat16).dtype == torch.bfloat16  # as Tensor.to takes it
    away = teacher.to("meta")
    assert away.device.type == "meta" and away.log_rest is not None
    assert away.log_rest.device.type == "meta"
    with pytest.raises(TypeError, match=r"dtype must be a floating dtype, got torch.int64"):
        teacher.to(dtype=torch.int64)


def test_copies_and_what_it_says() -> None:
    teacher = sparse(2, 3)
    for other in (copy.deepcopy(teacher), pickle.loads(pickle.dumps(teacher))):
        assert torch.equal(other.logprobs, teacher.logprobs)
    assert repr(teacher) == (
        "TopKTeacher(shape=(2, 3), k=3, ids=int64, logprobs=float32, log_rest=float32,"
        " device='cpu')"
    )


def test_it_goes_through_a_compiled_graph() -> None:
    def mass(teacher: TopKTeacher) -> torch.Tensor:
        part = teacher[1:].flatten()
        assert part.log_rest is not None
        return part.logprobs.exp().sum(-1) + part.log_rest.exp()

    compiled = torch.compile(mass, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(sparse(3, 2)), torch.ones(4))


def _with(**parts: Any) -> TopKTeacher:
    """Rows of ids [0, 1] of probability 1/4 each, the rest 1/2, with some parts replaced."""
    quarter = torch.full((2, 2), 0.25).log()
    usual = {"ids": torch.tensor([[0, 1]] * 2), "logprobs": quarter, "log_rest": quarter[0] * 0.5}
    return TopKTeacher(**{**usual, **parts})


BAD_DATA: dict[str, tuple[TopKTeacher, str]] = {
    "above": (_with(ids=torch.tensor([[0, 1], [5, 4]])), "ids must be in [0, 5), got 5"),
    "below": (_with(ids=torch.tensor([[0, 1], [-1, 4]])), "ids must be in [0, 5), got -1"),
    "twice": (
        _with(ids=torch.tensor([[0, 1], [3, 3]])),
        "ids must be different within a row, got 3 twice",
    ),
    "nan": (
        _with(logprobs=torch.tensor([[-2.0, -2.0], [-2.0, float("nan")]])),
        "logprobs must be log-probabilities, got a NaN",
    ),
    "positive": (
        _with(logprobs=torch.tensor([[-2.0, 2.0], [-2.0, -2.0]])),
        "logprobs must be log-probabilities, at most 0, got 2.0",
    ),
    "rest_positive": (
        _with(log_rest=torch.tensor([0.5, -1.0])),
        "log_rest must be log-probabilities, at most 0, got 0.5",
    ),
    "logits": (
        _with(logprobs=torch.tensor([[-2.0, 0.0], [-0.5, -0.5]])),
        "logprobs must be of sum at most 1 in each row, log_rest included,"
        " got probabilities that sum to 1.71306",
    ),
}


@pytest.mark.parametrize(("teacher", "text"), BAD_DATA.values(), ids=BAD_DATA)
def test_check_reads_the_data(teacher: TopKTeacher, text: str) -> None:
    with pytest.raises(ValueError, match=exactly(text)):
        teacher.check(5)


def test_check_lets_absent_entries_be() -> None:
    ids = torch.tensor([[7, 7, 2], [-1, -1, -1]])
    logprobs = torch.tensor([[-INF, -INF, -0.1], [-INF] * 3])
    TopKTeacher(ids, logprobs).check(5)
    with pytest.raises(ValueError, match="different within a row"):
        TopKTeacher(ids.clamp(min=0), torch.full((2, 3), -2.0)).check()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_check_allows_for_rounding(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    logprobs = torch.log_softmax(torch.randn(200, 64, generator=generator), -1)
    ids = torch.arange(64).expand(200, 64)
    TopKTeacher(ids, logprobs.to(dtype), torch.full((200,), -INF)).check(64)


# The head.


def head(dtype: torch.dtype = torch.float64, **options: Any) -> LinearTeacher:
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(2, 5, 6, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(11, 6, generator=generator, dtype=torch.float64).to(dtype)
    bias = torch.randn(11, generator=generator, dtype=torch.float64).to(dtype)
    return LinearTeacher(hidden, weight, bias, **options)


def formula(teacher: LinearTeacher) -> torch.Tensor:
    """softcap tanh(scale (h W^T + b) / softcap), an element at a time, in float64."""
    hidden, weight = teacher.hidden.double(), teacher.weight.double()
    logits = (hidden[..., None, :] * weight).sum(-1)
    if teacher.bias is not None:
        logits = logits + teacher.bias.double()
    logits = logits * teacher.logit_scale
    if teacher.softcap is not None:
        logits = teacher.softcap * torch.tanh(logits / teacher.softcap)
    return logits


@pytest.mark.parametrize(
    "options",
    [{}, {"logit_scale": 0.25}, {"softcap": 2.0}, {"softcap": 2.0, "logit_scale": 3.0}],
    ids=str,
)
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-13), (torch.float32, 1e-5), (torch.float16, 1e-2), (torch.bfloat16, 8e-2)],
)
def test_logits(options: dict[str, float], dtype: torch.dtype, tolerance: float) -> None:
    teacher = head(dtype, **options)
    logits = teacher.logits()
    assert logits.dtype == dtype and logits.shape == (2, 5, 11)
    expected = formula(teacher)
    torch.testing.assert_close(logits.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "rows", [slice(2, 7), torch.tensor([9, 0, 0]), torch.arange(10) % 2 == 0, slice(0, 0)]
)
def test_logits_of_some_rows(rows: Any) -> None:
    teacher = head(softcap=3.0)
    some = teacher.logits(rows)
    torch.testing.assert_close(some, formula(teacher).reshape(-1, 11)[rows])
    out = torch.full_like(some, float("nan"))
    assert teacher.logits(rows, out=out) is out and torch.equal(out, some)
    without = LinearTeacher(teacher.hidden, teacher.weight)
    torch.testing.assert_close(without.logits(rows), formula(without).reshape(-1, 11)[rows])


def test_logits_under_autocast_keep_their_dtype() -> None:
    teacher = head(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert teacher.logits().dtype == torch.float32


def test_a_head_elsewhere() -> None:
    teacher = head(softcap=3.0, logit_scale=2)
    assert type(teacher.logit_scale) is float
    flat = teacher.flatten().to(torch.float32)
    assert (flat.shape, flat.dtype, flat.softcap, flat.vocab_size) == ((10,), torch.float32, 3, 11)
    assert teacher.to("meta").device.type == "meta"
    assert "hidden_size=6, vocab_size=11, bias=True, softcap=3.0" in repr(teacher)


BAD_HEADS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "hidden_type": (
        lambda: LinearTeacher(None, torch.zeros(4, 3)),  # type: ignore[arg-type]
        TypeError,
        "hidden must be a Tensor, got NoneType",
    ),
    "hidden_dtype": (
        lambda: LinearTeacher(torch.zeros(2, 3, dtype=torch.int32), torch.zeros(4, 3)),
        TypeError,
        f"hidden must be {FLOAT}, got torch.int32",
    ),
    "hidden_0d": (
        lambda: LinearTeacher(torch.tensor(0.0), torch.zeros(4, 3)),
        ValueError,
        "hidden must be (..., H) with H >= 1, got shape ()",
    ),
    "hidden_grad": (
        lambda: LinearTeacher(torch.zeros(2, 3, requires_grad=True), torch.zeros(4, 3)),
        ValueError,
        f"hidden must be {CONSTANT}",
    ),
    "weight_shape": (
        lambda: LinearTeacher(torch.zeros(2, 3), torch.zeros(3, 4)),
        ValueError,
        "weight must be (V, 3), the width of hidden, got shape (3, 4)",
    ),
    "weight_dtype": (
        lambda: LinearTeacher(torch.zeros(2, 3), torch.zeros(4, 3, dtype=torch.float16)),
        TypeError,
        "weight must be of the dtype of hidden, torch.float32 (call .to() on it),"
        " got torch.float16",
    ),
    "weight_device": (
        lambda: LinearTeacher(torch.zeros(2, 3), torch.zeros(4, 3, device="meta")),
        ValueError,
        "weight must be on the device of hidden, cpu, got meta",
    ),
    "weight_grad": (
        lambda: LinearTeacher(torch.zeros(2, 3), torch.nn.Linear(3, 4).weight),
        ValueError,
        f"weight must be {CONSTANT}",
    ),
    "bias_shape": (
        lambda: LinearTeacher(torch.zeros(2, 3), torch.zeros(4, 3), torch.zeros(3)),
        ValueError,
        "bias must be of shape (4,), got (3,)",
    ),
    "softcap": (
        lambda: LinearTeacher(torch.zeros(2, 3), torch.zeros(4, 3), softcap=0.0),
        ValueError,
        "softcap must be > 0, got 0.0",
    ),
    "logit_scale": (
        lambda: LinearTeacher(torch.zeros(2, 3), torch.zeros(4, 3), logit_scale=INF),
        ValueError,
        "logit_scale must be finite, got inf",
    ),
    "rows": (
        lambda: head().logits(3),
        TypeError,
        "rows must be a slice or a 1-d tensor of indices, got 3",
    ),
    "out": (
        lambda: head().logits(slice(0, 2), out=torch.zeros(3, 11)),
        ValueError,
        "out must be of shape (2, 11), torch.float64, on cpu, got (3, 11), torch.float32, on cpu",
    ),
}


@pytest.mark.parametrize(("call", "kind", "text"), BAD_HEADS.values(), ids=BAD_HEADS)
def test_bad_heads(call: Callable[[], Any], kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=exactly(text)):
        call()

"""Sparse teachers from logits, against float64 formulas: log-probabilities, the rest, draws."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st
from torch import Tensor

from kdkernels.teacher import TopKTeacher, sampled, targets, top_k

INF, NAN = float("inf"), float("nan")
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def draw(*shape: int, scale: float = 4.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)


def rest_of(logits: Tensor, ids: Tensor, temperature: float) -> Tensor:
    """log of the others' probability, from Python's numbers and exact sums of them."""
    rows = []
    for row, chosen in zip(logits.double().tolist(), ids.tolist(), strict=True):
        others = [x / temperature for i, x in enumerate(row) if i not in set(chosen)]
        top, everything = max(others), [x / temperature for x in row]
        greatest = max(everything)
        rest = top + math.log(math.fsum(math.exp(x - top) for x in others))
        total = greatest + math.log(math.fsum(math.exp(x - greatest) for x in everything))
        rows.append(rest - total)
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.5, 4.0])
def test_top_k_against_the_formula(dtype: torch.dtype, temperature: float) -> None:
    logits = draw(6, 40).to(dtype)
    teacher = top_k(logits, 5, temperature)
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    assert teacher.ids.dtype == torch.int64 and teacher.dtype == kind
    assert teacher.log_rest is not None and teacher.log_rest.dtype == kind
    everything = torch.log_softmax(logits.double() / temperature, -1)
    greatest = everything.sort(-1, descending=True).values[:, :5]
    tolerance = 1e-13 if kind == torch.float64 else 4e-6
    close = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(teacher.logprobs.double(), greatest, **close)
    torch.testing.assert_close(everything.gather(1, teacher.ids), greatest)
    rest = rest_of(logits, teacher.ids, temperature)
    torch.testing.assert_close(teacher.log_rest.double(), rest, **close)
    teacher.check(40)


@pytest.mark.parametrize("gap", [10.0, 40.0, 90.0, 300.0])
def test_the_rest_keeps_its_digits(gap: float) -> None:
    """Where 1 - sum is 0 in float32: the rest is e^-gap of the whole."""
    logits = torch.tensor([[gap, gap - 1.0, *([0.0] * 30), -gap]])
    teacher = top_k(logits, 2)
    assert teacher.log_rest is not None
    expected = rest_of(logits, teacher.ids, 1.0)
    assert abs(expected.item()) > gap - 5
    torch.testing.assert_close(teacher.log_rest.double(), expected, rtol=1e-6, atol=1e-6)


def test_a_common_offset_changes_nothing() -> None:
    logits = torch.tensor([[3.0, 1.0, 0.5, 0.25, -2.0]])
    near, far = top_k(logits, 2), top_k(logits + 4096.0, 2)  # exact in float32
    assert torch.equal(near.logprobs, far.logprobs)
    assert near.log_rest is not None and far.log_rest is not None
    assert torch.equal(near.log_rest, far.log_rest)


def test_all_of_the_vocabulary_leaves_no_rest() -> None:
    logits = draw(3, 9)
    teacher = top_k(logits, 9)
    assert teacher.log_rest is not None and (teacher.log_rest == -INF).all()
    dense = torch.empty(3, 9, dtype=torch.float64).scatter_(1, teacher.ids, teacher.logprobs)
    torch.testing.assert_close(dense, torch.log_softmax(logits, -1))


def test_excluded_ids_are_absent_entries() -> None:
    logits = draw(4, 10).float()
    logits[0, 2:] = -INF  # two ids, and three entries
    logits[1, :7] = -INF  # three ids
    logits[2, :9] = -INF  # one
    teacher = top_k(logits, 3)
    teacher.check(10)
    assert (teacher.logprobs > -INF).sum(1).tolist() == [2, 3, 1, 3]
    assert teacher.log_rest is not None and teacher.log_rest[:3].tolist() == [-INF] * 3
    assert teacher.logprobs[2, 0] == 0.0
    assert len(set(teacher.ids[0].tolist())) == 3


@pytest.mark.parametrize("make", [top_k, sampled])
def test_a_bad_row_is_nan_and_the_others_keep_their_bits(make: Callable[..., Any]) -> None:
    logits = draw(5, 8).float()

    def teacher(values: Tensor) -> TopKTeacher:
        options = {} if make is top_k else {"generator": torch.Generator().manual_seed(3)}
        return make(values, 4, **options)

    good = teacher(logits)
    logits[1] = -INF
    logits[2, 5] = NAN
    logits[3, 1] = INF
    bad = teacher(logits)
    assert bad.log_rest is not None and good.log_rest is not None
    assert bad.logprobs[1:4].isnan().all() and bad.log_rest[1:4].isnan().all()
    for row in (0, 4):
        assert torch.equal(bad.logprobs[row], good.logprobs[row])
        assert torch.equal(bad.log_rest[row], good.log_rest[row])


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "shifted": lambda x: x[:, :-1],
    "transposed": lambda x: x.transpose(0, 1),
    "strided": lambda x: x[..., ::2],
    "classes_first": lambda x: x.movedim(-1, 0).contiguous().movedim(0, -1),
    "expanded": lambda x: x[:1].expand(3, -1, -1),
    "one_row": lambda x: x[0, 0],
    "no_rows": lambda x: x[:0],
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("block", [1 << 22, 50])
def test_layouts_and_blocks(
    layout: Callable[[Tensor], Tensor], block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bits as from contiguous rows in one block."""
    logits = layout(draw(3, 4, 24))
    expected = top_k(logits.contiguous(), 6)
    draws = sampled(logits.contiguous(), 6, generator=torch.Generator().manual_seed(5))
    monkeypatch.setattr(targets, "BLOCK", block)
    for other, same in (
        (top_k(logits, 6), expected),
        (sampled(logits, 6, generator=torch.Generator().manual_seed(5)), draws),
    ):
        assert other.shape == logits.shape[:-1]
        assert other.log_rest is not None and same.log_rest is not None
        assert torch.equal(other.ids, same.ids) and torch.equal(other.logprobs, same.logprobs)
        assert torch.equal(other.log_rest, same.log_rest)


def test_memory_is_some_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of logits of 16 blocks one is held at once (draws: two), shifted rows included."""
    rows, vocab, block = 64, 4096, 16384
    monkeypatch.setattr(targets, "BLOCK", block)
    logits = torch.randn(2, rows // 2 + 1, vocab).bfloat16()[:, :-1]
    for make, blocks in ((top_k, 1.25), (sampled, 2.5)):
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
            make(logits, 8)
        held = peak = 0
        events = profile.profiler.kineto_results.events()
        for _, size in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
            held += size
            peak = max(peak, held)
        assert 0 < peak < blocks * 4 * block, make.__name__


@given(
    st.lists(
        st.lists(st.floats(-50, 50, width=32), min_size=7, max_size=7), min_size=1, max_size=4
    ),
    st.integers(1, 7),
    st.floats(0.25, 8.0),
)
def test_any_rows_sum_to_one(rows: list[list[float]], k: int, temperature: float) -> None:
    teacher = top_k(torch.tensor(rows), k, temperature)
    teacher.check(7)
    assert teacher.log_rest is not None
    total = teacher.logprobs.double().exp().sum(1) + teacher.log_rest.double().exp()
    torch.testing.assert_close(total, torch.ones_like(total), rtol=1e-6, atol=1e-6)
    assert (teacher.logprobs.diff(dim=1) <= 0).all()


# Draws.


def test_sampled_is_counts_over_n() -> None:
    logits = draw(50, 12, scale=1.5).float()
    teacher = sampled(logits, 20, generator=torch.Generator().manual_seed(0))
    assert teacher.k == 12 and teacher.ids.dtype == torch.int64
    assert teacher.log_rest is not None and (teacher.log_rest == -INF).all()
    teacher.check(12)
    counts = teacher.logprobs.double().exp() * 20
    torch.testing.assert_close(counts, counts.round(), atol=1e-5, rtol=0.0)
    assert counts.sum(1).round().tolist() == [20.0] * 50
    present = teacher.logprobs > -INF
    assert (teacher.ids[~present] == 0).all()
    following = present[:, 1:]
    assert (teacher.ids.diff(dim=1)[following] > 0).all(), "ascending"


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_sampled_is_unbiased(temperature: float) -> None:
    """The mean of many targets is the teacher's distribution, rare ids included."""
    vocab, n, repeats = 8, 5, 40000
    logits = draw(1, vocab, scale=2.0, seed=4)
    probabilities = torch.softmax(logits[0] / temperature, -1)
    generator = torch.Generator().manual_seed(1)
    teacher = sampled(logits.expand(repeats, -1), n, temperature, generator=generator)
    mean = torch.zeros(vocab, dtype=torch.float64)
    mean.index_add_(0, teacher.ids.flatten(), teacher.logprobs.exp().flatten())
    mean /= repeats
    deviation = (probabilities * (1 - probabilities) / (n * repeats)).sqrt()
    assert probabilities.min() < 0.02
    assert ((mean - probabilities).abs() < 4.5 * deviation).all()


def test_sampled_has_the_variance_of_independent_draws() -> None:
    """Draws that shared their random number would have the right mean and n times this."""
    logits = torch.tensor([[0.0, 0.0]]).expand(4000, -1)
    teacher = sampled(logits, 25, generator=torch.Generator().manual_seed(2))
    share = (teacher.logprobs.double().exp() * (teacher.ids == 1)).sum(1)
    assert share.var().item() == pytest.approx(0.25 / 25, rel=0.1)


def test_sampled_draws_no_impossible_id() -> None:
    logits = torch.full((200, 6), -INF)
    logits[:, 2] = 0.0
    logits[:, 4] = -1.0
    teacher = sampled(logits, 30, generator=torch.Generator().manual_seed(0))
    present = teacher.ids[teacher.logprobs > -INF]
    assert set(present.tolist()) == {2, 4}


def test_a_draw_on_the_edge_takes_the_id_that_begins_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An id has the draws from its edge on: 0 belongs to the first possible one."""
    edges = torch.tensor([[0.0, 0.5, 1.0 - 2**-53]], dtype=torch.float64)
    monkeypatch.setattr(torch, "rand", lambda *size, **how: edges)
    teacher = sampled(torch.tensor([[-INF, 0.0, 0.0, -INF]]), 3)
    assert teacher.ids.tolist() == [[1, 2, 0]]
    torch.testing.assert_close(teacher.logprobs.exp(), torch.tensor([[1 / 3, 2 / 3, 0.0]]))


@pytest.mark.parametrize("layout", ["columns", "every other", "shifted"])
def test_sampled_of_strided_logits(layout: str) -> None:
    logits = draw(6, 11, 30).float()
    strided = {
        "columns": lambda: logits.transpose(-1, -2).contiguous().transpose(-1, -2),
        "every other": lambda: logits.repeat_interleave(2, -1)[..., ::2],
        "shifted": lambda: torch.cat([logits, logits], 1)[:, :11],
    }[layout]()
    assert not strided.is_contiguous() and torch.equal(strided, logits)
    one, two = (
        sampled(x, 8, generator=torch.Generator().manual_seed(0)) for x in (logits, strided)
    )
    assert torch.equal(one.ids, two.ids) and torch.equal(one.logprobs, two.logprobs)


def test_sampled_takes_the_generator() -> None:
    logits = draw(4, 30).bfloat16()
    one, two, three = (
        sampled(logits, 8, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(one.ids, two.ids) and torch.equal(one.logprobs, two.logprobs)
    assert not torch.equal(one.ids, three.ids)
    assert one.dtype == torch.float32 and one.k == 8


BAD: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "type": (lambda: top_k([1.0], 1), TypeError, "teacher_logits must be a Tensor, got list"),
    "dtype": (
        lambda: top_k(torch.zeros(2, 3, dtype=torch.int64), 1),
        TypeError,
        "teacher_logits must be float64, float32, float16 or bfloat16, got torch.int64",
    ),
    "one_class": (
        lambda: sampled(torch.zeros(2, 1), 1),
        ValueError,
        "teacher_logits must be (..., V) with V >= 2, got shape (2, 1)",
    ),
    "grad": (
        lambda: sampled(torch.zeros(2, 3, requires_grad=True), 1),
        ValueError,
        "teacher_logits must be a constant (call .detach() on it, or run the teacher under"
        " torch.no_grad()), got a tensor that requires grad",
    ),
    "k_0": (
        lambda: top_k(torch.zeros(2, 3), 0),
        ValueError,
        "k must be in [1, 3], the size of the vocabulary, got 0",
    ),
    "k_4": (
        lambda: top_k(torch.zeros(2, 3), 4),
        ValueError,
        "k must be in [1, 3], the size of the vocabulary, got 4",
    ),
    "k_type": (lambda: top_k(torch.zeros(2, 3), 1.5), TypeError, "k must be an int, got float"),
    "temperature": (
        lambda: top_k(torch.zeros(2, 3), 1, 0.0),
        ValueError,
        "temperature must be > 0, got 0.0",
    ),
    "n": (lambda: sampled(torch.zeros(2, 3), 0), ValueError, "n must be >= 1, got 0"),
    "generator": (
        lambda: sampled(torch.zeros(2, 3), 1, generator=7),
        TypeError,
        "generator must be a torch.Generator, got int",
    ),
    "generator_device": (
        lambda: sampled(torch.zeros(2, 3, device="meta"), 1, generator=torch.Generator()),
        ValueError,
        "generator must be on the logits' device meta, got cpu",
    ),
}


@pytest.mark.parametrize(("call", "kind", "text"), BAD.values(), ids=BAD)
def test_bad_arguments(call: Callable[[], Any], kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=re.escape(text) + "$"):
        call()


@pytest.mark.parametrize("make", [top_k, sampled])
def test_nothing_is_written_into_the_logits(make: Callable[..., Any]) -> None:
    for dtype in DTYPES:
        logits = draw(3, 9).to(dtype)
        before = logits.clone()
        with torch.no_grad():
            make(logits.requires_grad_(), 3)
        assert torch.equal(logits.detach(), before)
        with torch.inference_mode():
            assert not make(logits.detach(), 3).logprobs.requires_grad

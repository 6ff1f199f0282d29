"""Rows of logits against K ids each: small logits, numbers and gradient on every backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kdkernels import _dispatch, _topk, native
from kdkernels._calls import NO_ID, TopKCall
from kdkernels._ops_topk import HARD
from kdkernels.registry import SPECS

LACKS = {
    "native": [] if native.has_rule("cpu", "sparse", "topk") else ["the extension has no topk"],
    "triton": _dispatch.why_not(SPECS["kd"], "triton", torch.empty(0)),
    "reference": [],
}
BACKENDS = [
    pytest.param(name, marks=[pytest.mark.skip(reason="; ".join(why))] if why else [])
    for name, why in LACKS.items()
]
each_backend = pytest.mark.parametrize("backend", BACKENDS)
IGNORED = -100
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def call(temperature: float = 1.0, **changed: Any) -> TopKCall:
    fields = {"wide": False, "rest": True, "hard": False, "entropy": False, **changed}
    return TopKCall([temperature], None, ignore_index=IGNORED, **fields)


def draw(rows: int, classes: int, k: int, seed: int = 0, spread: float = 3.0) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(seed)
    student = spread * torch.randn(rows, classes, generator=generator, dtype=torch.float64) + 5
    ids = torch.stack([torch.randperm(classes, generator=generator)[:k] for _ in range(rows)])
    target = torch.randint(classes, (rows,), generator=generator)
    return student, ids, target


def expected(
    student: Tensor, ids: Tensor, target: Tensor, temperature: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Absolute small logits, cross-entropies and entropies, a row at a time in float64."""
    small, hard, spread = [], [], []
    heats = torch.as_tensor(temperature).expand(len(student))
    for row, own, label, heat in zip(student, ids, target, heats, strict=True):
        present = own[own != NO_ID]
        keep = torch.ones(len(row), dtype=torch.bool)
        keep[present] = False
        columns = torch.full((len(own),), -torch.inf, dtype=row.dtype)
        columns = columns.masked_scatter(own != NO_ID, row[present] / heat)
        rest = (row[keep] / heat).logsumexp(0) if keep.any() else row.new_tensor(-torch.inf)
        small.append(torch.cat([columns, rest.unsqueeze(0)]))
        others = torch.ones(len(row), dtype=torch.bool)
        others[label] = False
        hard.append(
            torch.nn.functional.softplus(row[others].logsumexp(0) - row[label], threshold=99)
        )
        log_q = (row / heat).log_softmax(0)
        spread.append(-(log_q.exp() * log_q).sum())
    return torch.stack(small), torch.stack(hard), torch.stack(spread)


def upstream_of(small: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(9)
    return torch.randn(small.shape, generator=generator, dtype=torch.float64)


def gradient(small: Tensor, hard: Tensor, leaf: Tensor, by_hard: float) -> Tensor:
    weights = torch.where(small == -torch.inf, 0.0, upstream_of(small).to(small))
    value = (torch.where(small == -torch.inf, 0.0, small) * weights).sum() + by_hard * hard.sum()
    return torch.autograd.grad(value, leaf)[0]


def less_origin(small: Tensor, numbers: Tensor, heat: Any) -> Tensor:
    """The small logits from the logits' own zero."""
    return small + (numbers[0].detach() / torch.as_tensor(heat, dtype=small.dtype)).unsqueeze(-1)


@each_backend
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
@pytest.mark.parametrize("hard", [False, True], ids=["", "hard"])
def test_equals_the_rows_one_by_one(
    temperature: float, hard: bool, dtype: torch.dtype, backend: str
) -> None:
    """Classes of more than one block, ids side by side, a certain row, an absent id."""
    classes = 2500 if backend != "triton" else 1300
    student, ids, target = draw(4, classes, 7)
    ids[0, :3] = torch.tensor([NO_ID, 1023, 1024])
    target[1] = ids[1, 4]  # one that is an id, others are not
    student[2, ids[2, 0]] += 40
    student[3, target[3]] += 40
    student = student.to(dtype)
    wide = student.double().requires_grad_()
    small, hards, spread = expected(wide, ids, target, temperature)
    wanted = gradient(small, hards, wide, 2.0 * hard)

    leaf = student.clone().requires_grad_()
    wants = call(temperature, hard=hard, entropy=True)
    given, numbers = _topk.differentiable(backend, leaf, ids, target, None, wants)
    near = {torch.float64: 1e-12}.get(dtype, 5e-6)
    torch.testing.assert_close(
        less_origin(given, numbers, temperature).double(), small, rtol=near, atol=4 * near
    )
    assert given.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (numbers[0] == student.amax(-1)).all()
    torch.testing.assert_close(numbers[3].double(), spread.detach(), rtol=20 * near, atol=20 * near)
    torch.testing.assert_close(numbers[2].double(), hard * hards.detach(), rtol=near, atol=1e-30)
    made = gradient(given, numbers[HARD], leaf, 2.0 * hard)
    assert made.dtype == dtype
    near = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 1e-3}.get(dtype, 9e-3)
    tiny = 1e-7 if dtype == torch.float16 else 1e-20  # half of the least number
    torch.testing.assert_close(made.double(), wanted, rtol=near, atol=tiny)


@each_backend
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_what_is_left_beside_a_certain_id_keeps_its_digits(
    temperature: float, backend: str
) -> None:
    """The rest of a student that is certain of an id, and the cross-entropy of that id."""
    student, ids, target = draw(2, 300, 5, spread=1.0)
    student = student.float()
    student[0, ids[0, 2]] += 40  # what is left is less than float32 knows beside 1
    student[1, ids[1, 0]] += 300
    target[:] = torch.stack([ids[0, 2], ids[1, 0]])
    small, hards, _ = expected(student.double(), ids, target, temperature)
    leaf = student.clone().requires_grad_()
    given, numbers = _topk.differentiable(
        backend, leaf, ids, target, None, call(temperature, hard=True)
    )
    log_q = given.double().log_softmax(-1)[:, -1]
    # A logarithm's absolute error is its number's relative one.
    torch.testing.assert_close(log_q, small.log_softmax(-1)[:, -1], rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(numbers[HARD, 0].double(), hards[0], rtol=1e-5, atol=0)


@each_backend
@pytest.mark.parametrize("hard", [False, True], ids=["", "hard"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_gradient_over_the_logits_has_the_same_bits(
    dtype: torch.dtype, hard: bool, backend: str
) -> None:
    student, ids, target = draw(5, 1500, 9)
    student, target[2] = student.to(dtype), IGNORED
    wants = call(2.0, hard=hard)
    small, numbers = _topk.rows_of(backend, student, ids, target, None, wants)
    upstream = upstream_of(small).to(small)
    of_hard = torch.arange(5.0) if hard else None
    rest = (ids, target, None, small, numbers, upstream, of_hard, wants)
    before = student.clone()
    made = _topk.gradient_of(backend, student, *rest)
    assert torch.equal(student, before) and made.abs().sum() > 0
    written = _topk.gradient_of(backend, student, *rest, into=student)
    assert written is student and torch.equal(written, made) and not torch.equal(written, before)
    assert (made[2] == 0).all()


@each_backend
def test_ignored_rows_are_not_read(backend: str) -> None:
    """They may hold NaN, and ids that are out of range or there twice."""
    student, ids, target = draw(3, 40, 4)
    student[1], ids[1], target[1] = torch.nan, 10**6, IGNORED
    leaf = student.requires_grad_()
    wants = call(hard=True, entropy=True)
    small, numbers = _topk.differentiable(backend, leaf, ids, target, None, wants)
    assert (small[1] == 0).all() and (numbers[:, 1] == 0).all()
    assert small.isfinite().all() and (numbers[:4, 0] != 0).all()
    made = gradient(small, numbers[HARD], leaf, 1.0)
    assert (made[1] == 0).all() and made.isfinite().all() and (made[0] != 0).all()


@each_backend
def test_ids_that_are_all_classes(backend: str) -> None:
    student, _, target = draw(3, 6, 6)
    ids = torch.stack(
        [torch.randperm(6, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    )
    ids[1, 2] = NO_ID
    left = (set(range(6)) - set(ids[1].tolist())).pop()
    leaf = student.clone().requires_grad_()
    small, numbers = _topk.differentiable(backend, leaf, ids, target, None, call(2.0, hard=True))
    assert (small[::2, -1] == -torch.inf).all()
    torch.testing.assert_close(small[1, -1], (student[1, left] - student[1].max()) / 2)
    wide = student.clone().requires_grad_()
    wanted, hards, _ = expected(wide, ids, target, 2.0)
    torch.testing.assert_close(less_origin(small, numbers, 2.0), wanted)
    made = gradient(small, numbers[HARD], leaf, 1.0)
    torch.testing.assert_close(made, gradient(wanted, hards, wide, 1.0))


@each_backend
def test_rows_without_a_rest(backend: str) -> None:
    """Nothing is asked but the ids' logits: neither is their rest, nor has it a gradient."""
    student, ids, _ = draw(2, 30, 4)
    student[1, ids[1].max() - 1] = torch.nan  # no id is there unless two are side by side
    ids[1] = torch.tensor([1, 5, 9, 13])
    student[1, ids[1]] = torch.arange(4.0, dtype=torch.float64)
    leaf = student.requires_grad_()
    small, _ = _topk.differentiable(backend, leaf, ids, None, None, call(2.0, rest=False))
    assert (small[:, -1] == -torch.inf).all()
    columns = student.detach().gather(1, ids) / 2
    torch.testing.assert_close(small[:1, :-1].diff(), columns[:1].diff())
    made = gradient(small[:1], small.new_zeros(1), leaf, 0.0)
    off = torch.ones(30, dtype=torch.bool)
    off[ids[0]] = False
    assert (made[0, off] == 0).all() and (made[0, ids[0]] != 0).all()


@each_backend
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_temperature_a_row_and_float64(dtype: torch.dtype, backend: str) -> None:
    student, ids, target = draw(3, 70, 3)
    student = student.to(dtype)
    heats = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)
    leaf = student.clone().requires_grad_()
    wants = call(7.0, wide=True, hard=True, entropy=True)
    small, numbers = _topk.differentiable(backend, leaf, ids, target, heats, wants)
    wide = student.double().requires_grad_()
    wanted, hards, spread = expected(wide, ids, target, heats)
    torch.testing.assert_close(less_origin(small, numbers, heats), wanted)
    torch.testing.assert_close(numbers[2:4], torch.stack([hards, spread]))
    made = gradient(small, numbers[HARD], leaf, 1.0)
    near = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 1e-3}.get(dtype, 9e-3)
    tiny = 1e-7 if dtype == torch.float16 else 0.0
    wanted = gradient(wanted, hards, wide, 1.0)
    torch.testing.assert_close(made.double(), wanted, rtol=near, atol=tiny)


@each_backend
@pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=str)
def test_rows_that_hold_nan_touch_no_other(bad: float, backend: str) -> None:
    student, ids, target = draw(4, 50, 3)
    free = [min(set(range(50)) - {*ids[i].tolist(), int(target[i])}) for i in range(4)]
    student[0, ids[0, 1]], student[1, free[1]] = bad, bad
    leaf = student.float().requires_grad_()
    small, numbers = _topk.differentiable(backend, leaf, ids, target, None, call(hard=True))
    log_q = small.log_softmax(-1)
    assert log_q[:2].isnan().all() and log_q[2:].isfinite().all()
    assert numbers[HARD].isfinite().tolist() == [False, False, True, True]
    made = gradient(small, numbers[HARD], leaf, 1.0)
    assert made[1].isnan().any() and made[2:].isfinite().all()


@each_backend
def test_excluded_classes(backend: str) -> None:
    """Logits of -inf: of an id, of classes beside, of all of them."""
    student, ids, target = draw(3, 60, 4)
    target[:] = ids[:, 2]
    student[0, ids[0, 1]] = -torch.inf
    beside = torch.ones(60, dtype=torch.bool)
    beside[ids[1]] = False
    student[1, beside] = -torch.inf
    student[2, beside.nonzero()[:5, 0]] = -torch.inf
    student[2, ids[2]] = torch.arange(4.0, dtype=torch.float64)
    leaf = student.clone().requires_grad_()
    wants = call(2.0, hard=True, entropy=True)
    small, numbers = _topk.differentiable(backend, leaf, ids, target, None, wants)
    wide = student.clone().requires_grad_()
    wanted, hards, _ = expected(wide, ids, target, 2.0)
    torch.testing.assert_close(less_origin(small, numbers, 2.0), wanted)
    torch.testing.assert_close(numbers[HARD], hards)
    assert small[1, -1] == -torch.inf and numbers.isfinite().all()
    made = gradient(small, numbers[HARD], leaf, 1.0)
    assert made.isfinite().all() and (made[1, beside] == 0).all()


@pytest.mark.skipif(bool(LACKS["native"]), reason="; ".join(LACKS["native"]) or "never")
@pytest.mark.parametrize("rows", [1, 64])
def test_ids_are_checked_before_anything_is_given(rows: int) -> None:
    student, ids, target = draw(rows, 3000, 5)
    at = rows // 2
    for value, text in (
        (3000, r"teacher_ids must be in \[0, 3000\), got 3000"),
        (-1, r"teacher_ids must be in \[0, 3000\), got -1"),
        (
            int(ids[at, 0]),
            rf"teacher_ids must be different within a row, got {int(ids[at, 0])} twice",
        ),
    ):
        wrong = ids.clone()
        wrong[at, 3] = value
        for given in (student, student.bfloat16()):
            with pytest.raises(ValueError, match=f"^{text}$"):
                _topk.rows_of("native", given, wrong, None, None, call())
        with pytest.raises(ValueError, match=f"^{text}$"):
            _topk.check_ids(wrong, None, 3000)
        target[at] = IGNORED
        _topk.rows_of("native", student, wrong, target, None, call())
        _topk.check_ids(wrong, target != IGNORED, 3000)
    target[at] = 3000
    with pytest.raises(
        ValueError, match=r"^class indices must be in \[0, 3000\) or ignore_index=-100"
    ):
        _topk.rows_of("native", student, ids, target, None, call(hard=True))


@pytest.mark.skipif(bool(LACKS["triton"]), reason="; ".join(LACKS["triton"]) or "never")
def test_ids_that_cannot_be_make_rows_of_nan_without_the_host() -> None:
    student, ids, _ = draw(5, 90, 4)
    ids[0, 1], ids[1, 2], ids[2, 0] = 90, -5, ids[2, 3]
    ids[4, :2] = NO_ID  # which is no double
    small, _ = _topk.rows_of("triton", student, ids, None, None, call())
    assert small[:3].isnan().all() and not small[3:].isnan().any()


@each_backend
def test_many_ids(backend: str) -> None:
    student, ids, target = draw(2, 2200, 1024)
    leaf, wide = (student.clone().requires_grad_() for _ in range(2))
    small, numbers = _topk.differentiable(backend, leaf, ids, target, None, call(hard=True))
    wanted, hards, _ = expected(wide, ids, target, 1.0)
    torch.testing.assert_close(less_origin(small, numbers, 1.0), wanted)
    made = gradient(small, numbers[HARD], leaf, 1.0)
    torch.testing.assert_close(made, gradient(wanted, hards, wide, 1.0))


@pytest.mark.skipif(bool(LACKS["native"]), reason="; ".join(LACKS["native"]) or "never")
def test_threads_change_no_bit() -> None:
    student, ids, target = draw(64, 3000, 20)
    wants, results = call(2.0, hard=True, entropy=True), []
    wrong = ids.clone()
    wrong[[7, 50, 63], 3] = torch.tensor([3000, 3001, 3002])
    before = torch.get_num_threads()
    try:
        for threads in (1, 4):
            torch.set_num_threads(threads)
            small, numbers = _topk.rows_of("native", student, ids, target, None, wants)
            rest = (target, None, small, numbers, upstream_of(small), numbers[0].abs(), wants)
            made = _topk.gradient_of("native", student, ids, *rest)
            results.append((small, numbers, made))
            with pytest.raises(ValueError, match=r"got 3000$"):  # that of the first row
                _topk.rows_of("native", student, wrong, None, None, call())
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@each_backend
def test_no_rows(backend: str) -> None:
    student, ids = torch.empty(0, 9, requires_grad=True), torch.empty(0, 2, dtype=torch.long)
    small, numbers = _topk.differentiable(backend, student, ids, None, None, call())
    assert small.shape == (0, 3) and numbers.shape == (6, 0)
    assert torch.autograd.grad(small.sum(), student)[0].shape == (0, 9)


@pytest.mark.parametrize("backend", [x for x in BACKENDS if x.values[0] != "reference"])
def test_the_operators_keep_what_torch_asks_of_them(backend: str) -> None:
    student, ids, target = draw(3, 20, 3)
    name = "topk" if backend == "native" else "triton_topk"
    wants = call(2.0, hard=True, entropy=True)
    operator = getattr(torch.ops.kdkernels, name).default
    args = (student.requires_grad_(), ids, target, None, *wants)
    torch.library.opcheck(operator, args)
    small, numbers = _topk.rows_of(backend, student, ids, target, None, wants)
    made = (small, numbers, torch.ones_like(small), torch.ones(3, dtype=torch.float64))
    into = getattr(torch.ops.kdkernels, f"{name}_gradient_into").default
    rest = (*made, student.detach(), ids, target, None, *wants)
    torch.library.opcheck(getattr(torch.ops.kdkernels, f"{name}_gradient").default, rest)
    torch.library.opcheck(into, (torch.empty(3, 20, dtype=torch.float64), *rest))


@pytest.mark.parametrize("backend", [x for x in BACKENDS if x.values[0] != "reference"])
def test_a_second_derivative_is_refused(backend: str) -> None:
    student, ids, _ = draw(2, 20, 3)
    leaf = student.requires_grad_()
    small, _ = _topk.differentiable(backend, leaf, ids, None, None, call())
    (made,) = torch.autograd.grad(small.sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        torch.autograd.grad(made.sum(), leaf)

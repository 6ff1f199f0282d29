"""The oracle must reject what it exists to reject."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import LOSS_IDS, LOSSES, Case
from inputs import make
from oracle import Expected, check, check_gradient, expectation, verify
from torch import Tensor


def _expected(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Expected:
    truth = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    return Expected(truth, truth.to(dtype), eps * truth.abs())


def _good(expected: Expected) -> Tensor:
    """A faithful result: the truth, rounded."""
    return expected.truth.to(expected.baseline.dtype).clone()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_accepts_a_rounded_result(dtype: torch.dtype) -> None:
    expected = _expected((64, 50), dtype)
    check_gradient(_good(expected), expected)
    noise = torch.empty(64, 50).uniform_(-1, 1, generator=torch.Generator().manual_seed(1))
    close = expected.truth * (1 + 0.5 * torch.finfo(dtype).eps * noise)
    check_gradient(close.to(dtype), expected)


def _nan(x: Tensor) -> Tensor:
    x[3, 4] = float("nan")
    return x


def _inf(x: Tensor) -> Tensor:
    x[3, 4] = float("inf")
    return x


def _one_element(x: Tensor) -> Tensor:
    x[7, 8] += 0.01
    return x


BROKEN: dict[str, Callable[[Tensor], Tensor]] = {
    "nan": _nan,
    "inf": _inf,
    "one_element": _one_element,
    "sign": lambda x: -x,
    "bias": lambda x: x * 1.01,
    "dtype": lambda x: x.double(),
    "zeros": torch.zeros_like,
    "row_offset": lambda x: x + 2e-4,
    "swapped_rows": lambda x: x.roll(1, 0),
    "shape": lambda x: x[:1],
    "rank": lambda x: x.unsqueeze(0),
}


@pytest.mark.parametrize("name", BROKEN)
def test_rejects(name: str) -> None:
    expected = _expected((64, 50))
    check_gradient(_good(expected), expected)
    with pytest.raises(AssertionError):
        check_gradient(BROKEN[name](_good(expected)), expected)


def test_rejects_one_wrong_element_in_a_million() -> None:
    expected = _expected((1000, 1000))
    bad = _good(expected)
    check(bad, expected)
    bad[999, 999] += 1e-4
    with pytest.raises(AssertionError, match="largest error"):
        check(bad, expected)


def test_rejects_a_wrong_scalar() -> None:
    expected = _expected(())
    check(_good(expected), expected)
    with pytest.raises(AssertionError):
        check(_good(expected) * (1 + 1e-4), expected)
    with pytest.raises(AssertionError):
        check(_good(expected) * float("nan"), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rejects_a_bias_below_the_rounding_of_an_element(dtype: torch.dtype) -> None:
    """One percent is near bfloat16's eps: no single element shows it, the mean does."""
    expected = _expected((64, 50), dtype)
    with pytest.raises(AssertionError, match="bias"):
        check_gradient((expected.truth * (1 + 0.5 * torch.finfo(dtype).eps)).to(dtype), expected)
    with pytest.raises(AssertionError):
        check_gradient((expected.truth * 1.01).to(dtype), expected)


def test_rejects_a_finite_number_where_the_truth_is_not() -> None:
    expected = _expected((4, 5))
    expected.truth[1, 1] = float("inf")
    expected.truth[2, 2] = float("nan")
    check(_good(expected), expected)
    for place in ((1, 1), (2, 2)):
        bad = _good(expected)
        bad[place] = 0.0
        with pytest.raises(AssertionError, match="truth differs"):
            check(bad, expected)


def test_rejects_aliases() -> None:
    expected = _expected((4, 5))
    with pytest.raises(AssertionError, match="itself"):
        check(expected.baseline, expected)
    with pytest.raises(AssertionError, match="shares memory"):
        check(expected.baseline.view(4, 5), expected)


def test_a_broken_baseline_excuses_nothing() -> None:
    """A baseline that is NaN where the truth is finite gives no licence to be wrong."""
    expected = _expected((4, 5))
    expected.baseline[1, 1] = float("nan")
    bad = _good(expected)
    bad[1, 1] += 1.0
    with pytest.raises(AssertionError):
        check(bad, expected)


@pytest.mark.parametrize("spec", LOSSES, ids=LOSS_IDS)
def test_inputs_are_not_trivial(spec) -> None:
    """A loss and a gradient of zero would make every comparison vacuous."""
    s, t, y = make("gaussian", 6, 10)
    value, gradient = expectation(Case(spec, "reference", "cpu"), s, t, y)
    assert value.truth.abs() > 1e-3
    assert (gradient.truth.abs().amax(-1) > 1e-4).all()
    assert value.sensitivity < 1e-4 * value.truth.abs()


MUTANTS: dict[str, Callable[..., Tensor]] = {
    "value": lambda case, s, t, y, **kw: case(s, t, y, **kw) * (1 + 1e-4),
    "gradient": lambda case, s, t, y, **kw: case(s + 1e-4 * (s - s.detach()), t, y, **kw),
    "one_row": lambda case, s, t, y, **kw: case(
        torch.where(torch.arange(s.shape[0])[:, None] == 3, s * 1.001, s), t, y, **kw
    ),
    "swapped": lambda case, s, t, y, **kw: case(s + (t - s).detach(), s.detach(), y, **kw),
}


@pytest.mark.parametrize("name", MUTANTS)
@pytest.mark.parametrize("spec", LOSSES, ids=LOSS_IDS)
def test_rejects_a_mutated_loss(spec, name: str, monkeypatch) -> None:
    """``verify`` as a whole: a loss slightly wrong in value or gradient does not pass."""
    s, t, y = make("gaussian", 6, 10)
    case = Case(spec, "reference", "cpu")
    verify(case, s, t, y)

    class Mutant(Case):
        def __call__(self, s, t, y=None, **kw):
            return MUTANTS[name](case, s, t, y, **kw)

    with pytest.raises(AssertionError):
        verify(Mutant(spec, "reference", "cpu"), s, t, y)

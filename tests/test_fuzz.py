"""A short run of fuzz.py, and that the fuzzer itself would notice what it is for."""

from __future__ import annotations

import random
from collections.abc import Callable

import fuzz
import fuzz_formulas
import pytest
import torch
from cases import LOSS_IDS, option_names
from fuzz_inputs import BAD_VALUES, Draw
from torch import Tensor

from kdkernels import _checks
from kdkernels.registry import SPECS, LossSpec

SEED, CASES = 20_000, 150


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_few_random_cases(backend: str) -> None:
    """The same cases on every run; ``make fuzz`` tries others."""
    count, found = fuzz.fuzz(SEED, [backend], lambda n: n >= CASES)
    assert not found, "\n".join(found)
    assert count == CASES


def test_a_few_random_cases_of_triton() -> None:
    wanted = [name for name, spec in SPECS.items() if fuzz.backends_of(spec, ["triton"])]
    if not wanted:
        pytest.skip("Triton runs no loss here")
    count, found = fuzz.fuzz(SEED, ["triton"], lambda n: n >= 20, wanted)
    assert not found and count == 20, "\n".join(found)


@pytest.mark.parametrize("spec", SPECS.values(), ids=LOSS_IDS)
def test_every_loss_has_a_formula_and_inputs(spec: LossSpec) -> None:
    """A new loss is fuzzed from its first day, or this fails."""
    written = {**fuzz_formulas.ROWS, **fuzz_formulas.BATCHES}
    assert spec.name in written, f"write {spec.name} into tests/fuzz_formulas.py"
    assert Draw(random.Random(0)).inputs(spec)
    unknown = [name for name in option_names(spec) if name not in BAD_VALUES]
    assert not unknown, f"write bad values of {unknown} into tests/fuzz_inputs.py"


@pytest.mark.parametrize(
    "fault",
    [
        lambda loss: loss * (1 + 1e-3),
        lambda loss: loss.double(),
        lambda loss: loss + torch.where(loss == 0, 1e-6, 0.0),
        lambda loss: torch.where(loss.isnan(), 0.0, loss),
        lambda loss: loss.detach() + 1.001 * (loss - loss.detach()),
        lambda loss: loss * torch.rand(()).clamp(min=0.5),
    ],
    ids=["value", "dtype", "ignored", "nan", "gradient", "luck"],
)
def test_a_fault_is_found(
    fault: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each kind of wrong result makes some case fail."""
    call = fuzz.Case.__call__
    monkeypatch.setattr(fuzz.Case, "__call__", lambda self, **kw: fault(call(self, **kw)))
    _, found = fuzz.fuzz(SEED, ["reference"], lambda n: n >= 120, ["kd", "dkd"], most=1)
    assert found


def test_a_bad_argument_that_is_taken_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_checks, "temperature", lambda value, name="temperature": 4.0)
    _, found = fuzz.fuzz(SEED, ["reference"], lambda n: n >= 200, ["kd"], most=100)
    assert any("temperature is bad and was taken" in text for text in found)

"""How many kernels a step of the compiled CUDA losses launches, counted on the emulated device."""

from __future__ import annotations

import cuda_emulator
import pytest
import torch
from cases import same_bits
from cuda_emulator import capture, launches
from cuda_emulator_embedding import factors, tuples
from inputs import make
from test_cuda_kernels import OPTIONS, SIZES, options_of
from torch import Tensor

from kdkernels.registry import SPECS

pytestmark = pytest.mark.skipif(
    cuda_emulator.compiler() is None, reason="the emulator needs a C++ compiler"
)
ONE = torch.ones(())


def rows(rule: str, count: int, classes: int, **arguments) -> tuple[Tensor, Tensor | None]:
    """A mean over the rows that count; every third is ignored."""
    student, teacher, target = make("gaussian", count, classes)
    target[::3] = -100
    given = cuda_emulator.row_loss(
        rule, student, teacher, target, OPTIONS[rule], temperature=2.0, **arguments
    )
    return given[:2]


def reference(rule: str, count: int, classes: int) -> Tensor:
    student, teacher, target = make("gaussian", count, classes)
    keep = torch.arange(count) % 3 > 0
    kept = (x[keep].double() for x in (student, teacher))
    needs = (target[keep],) if SPECS[rule].needs_target else ()
    return SPECS[rule].reference(*kept, *needs, temperature=2.0, **options_of(rule)).mean()


@pytest.mark.parametrize("rule", OPTIONS)
@pytest.mark.parametrize("traversal", SIZES)
def test_a_step_of_rows_takes_two(rule: str, traversal: str) -> None:
    """Forward and backward, with rows that are ignored and a mean over the others."""

    def step() -> None:
        _, gradient = rows(rule, 3 if traversal != "split" else 2, 40, traversal=traversal)
        assert gradient is not None
        cuda_emulator.scale_(gradient, ONE)

    assert launches(step) == 2


@pytest.mark.parametrize("rule", OPTIONS)
def test_a_step_that_recomputes_takes_two(rule: str) -> None:
    def step() -> None:
        rows(rule, 5, 40, need_gradient=False)
        rows(rule, 5, 40, upstream=ONE * 1.5)

    assert launches(step) == 2


@pytest.mark.parametrize(("count", "expected"), [(1024, 1), (1025, 2), (5000, 2)])
def test_the_valid_of_many_rows_are_counted_before(count: int, expected: int) -> None:
    found: list[Tensor] = []
    assert launches(lambda: found.append(rows("kd", count, 8)[0])) == expected
    torch.testing.assert_close(found[0].double(), reference("kd", count, 8), rtol=1e-5, atol=0)


@pytest.mark.parametrize("rule", OPTIONS)
def test_a_graph_takes_no_counter_of_the_stream(rule: str) -> None:
    """It may be replayed beside other launches; so its counter is its own, and cleared before."""
    expected = rows(rule, 9, 40)
    found: list[Tensor] = []
    with capture():
        assert launches(lambda: found.extend(rows(rule, 9, 40))) == 2
    assert all(same_bits(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(("traversal", "expected"), [("columns", 1), ("stream", 1), ("slices", 3)])
def test_correlations(traversal: str, expected: int) -> None:
    student, teacher, _ = make("gaussian", 6, 512 if traversal == "columns" else 1024)

    def step() -> None:
        ran = cuda_emulator.correlation_loss("dist", student, teacher, traversal=traversal)
        assert ran[2] == traversal

    assert launches(step) == expected


def test_embeddings() -> None:
    student, other, teacher = torch.randn(3, 7, 64)
    assert launches(lambda: factors(student, other, teacher)) == 1
    assert launches(lambda: factors(student, other, teacher, need_loss=False, upstream=ONE)) == 1
    with capture():
        assert launches(lambda: factors(student, other, teacher)) == 2
    distances = torch.cdist(student, student), torch.cdist(teacher, teacher)
    assert launches(lambda: tuples(*distances, torch.arange(7) % 2)) == 2

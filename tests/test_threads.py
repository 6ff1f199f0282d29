"""Threads change nothing: neither Python threads that share a loss nor the threads inside it."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from cases import LOSSES, Case, each, reductions, same_bits, value_and_grad
from inputs import make
from torch import Tensor

from kdkernels import _dispatch

WORKERS = 8


@pytest.fixture
def _restore_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@each(keep=lambda case: not case.interpreted)
def test_eight_threads_give_the_bits_of_one(case: Case) -> None:
    """From a cold start: the caches of dispatch and kernels are filled by all threads at once.

    Triton's interpreter patches the language while it runs: one thread at a time.
    """
    shapes = [case.pick((rows + 5, 40 * rows + 7), (2, rows + 3)) for rows in range(WORKERS)]
    inputs = [make("gaussian", *shape, device=case.device) for shape in shapes]

    def run(batch: tuple[Tensor, Tensor, Tensor]) -> list[tuple[Tensor, Tensor]]:
        return [
            value_and_grad(case, *batch, reduction=name)
            for name in reductions(case.spec)
            for _ in range(case.pick(5, 1))
        ]

    expected = [run(batch) for batch in inputs]
    _dispatch.clear_cache()
    start = Barrier(WORKERS)

    def worker(batch: tuple[Tensor, Tensor, Tensor]) -> list[tuple[Tensor, Tensor]]:
        start.wait()
        return run(batch)

    with ThreadPoolExecutor(WORKERS) as pool:
        actual = list(pool.map(worker, inputs))
    for by_thread, serial in zip(actual, expected, strict=True):
        for got, wanted in zip(by_thread, serial, strict=True):
            assert all(same_bits(a, b) for a, b in zip(got, wanted, strict=True))


SHAPES = ((1, 70001), (3, 4099), (300, 1000), (5000, 19))


@pytest.mark.usefixtures("_restore_threads")
@each(keep=lambda case: case.backend == "native" and case.device == "cpu")
def test_the_number_of_threads_does_not_change_a_bit(case: Case) -> None:
    """Only the compiled CPU kernels use torch's threads, in a way that no option changes."""
    for shape in SHAPES:
        batch = make("gaussian", *shape, device=case.device)
        for reduction in reductions(case.spec):
            results = []
            for threads in (1, 2, 3, 5):
                torch.set_num_threads(threads)
                results.append(value_and_grad(case, *batch, reduction=reduction))
            for other in results[1:]:
                assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.usefixtures("_restore_threads")
@each(
    [spec for spec in LOSSES if spec.name in ("kd", "dkd", "jsd")],
    dense=(False, True),
    keep=lambda case, dense: case.backend == "native" and case.device == "cpu",
)
def test_rows_that_are_dealt_are_those_of_small_batches(case: Case, dense: bool) -> None:
    """Of a large problem each thread takes the next rows; whose mask is a run ends early."""
    rows, classes = (9 * 331, 353) if dense else (67, 17000)
    student, teacher, target = make("gaussian", rows, classes)
    target[: rows // 2] = -100

    def gradient(part: slice) -> Tensor:
        s, t, y = student[part], teacher[part], target[part]
        if dense:
            s, t = (x.t().contiguous()[None, ..., None] for x in (s, t))
            y = y[None, :, None]
        _, slope = value_and_grad(case, s, t, target=y, reduction="sum")
        return slope[0, ..., 0].t() if dense else slope

    torch.set_num_threads(1)
    expected = torch.cat([gradient(slice(i, i + rows // 8)) for i in range(0, rows, rows // 8)])
    assert (expected[rows // 2 :] != 0).any(1).all()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert same_bits(gradient(slice(None)), expected)


@pytest.mark.usefixtures("_restore_threads")
@each()
def test_backward_on_another_thread(case: Case) -> None:
    student, teacher, target = make("gaussian", 4, 9, device=case.device)
    for reduction in reductions(case.spec):
        _, expected = value_and_grad(case, student, teacher, target, reduction=reduction)
        s = student.clone().requires_grad_()
        loss = case(s, teacher, target, reduction=reduction)
        upstream = torch.ones_like(loss) if loss.dim() == 0 else None
        if upstream is None:
            upstream = torch.arange(1, loss.numel() + 1).to(loss) / 4 - 1
        with ThreadPoolExecutor(1) as pool:
            pool.submit(loss.backward, upstream).result()
        assert s.grad is not None and same_bits(s.grad, expected)

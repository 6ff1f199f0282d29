"""Memory: one gradient beside the inputs, nothing kept afterwards, nothing growing."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
from cases import Case, each, reductions, value_and_grad
from inputs import make
from torch import Tensor, nn

from benchmarks.gpu_clock import CudaClock


@pytest.fixture(autouse=True, scope="module")
def _small_heap() -> Iterator[None]:
    """Hide what other tests left from the collector: a collection then takes no time.

    Once a module, because the collection before it takes as long as ten tests.
    """
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def _peak(function: Callable[[], object], device: str) -> int:
    """The most bytes that ``function`` holds beyond what it found."""
    if device != "cpu":
        return CudaClock().peak(function)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        function()
    events = profile.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = peak = 0
    for _, nbytes in changes:
        held += nbytes
        peak = max(peak, held)
    return peak


# Triton's interpreter copies every tensor.


@each(
    kernels=True,
    dtype={"float32": torch.float32, "bfloat16": torch.bfloat16},
    keep=lambda case, dtype: not case.interpreted,
    shared=("dtype",),
)
def test_one_gradient(case: Case, dtype: torch.dtype) -> None:
    rows, classes = 512, 2048
    student, teacher, target = make("gaussian", rows, classes, dtype=dtype, device=case.device)
    size = student.numel() * student.element_size()
    small = 64 * (rows + classes) + 4096
    if case.device != "cpu" and not case.spec.by_row:
        small = size // 2  # the columns' moments over parts of so few rows
    student.requires_grad_()

    def forward() -> Tensor:
        return case(student, teacher, target, reduction=reduction)

    for reduction in reductions(case.spec):
        value_and_grad(case, student, teacher, target, reduction=reduction)  # fills the caches

        def step() -> None:
            loss = forward()
            torch.autograd.grad(loss, student, torch.ones_like(loss))

        peak = _peak(step, case.device)
        assert size <= peak <= size + small, f"{reduction}: {peak / size:.3f} gradients"
        with torch.no_grad():
            peak = _peak(forward, case.device)
        assert peak <= small, f"{reduction}, no_grad: {peak / size:.3f} gradients"


@each()
def test_nothing_survives_backward(case: Case) -> None:
    """Inputs, gradients and graph die with their last reference, also after an error."""
    for reduction in reductions(case.spec):
        student, teacher, target = make("gaussian", 4, 9, device=case.device)
        student = (student.requires_grad_() * 1.0).requires_grad_()
        loss = case(student, teacher, target, reduction=reduction)
        alive = [weakref.ref(x) for x in (student, teacher, loss)]
        loss.sum().backward()
        with pytest.raises(RuntimeError, match="backward"):
            loss.sum().backward()  # the graph is gone
        del student, teacher, target, loss
        gc.collect()
        assert [ref() for ref in alive] == [None, None, None]

    student, teacher, target = make("gaussian", 4, 9, device=case.device)
    alive = [weakref.ref(x) for x in (student, teacher)]
    with contextlib.suppress(ValueError):
        case(student, teacher[:2], target)
    del student, teacher, target
    gc.collect()
    assert [ref() for ref in alive] == [None, None]


@each()
def test_an_unused_loss_frees_its_gradient(case: Case) -> None:
    student, teacher, target = make("gaussian", 4, 9, device=case.device)
    student.requires_grad_()
    loss = case(student, teacher, target)
    graph = weakref.ref(loss)
    del loss
    gc.collect()
    assert graph() is None


@each()
def test_training_does_not_grow(case: Case) -> None:
    """The number of live tensors after ten and after thirty steps is the same."""
    torch.manual_seed(0)
    model = nn.Linear(6, 9).to(case.device)
    _, teacher, target = make("gaussian", 4, 9, device=case.device)
    features = torch.randn(4, 6, device=case.device)

    def train(steps: int) -> int:
        for _ in range(steps):
            model.zero_grad()
            case(model(features), teacher, target).backward()
        gc.collect()
        return sum(type(x) is Tensor for x in gc.get_objects())

    train(2)
    assert train(case.pick(30, 5)) == train(case.pick(10, 2))

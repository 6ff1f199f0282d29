"""What stands around a call changes nothing in it: autocast, torch's default device and dtype."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
import torch
from batches import EMBEDDING, EVERY, Call, batch, calls, graded, leaves, names
from torch import Tensor

from kdkernels import functional as K, nn

HALF_TYPES = (torch.bfloat16, torch.float16)
HALVES = pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)


def assert_equal(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)


def autocast(dtype: torch.dtype) -> AbstractContextManager[None]:
    return torch.autocast("cpu", dtype)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@calls()
@HALVES
def test_autocast_changes_no_bit(call: Call, dtype: torch.dtype) -> None:
    """Neither around the loss nor around its backward pass too."""
    # Half of the samples in each dtype, because a sample takes no other path in another dtype.
    first = HALF_TYPES.index(dtype) if len(call.samples) > 1 else 0
    for seed, sample in enumerate(call.samples[first::2], first):
        tensors = batch(call.spec, seed=seed)
        expected = graded(call, call.spec, tensors, **sample)
        with autocast(dtype):
            assert_equal(graded(call, call.spec, tensors, **sample), expected)


@calls(EMBEDDING, interpreted=False, reference=False)
def test_autocast_in_a_compiled_graph(call: Call) -> None:
    """The context inside of the graph, and the graph inside of the context: a dtype for each."""
    torch._dynamo.reset()
    tensors = batch(call.spec)
    expected = graded(torch.compile(call, fullgraph=True, backend="aot_eager"), call.spec, tensors)

    def around(*args: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return call(*args)

    torch._dynamo.reset()
    inside = torch.compile(around, fullgraph=True, backend="aot_eager")
    assert_equal(graded(inside, call.spec, tensors), expected)
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    count = leaves(call.spec)
    students = [x.clone().requires_grad_() for x in tensors[:count]]
    with autocast(torch.float16):
        loss = compiled(*students, *tensors[count:])
    assert_equal((loss.detach(), *torch.autograd.grad(loss, students)), expected)


@HALVES
def test_autocast_around_the_resizing(dtype: torch.dtype) -> None:
    student, teacher = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 9, 7)
    for backend in (None, "reference"):
        expected = K.pkd_loss(student, teacher, backend=backend)
        with autocast(dtype):
            assert torch.equal(K.pkd_loss(student, teacher, backend=backend), expected)


@HALVES
def test_autocast_around_the_parts(dtype: torch.dtype) -> None:
    embeddings, target = torch.randn(12, 6), torch.arange(12) % 3
    student, features = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    for part, args in (
        (K.class_centers, (embeddings, target, 4)),
        (K.semihard_tuples, (embeddings, target, 0.5)),
        (nn.reconstruction_loss, (student, features)),
    ):
        expected = part(*args)
        with autocast(dtype):
            assert_equal((part(*args),), (expected,))
    # Features that a model under autocast left in half precision are compared in float32.
    half = nn.reconstruction_loss(student.to(dtype), features.to(dtype))
    assert half.dtype == torch.float32
    wide = nn.reconstruction_loss(student.to(dtype).double(), features.to(dtype).double())
    assert (half - wide).abs() < 1e-6 * wide


@calls()
@pytest.mark.parametrize("device", ("meta", "cpu"))
def test_default_device(call: Call, device: str) -> None:
    """Everything that a loss allocates is on its inputs' device."""
    tensors = batch(call.spec)
    expected = graded(call, call.spec, tensors)
    with torch.device(device):
        assert_equal(graded(call, call.spec, tensors), expected)
        with torch.no_grad():
            assert call(*tensors).device.type == "cpu"


@calls()
@pytest.mark.parametrize("dtype", (torch.float64, torch.float16), ids=str)
def test_default_dtype(call: Call, dtype: torch.dtype) -> None:
    tensors = batch(call.spec)
    for sample in call.samples:
        expected = graded(call, call.spec, tensors, **sample)
        with default_dtype(dtype):
            assert_equal(graded(call, call.spec, tensors, **sample), expected)


def test_parts_have_their_inputs_device_and_dtype() -> None:
    embeddings, target = torch.randn(12, 6), torch.arange(12) % 3
    expected = K.class_centers(embeddings, target, 4)
    mined = K.semihard_tuples(embeddings, target, 0.5)
    with torch.device("meta"), default_dtype(torch.float64):
        assert_equal((K.class_centers(embeddings, target, 4),), (expected,))
        assert_equal((K.semihard_tuples(embeddings, target, 0.5),), (mined,))


@calls()
def test_one_float64_is_enough(call: Call) -> None:
    """Whichever input it is, the loss is computed in float64 from the values that were given."""
    tensors = batch(call.spec)
    wide = tuple(x.double() if x.is_floating_point() else x for x in tensors)
    for sample in call.samples:
        expected = graded(call, call.spec, wide, **sample)
        for i, name in enumerate(names(call.spec)):
            if not tensors[i].is_floating_point():
                continue
            mixed = [*tensors[:i], wide[i], *tensors[i + 1 :]]
            loss, *gradients = graded(call, call.spec, mixed, **sample)
            assert loss.dtype == torch.float64, name
            torch.testing.assert_close(loss, expected[0], rtol=1e-12, atol=0)
            for gradient, true, leaf in zip(gradients, expected[1:], mixed, strict=False):
                assert gradient.dtype == leaf.dtype
                error = (gradient - true).norm()
                # A float32 gradient is rounded once, at its end.
                assert error <= (1e-7 if leaf.dtype == torch.float32 else 1e-12) * true.norm(), name


def test_a_new_loss_is_covered() -> None:
    """The batches know every loss: all arguments filled, at least one student, no more."""
    for spec in EVERY:
        assert 0 < leaves(spec) < len(batch(spec)) == len(names(spec))
        assert all(x.device.type == "cpu" for x in batch(spec))

"""Streams, synchronisation, CUDA graphs, determinism, launches and several devices."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import LOSSES, Case, reductions, row_weights, same_bits
from gpu_support import (
    DEVICE,
    REHEARSAL,
    Captured,
    each_case,
    ignores,
    inputs,
    launched,
    long_kernel,
    needs_gpu,
    no_synchronization,
    on,
    one,
    pick,
    plan,
    shrink,
    side_stream,
    step,
    synchronize,
    wait_for,
)
from torch import Tensor

pytestmark = needs_gpu
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
SIZES = ((256, 100), (33, 8191), (20, 32000), (17, 50257), (2, 131072), (160, 27000))
"""On an H200 ``lanes``, ``cluster``, ``split``; DIST's ``columns``, ``stream`` and ``slices``."""
sizes = pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))


def same(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> bool:
    return all(same_bits(x, y) for x, y in zip(a, b, strict=True))


@sizes
@each_case(LOSSES)
def test_the_current_stream_is_used(case: Case, size: tuple[int, ...]) -> None:
    """Behind a long kernel on a side stream: who launches elsewhere reads NaN."""
    student, teacher, target = inputs(shrink(size), F32)
    leaf = student.clone().requires_grad_()
    expected = step(case, leaf, teacher, target)
    late = torch.full_like(student, math.nan).requires_grad_()
    synchronize()
    stream = side_stream()
    with on(stream):
        long_kernel()
        with torch.no_grad():
            late.copy_(student)
        actual = step(case, late, teacher, target)
        # The memory of what is dead may be taken by the next tensors of this stream.
        noise = [torch.full_like(student, math.nan) for _ in range(3)]
    synchronize()
    assert same(actual, expected) and len(noise) == 3


@each_case(LOSSES)
def test_backward_runs_on_the_stream_of_forward(case: Case) -> None:
    """Called from another stream; autograd lets the caller's stream wait for the gradient."""
    student, teacher, target = inputs(shrink((256, 1000)), F32)
    expected = step(case, student.clone().requires_grad_(), teacher, target)
    leaf = student.clone().requires_grad_()
    synchronize()
    stream = side_stream()
    with on(stream):
        long_kernel()
        loss = case(leaf, teacher, target)
    loss.backward()
    assert leaf.grad is not None
    doubled = leaf.grad * 2  # on the current stream
    wait_for(stream)
    synchronize()
    assert same((loss.detach(), doubled), (expected[0], expected[1] * 2))


@each_case(LOSSES)
def test_two_streams_share_nothing(case: Case) -> None:
    """Steps alternate on two streams; workspaces and gradients are freed while others run."""
    batches = [inputs(shrink((256, 100 + 37 * i)), F32, seed=i) for i in range(2)]
    leaves = [student.requires_grad_() for student, _, _ in batches]
    expected = [step(case, leaf, *batch[1:]) for leaf, batch in zip(leaves, batches, strict=True)]
    synchronize()
    streams = [side_stream() for _ in batches]
    results: list[Any] = [[], []]
    for turn in range(pick(40, 3)):
        for index, stream in enumerate(streams):
            with on(stream):
                if turn % 10 == 0:
                    long_kernel()
                results[index].append(step(case, leaves[index], *batches[index][1:]))
    synchronize()
    for got, wanted in zip(results, expected, strict=True):
        assert all(same(result, wanted) for result in got)


@pytest.mark.parametrize("dtype", (F32, F16, BF16), ids=str)
@each_case(LOSSES)
def test_nothing_synchronizes(case: Case, dtype: torch.dtype) -> None:
    """Forward and backward, all reductions, with and without ignored rows."""
    student, teacher, target = inputs(shrink((64, 1000)), dtype)
    target[2] = -100
    leaf = student.requires_grad_()
    for reduction in reductions(case.spec):
        options: dict[str, Any] = {"reduction": reduction}
        for masked in (False, True) if ignores(case) else (False,):
            if masked or case.spec.needs_target:
                options["target"] = target
            upstream = row_weights(case(leaf, teacher, target, **options).detach())
            args = (leaf, teacher, target)
            expected = step(case, *args, upstream=upstream, **options)
            with no_synchronization():
                actual = step(case, *args, upstream=upstream, **options)
                with torch.no_grad():
                    case(*args, **options)
            assert same(actual, expected)


@sizes
@pytest.mark.parametrize("dtype", (F32, F16, BF16), ids=str)
@each_case(LOSSES)
def test_cuda_graph(case: Case, dtype: torch.dtype, size: tuple[int, ...]) -> None:
    """Captured forward and backward, replayed with new data in the same places."""
    student, teacher, target = inputs(shrink(size), dtype)
    leaf = student.clone().requires_grad_()
    upstream = one()
    captured = Captured(lambda: step(case, leaf, teacher, target, upstream=upstream))
    for seed in range(3):
        batch = inputs(shrink(size), dtype, seed=seed + 5)
        with torch.no_grad():
            for mine, new in zip((leaf, teacher, target), batch, strict=True):
                mine.copy_(new)
        upstream.fill_(1.0 - 1.5 * seed)
        actual = tuple(x.clone() for x in captured.replay())
        fresh = batch[0].clone().requires_grad_()
        expected = step(case, fresh, *batch[1:], upstream=upstream.clone())
        synchronize()
        assert actual[1].any()
        assert same(actual, expected)


@pytest.mark.parametrize("reduction", ("sum", "none"))
@each_case(LOSSES, ["native"])
def test_cuda_graph_of_other_reductions(case: Case, reduction: str) -> None:
    if reduction not in reductions(case.spec):
        pytest.skip("DIST has no value for each row")
    student, teacher, target = inputs(shrink((64, 1000)), F32)
    leaf = student.clone().requires_grad_()
    shape = target.shape if reduction == "none" else ()
    upstream = torch.full(shape, -2.5, device=DEVICE)
    options = {"reduction": reduction, "upstream": upstream}
    captured = Captured(lambda: step(case, leaf, teacher, target, **options))
    batch = inputs(shrink((64, 1000)), F32, seed=9)
    with torch.no_grad():
        for mine, new in zip((leaf, teacher, target), batch, strict=True):
            mine.copy_(new)
    actual = tuple(x.clone() for x in captured.replay())
    expected = step(case, batch[0].requires_grad_(), *batch[1:], **options)
    assert same(actual, expected)


@sizes
@pytest.mark.parametrize("dtype", (F32, BF16), ids=str)
@each_case(LOSSES)
def test_the_same_bits_again(case: Case, dtype: torch.dtype, size: tuple[int, ...]) -> None:
    """Thirty launches, some while others run, and some behind an idle device."""
    student, teacher, target = inputs(shrink(size), dtype)
    leaf = student.requires_grad_()
    first = step(case, leaf, teacher, target)
    for turn in range(pick(30, 3)):
        if turn % 3 == 0:
            synchronize()
        assert same(step(case, leaf, teacher, target), first)


@pytest.mark.parametrize("elements", (15, 1000, 2**20 + 3))
@pytest.mark.parametrize("dtype", (F32, BF16), ids=str)
@each_case(LOSSES)
def test_upstream_gradients(case: Case, dtype: torch.dtype, elements: int) -> None:
    """The stored gradient is scaled on the device: by 1 not at all, by anything else exactly."""
    size = shrink((max(1, elements // 1000), min(elements, 1000)))
    student, teacher, target = inputs(size, dtype)
    leaf = student.requires_grad_()
    _, gradient = step(case, leaf, teacher, target, upstream=one())
    _, again = step(case, leaf, teacher, target, upstream=None)
    assert same_bits(gradient, again)
    for factor in (-2.5, 0.0, 4.0, 2.0**-20):
        _, scaled = step(case, leaf, teacher, target, upstream=one() * factor)
        expected = (gradient.double() * factor).to(dtype)
        torch.testing.assert_close(scaled, expected, rtol=1e-6 if dtype == F32 else 1e-2, atol=0)
    wide = torch.tensor(-2.5, dtype=torch.float64, device=DEVICE)
    loss = case(leaf, teacher, target)
    loss.backward(wide.to(loss.dtype), retain_graph=True)
    assert leaf.grad is not None
    before, leaf.grad = leaf.grad, None
    loss.backward(wide.to(loss.dtype))  # recomputed
    assert leaf.grad is not None and same_bits(before, leaf.grad)


@pytest.mark.parametrize("masked", (False, True))
@sizes
@each_case(LOSSES, ["native"])
def test_at_most_two_launches(case: Case, size: tuple[int, ...], masked: bool) -> None:
    """Forward and backward of a scalar loss; no copies, no fills. DIST's ``slices``, for problems
    of many megabytes, are three themselves."""
    student, teacher, target = inputs(shrink(size), F32)
    options: dict[str, Any] = {"upstream": one()}
    if masked:
        if not ignores(case):
            pytest.skip("compiled kernels of this loss ignore no rows")
        target[0] = -100
        options["target"] = target
    leaf = student.requires_grad_()
    names = launched(lambda: step(case, leaf, teacher, target, **options))
    slices = case.spec.name == "dist" and plan("correlation", size, F32) == "slices"
    assert len(names) <= (4 if slices else 2), names
    if not REHEARSAL:
        assert not any(n.startswith(("Memcpy", "Memset")) or "Fill" in n for n in names), names
    half, other = student.detach().half().requires_grad_(), teacher.half()
    names = launched(lambda: step(case, half, other, target, **options))
    slices = case.spec.name == "dist" and plan("correlation", size, F16) == "slices"
    assert len(names) <= (6 if slices else 2), names


@each_case(LOSSES, ["native"])
def test_a_graph_beside_the_stream_that_it_was_captured_from(case: Case) -> None:
    """Replayed on one stream while the same step runs on others: no counter is shared."""
    student, teacher, target = inputs(shrink((256, 1000)), F32)
    leaf, upstream = student.requires_grad_(), one()

    def body() -> tuple[Tensor, Tensor]:
        return step(case, leaf, teacher, target, upstream=upstream)

    graphs, expected = [Captured(body) for _ in range(2)], body()
    synchronize()
    streams = [side_stream() for _ in range(3)]
    results: list[Any] = []
    for _ in range(pick(200, 2)):
        for stream, run in zip(streams, (graphs[0].replay, graphs[1].replay, body), strict=True):
            with on(stream):
                results.append(tuple(x.clone() for x in run()))
    synchronize()
    assert all(same(result, expected) for result in results)


@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
@each_case(LOSSES)
def test_empty_batches(case: Case, reduction: str) -> None:
    if reduction not in reductions(case.spec):
        pytest.skip("DIST has no value for each row")
    student, teacher, target = inputs((0, 9), F32)
    leaf = student.requires_grad_()
    loss = case(leaf, teacher, target, reduction=reduction)
    assert loss.shape == ((0,) if reduction == "none" else ()) and not loss.any()
    loss.sum().backward()
    assert leaf.grad is not None and leaf.grad.shape == (0, 9)


@sizes
@each_case([spec for spec in LOSSES if spec.by_row])
def test_all_rows_ignored(case: Case, size: tuple[int, ...]) -> None:
    for reduction in reductions(case.spec):
        student, teacher, target = inputs(shrink(size), F32)
        leaf = student.fill_(math.nan).requires_grad_()
        target.fill_(-100)
        loss = case(leaf, teacher, reduction=reduction, target=target)
        loss.sum().backward()
        assert not loss.any() and leaf.grad is not None and not leaf.grad.any()


@each_case(LOSSES)
def test_another_device_than_the_current_one(case: Case) -> None:
    if REHEARSAL or torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    student, teacher, target = inputs((64, 1000), F32)
    expected = step(case, student.clone().requires_grad_(), teacher, target)
    away = [x.to("cuda:1") for x in (student, teacher, target)]
    actual = step(case, away[0].requires_grad_(), *away[1:])
    assert actual[1].device.index == 1 and torch.cuda.current_device() == 0
    assert same(tuple(x.to("cuda:0") for x in actual), expected)
    with pytest.raises((ValueError, RuntimeError)):
        case(student, teacher.to("cuda:1"), target)

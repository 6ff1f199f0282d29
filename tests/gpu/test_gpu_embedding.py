"""IE-KD and REFILLED's tuples on a GPU: values, gradients, streams, graphs, determinism."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import same_bits
from gpu_support import (
    DEVICE,
    KERNELS,
    Captured,
    cases,
    needs_gpu,
    no_synchronization,
    pick,
    specs as named,
)
from torch import Tensor

from kdkernels.registry import SPECS

pytestmark = needs_gpu
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}
IEKD_SHAPES = ((8, 64), (128, 64, 8, 8), (33, 1000), (3, 70001), (2, 16, 128, 128))
TUPLES = ((64, 32, 5), (256, 128, 10), (256, 128, 100), (100, 515, 7))


def both(names: tuple[str, ...] = KERNELS) -> Any:
    """A parameter for each backend of the two losses."""
    return pytest.mark.parametrize("case", cases(named("iekd", "tuple_matching"), names))


def run(
    loss_of: Callable[..., Tensor], students: tuple[Tensor, ...], constants: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    leaves = [x.detach().clone().requires_grad_() for x in students]
    loss = loss_of(*leaves, *constants)
    return (loss.detach(), *torch.autograd.grad(loss, leaves))


def factors(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Any:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    made = torch.randn((3, *shape), generator=generator, device=DEVICE).to(dtype)
    return (made[0], made[1]), (made[2],)


def embeddings(size: tuple[int, int, int], dtype: torch.dtype, seed: int = 0) -> Any:
    rows, width, classes = size
    generator = torch.Generator(DEVICE).manual_seed(seed)
    student, teacher = torch.randn((2, rows, width), generator=generator, device=DEVICE).to(dtype)
    target = torch.randint(classes, (rows,), generator=generator, device=DEVICE)
    return (student,), (teacher, target)


def judge(case: Any, students: Any, constants: Any, dtype: torch.dtype, **options: Any) -> None:
    spec = case.spec
    mine = functools.partial(spec.function, backend=case.backend, **options)
    reference = functools.partial(spec.function, backend="reference", **options)
    actual = run(mine, students, constants)
    wide = tuple(x.double() if x.is_floating_point() else x for x in constants)
    expected = run(reference, tuple(x.double() for x in students), wide)
    bound = TOLERANCE[dtype]
    for a, b in zip(actual, expected, strict=True):
        assert a.shape == b.shape and torch.isfinite(a).all()
        error = (a.double() - b).norm().item()
        assert error <= bound * b.norm().item(), f"{error / b.norm().item():.2e} > {bound:.0e}"
    assert all(bool(g.any()) for g in expected[1:])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", IEKD_SHAPES, ids=str)
@pytest.mark.parametrize("similarity", ("l1", "cosine"))
@pytest.mark.parametrize("case", cases([SPECS["iekd"]]))
def test_factors(case: Any, similarity: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    shape = pick(shape, tuple(min(n, 6) for n in shape))
    judge(case, *factors(shape, dtype), dtype, similarity=similarity)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
@pytest.mark.parametrize("size", TUPLES, ids=str)
@pytest.mark.parametrize("case", cases([SPECS["tuple_matching"]]))
def test_tuples(case: Any, size: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Mining decides at the edge of a band: in half precision another member may be taken."""
    size = pick(size, (12, 6, 3))
    judge(case, *embeddings(size, dtype), dtype)


def make(case: Any, seed: int = 0) -> Any:
    if case.spec.name == "iekd":
        return factors(pick((32, 64, 8, 8), (4, 4, 2, 2)), torch.float32, seed)
    return embeddings(pick((128, 64, 10), (12, 6, 3)), torch.float32, seed)


@both()
def test_determinism_streams_and_synchronization(case: Any) -> None:
    students, constants = make(case)
    loss_of = functools.partial(case.spec.function, backend=case.backend)
    first = run(loss_of, students, constants)
    upstream = torch.ones_like(first[0])
    for _ in range(pick(20, 2)):
        assert all(map(same_bits, run(loss_of, students, constants), first))
    leaves = [x.clone().requires_grad_() for x in students]
    with no_synchronization():
        loss = loss_of(*leaves, *constants)
        gradients = torch.autograd.grad(loss, leaves, upstream)
    assert all(map(same_bits, (loss.detach(), *gradients), first))


@both()
def test_cuda_graph(case: Any) -> None:
    students, constants = make(case)
    loss_of = functools.partial(case.spec.function, backend=case.backend)
    leaves = [x.clone().requires_grad_() for x in students]
    upstream = torch.ones((), device=DEVICE)

    def body() -> tuple[Tensor, ...]:
        loss = loss_of(*leaves, *constants)
        return (loss.detach(), *torch.autograd.grad(loss, leaves, upstream))

    captured = Captured(body)
    others, fresh = make(case, seed=3)
    with torch.no_grad():
        for mine, new in zip((*leaves, *constants), (*others, *fresh), strict=True):
            mine.copy_(new)
    assert all(map(same_bits, captured.replay(), run(loss_of, others, fresh)))


@both(("native",))
def test_compiled(case: Any) -> None:
    students, constants = make(case)
    loss_of = functools.partial(case.spec.function, backend=case.backend)
    torch.compiler.reset()
    compiled = torch.compile(loss_of, fullgraph=True, backend=pick("inductor", "aot_eager"))
    for a, b in zip(run(compiled, students, constants), run(loss_of, students, constants),
                    strict=True):  # fmt: skip
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)

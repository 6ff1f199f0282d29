"""Clustered rows on the emulated device where a cluster walks several rows.

The next row's copies come to the places that this row's last sweep leaves; a device with few
multiprocessors has fewer clusters than rows. Rows may begin and end anywhere: copies bring in their
whole packs, threads the classes around these.
"""

from __future__ import annotations

import ctypes
from typing import Any

import cuda_emulator
import pytest
import torch
import toy
from cases import same_bits
from inputs import make
from test_cuda_kernels import OPTIONS, ROW_RULES, against_reference, close
from torch import Tensor

from kdkernels.registry import SPECS

pytestmark = pytest.mark.skipif(
    cuda_emulator.compiler() is None, reason="the emulator needs a C++ compiler"
)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ONE = {**cuda_emulator.SMALL, "multiprocessors": 1}
SIZES = ((40, 40), (11, 4104), (13, 20008))


def clustered(rule: str, inputs: tuple[Tensor, ...], seed: int = 1) -> tuple[Tensor, Tensor]:
    scale = 16.0 if SPECS[rule].t_squared else 1.0
    options = {"scale": scale, "traversal": "cluster", "device": ONE, "seed": seed}
    loss, gradient, _ = cuda_emulator.row_loss(rule, *inputs, OPTIONS[rule], **options)
    assert gradient is not None
    return loss, gradient


@pytest.mark.parametrize("rule", ROW_RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_next_row_comes_in_the_place_of_this_one(
    rule: str, dtype: torch.dtype, size: tuple[int, int]
) -> None:
    student, teacher, target = make("gaussian", *size, dtype=dtype)
    ignored = [1, 5, 6, size[0] - 1]  # of which nothing is copied
    target[ignored] = -100
    student[ignored] = float("nan")
    loss, gradient = clustered(rule, (student, teacher, target))
    expected_loss, expected = against_reference(rule, student, teacher, target)
    torch.testing.assert_close(loss.double(), expected_loss, rtol=2e-6, atol=0)
    close(gradient, expected)
    assert not gradient[ignored].any()


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_rows_of_a_cluster_do_not_depend_on_the_schedule(size: tuple[int, int]) -> None:
    inputs = make("gaussian", *size)
    first = clustered("dkd", inputs)
    for seed in range(2, 6):
        other = clustered("dkd", inputs, seed=seed)
        assert all(same_bits(a, b) for a, b in zip(first, other, strict=True))


LAYOUTS = {"odd": (0, 1), "shifted": (3, 8), "padded": (0, 16), "shifted_odd": (5, 3)}
"""Elements before the first row, and what the distance between rows is a multiple of."""


def laid(x: Tensor, start: int, unit: int, around: float) -> Tensor:
    """The rows in a storage whose other elements are ``around``."""
    rows, classes = x.shape
    pitch = -(-classes // unit) * unit
    storage = torch.full((start + rows * pitch + 16,), around, dtype=x.dtype)
    return storage.as_strided((rows, classes), (pitch, 1), start).copy_(x)


def kept(x: Tensor, around: float) -> bool:
    """Whether all of the storage around the rows is as it was."""
    storage = x.as_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,), 0).clone()
    storage.as_strided(x.shape, x.stride(), x.storage_offset()).fill_(around)
    return bool((storage == around).all())


def device_of(cluster: int, classes: int, dtype: torch.dtype) -> dict[str, int]:
    """One multiprocessor, on which clusters of so many blocks are the smallest that fit thrice."""
    slice_bytes = 2 * 16 * -(-classes * dtype.itemsize // (16 * cluster))
    room = 8192 + 128 + 1024 + slice_bytes
    return {**ONE, "block_shared": 3 * room - 1024, "most_cluster": cluster}


def wide_reference(rule: str, *inputs: Tensor) -> tuple[Tensor, Tensor]:
    if rule in OPTIONS:
        return against_reference(rule, *inputs)
    student, teacher, target = inputs
    valid = target != -100
    wide = student.double().requires_grad_()
    rows = wide[valid], teacher[valid].double()
    if rule == "toy":
        loss = toy.toy(*rows, toy.OPTIONS, 4.0).mean()
    else:
        loss = toy.toy_decoupled(*rows, target[valid], toy.OPTIONS, 4.0).mean()
    (gradient,) = torch.autograd.grad(loss, wide)
    return loss.detach(), gradient


def run_laid(
    rule: str, layout: str, cluster: int, *inputs: Tensor, **keywords: Any
) -> tuple[Tensor, Tensor]:
    """Loss and gradient of rows that lie alike in three storages, of which nothing else is used."""
    start, unit = LAYOUTS[layout]
    student, teacher, target = inputs
    laid_out = [laid(x, start, unit, float("nan")) for x in (student, teacher)]
    gradient = laid(torch.full_like(student, float("nan")), start, unit, 7.0)
    scale = 16.0 if rule in OPTIONS and SPECS[rule].t_squared else 1.0
    options = {"scale": scale, "device": device_of(cluster, student.shape[1], student.dtype)}
    numbers = OPTIONS.get(rule, toy.OPTIONS)
    arguments = {"gradient": gradient, **options, **keywords}
    call, loss, _ = cuda_emulator.row_call(*laid_out, target, numbers, **arguments)
    call.plan[0] = cuda_emulator.TRAVERSALS.index("cluster")
    library = cuda_emulator.library()
    cuda_emulator.raise_error(library.emulate_row(rule.encode(), ctypes.byref(call)))
    assert (call.plan[0], call.plan[5]) == (2, cluster)
    assert kept(gradient, 7.0)
    return loss, gradient


@pytest.mark.parametrize("rule", [*ROW_RULES, "toy", "toy_decoupled"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_begin_and_end_anywhere(rule: str, dtype: torch.dtype, layout: str) -> None:
    """Targets, and rows that are ignored, at every place of a pack."""
    shapes = (1, 26, 2051), (2, 20, 4101), (4, 19, 4099), (16, 9, 8197)
    turn = [*LAYOUTS].index(layout) + DTYPES.index(dtype)
    for cluster, rows, classes in shapes[turn % 2 :: 2]:
        student, teacher, target = make("gaussian", rows, classes, dtype=dtype)
        target[::3] = torch.arange(len(target[::3])) % 8
        target[1::3] = classes - 1 - torch.arange(len(target[1::3])) % 8
        ignored = [2, 5, 6, rows - 1]
        target[ignored] = -100
        student[ignored] = float("nan")
        loss, gradient = run_laid(rule, layout, cluster, student, teacher, target)
        expected_loss, expected = wide_reference(rule, student, teacher, target)
        torch.testing.assert_close(loss.double(), expected_loss, rtol=5e-6, atol=0)
        close(gradient, expected)
        assert not gradient[ignored].any()


@pytest.mark.parametrize("classes", [2, 3, 7, 8, 9, 15, 17, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_of_hardly_a_pack(classes: int, dtype: torch.dtype) -> None:
    for rule in "kd", "dkd":
        student, teacher, target = make("gaussian", 17, classes, dtype=dtype)
        loss, gradient = run_laid(rule, "odd", 1, student, teacher, target)
        expected_loss, expected = wide_reference(rule, student, teacher, target)
        torch.testing.assert_close(loss.double(), expected_loss, rtol=1e-5, atol=1e-9)
        close(gradient, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_around_the_packs_count(dtype: torch.dtype) -> None:
    """Where they are the largest by so much that a sum that began elsewhere overflows, and where
    all others are masked."""
    for value in (900.0, 3e4), (-torch.inf, 0.0):
        student, teacher, target = make("gaussian", 18, 2051, dtype=dtype)
        for x in student, teacher:
            edges = torch.tensor([0, 1, 2, 2048, 2049, 2050])
            before = x[:, edges].clone()
            if value[0] < 0:
                x.fill_(value[0])
                x[:, edges] = before
            else:
                x[torch.arange(18), edges[torch.arange(18) % 6]] = value[1]
                x[::2, 0] = x[1::2, 2050] = value[0]
        for rule in "kd", "aekt", "dkd":
            if value[0] < 0:
                target = torch.arange(18) % 3
            loss, gradient = run_laid(rule, "odd", 2, student, teacher, target)
            expected_loss, expected = wide_reference(rule, student, teacher, target)
            torch.testing.assert_close(loss.double(), expected_loss, rtol=5e-6, atol=1e-9)
            close(gradient, expected)


def test_an_ignored_class_outside_of_the_packs_has_no_gradient() -> None:
    """Its row's gradient is 0 there too, although the target's class counts as excluded."""
    student, teacher, target = make("gaussian", 12, 2051)
    for ignored in 0, 1, 2, 2048, 2049, 2050:
        target[:] = (ignored + 5) % 2051
        target[3:9] = ignored
        _, gradient = run_laid("dkd", "odd", 2, student, teacher, target, ignore_index=ignored)
        assert not gradient[3:9].any() and gradient[:3].ne(0).all()


def test_a_loss_without_a_gradient() -> None:
    inputs = make("gaussian", 12, 4101)
    for rule in ROW_RULES:
        options = {"device": device_of(2, 4101, torch.float32), "traversal": "cluster"}
        alone, nothing, _ = cuda_emulator.row_loss(
            rule, *inputs, OPTIONS[rule], need_gradient=False, **options
        )
        assert nothing is None
        loss, _, _ = cuda_emulator.row_loss(rule, *inputs, OPTIONS[rule], **options)
        assert same_bits(alone, loss)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_odd_rows_do_not_depend_on_the_schedule(dtype: torch.dtype) -> None:
    inputs = make("gaussian", 20, 4101, dtype=dtype)
    first = run_laid("dkd", "odd", 4, *inputs)
    for seed in range(2, 6):
        other = run_laid("dkd", "odd", 4, *inputs, seed=seed)
        assert all(same_bits(a, b) for a, b in zip(first, other, strict=True))


def test_clusters_take_rows_that_begin_alike() -> None:
    """In the three tensors, modulo 16 bytes; the others are read as they were."""

    def chosen(student: Tensor, teacher: Tensor, gradient: Tensor | None = None) -> str:
        how = {"gradient": gradient, "class_dim": -1}
        return cuda_emulator.row_loss("kd", student, teacher, None, [], **how)[2]

    x, y, _ = make("gaussian", 6, 2051)
    spaced = laid(x, 0, 4, float("nan"))
    assert chosen(x, y) == "cluster"
    assert chosen(*(laid(z, 2, 1, 0.0) for z in (x, y, x))) == "cluster"
    assert chosen(*(laid(z, 2, 1, 0.0) for z in (x, y)), torch.empty_like(x)) == "block"
    assert chosen(x, laid(y, 1, 1, 0.0)) == "block"
    assert chosen(spaced, laid(y, 0, 4, 0.0), laid(x, 0, 4, 0.0)) == "cluster"
    assert chosen(spaced, y) == "block"
    assert chosen(x[:1], spaced[:1]) == "cluster"
    assert chosen(x, y[:1].expand(6, -1)) == "block"
    # Tokens of several sequences, all or without the last: the distance between rows is not one.
    tokens, others = (z.view(2, 3, 2051) for z in (x, y))
    assert chosen(tokens, others) == "cluster"
    assert chosen(tokens[:, :-1], others[:, :-1]) == "block"
    assert chosen(tokens[:, :-1], others[:, :-1], tokens.clone()[:, :-1]) == "block"

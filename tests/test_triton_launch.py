"""Triton launch choices are sound for every size, and no block size changes the result."""

from __future__ import annotations

import inspect
import os

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the package triton is not installed")

import kdkernels.functional as F
from kdkernels.triton import launch as choices, layout, rules
from kdkernels.triton.launch import LIMITS, Limits

CLASSES = sorted(
    {c for power in range(19) for c in (2**power - 1, 2**power, 2**power + 1) if c > 0}
    | {10, 19, 150, 1000, 21841, 50257, 128256, 151936}
)
ROWS = (1, 2, 3, 64, 1000, 65537, 10**6, 2**31 + 1)
SMALL = (Limits(4, 4, 16, 4), Limits(2, 1, 2, 1), Limits(16, 8, 64, 2), Limits(8, 2, 1024, 16))
"""Blocks that cut a row of 9 classes into several pieces, or not."""


def _is_power_of_two(value: int) -> bool:
    return value > 0 and value & (value - 1) == 0


@pytest.mark.parametrize("itemsize", [4, 8])
@pytest.mark.parametrize("limits", [LIMITS, *SMALL])
def test_row_launch(limits: Limits, itemsize: int) -> None:
    for classes in CLASSES:
        config = choices.row_launch(classes, itemsize, limits)
        assert _is_power_of_two(config.block) and _is_power_of_two(config.rows)
        assert _is_power_of_two(config.num_warps) and config.num_warps <= 16
        assert config.resident == (config.block >= classes)
        assert config.resident or config.rows == 1
        largest = max(limits.resident, limits.streamed, limits.tile)
        assert config.rows * config.block * itemsize <= largest * 4 or config.block == 1


@pytest.mark.parametrize("itemsize", [4, 8])
@pytest.mark.parametrize("limits", [LIMITS, *SMALL])
def test_column_launch_covers_every_row_once(limits: Limits, itemsize: int) -> None:
    for classes in CLASSES:
        for rows in ROWS:
            config = choices.column_launch(rows, classes, itemsize, limits)
            assert _is_power_of_two(config.block) and _is_power_of_two(config.rows)
            assert config.chunk_rows % config.rows == 0
            assert (config.chunks - 1) * config.chunk_rows < rows
            assert rows <= config.chunks * config.chunk_rows
            programs = config.chunks * -(-classes // config.block)
            assert programs < 2**31
            assert config.chunks == 1 or programs <= choices.PROGRAMS
            combine = choices.combine_launch(config.chunks, classes, itemsize, limits)
            assert _is_power_of_two(combine.block) and _is_power_of_two(combine.rows)


def test_scale_launch_fits_a_grid() -> None:
    for size in (1, 2047, 2048, 2049, 10**6, 2**40):
        config = choices.scale_launch(size)
        assert 1 <= config.programs <= choices.PROGRAMS
        assert _is_power_of_two(config.block)


def test_a_row_is_summed_alike_in_any_batch() -> None:
    """Nothing about the batch enters the choice, so that a row's bits do not depend on it."""
    names = inspect.signature(choices.row_launch).parameters
    assert set(names) == {"classes", "itemsize", "limits"}


@pytest.mark.parametrize(
    ("shape", "class_dim", "strides", "levels"),
    [
        ((6, 9), 1, (9, 1), 1),
        ((2, 3, 9), 2, (27, 9, 1), 1),
        ((2, 9, 3, 4), 1, (108, 12, 4, 1), 2),
        ((2, 9, 3, 4), 1, (108, 1, 36, 9), 1),
        ((2, 9, 1, 1), 1, (9, 1, 1, 1), 1),
        ((1, 9, 3, 4), 1, (108, 12, 4, 1), 1),
        ((5, 9), 1, (0, 1), 1),
        ((2, 9, 4, 3), 1, (108, 12, 1, 4), None),
    ],
)
def test_rows_collapse_to_two_levels(
    shape: tuple[int, ...], class_dim: int, strides: tuple[int, ...], levels: int | None
) -> None:
    rows = layout.collapse(shape, [strides], class_dim)
    if levels is None:
        assert rows is None
        return
    assert rows is not None
    assert rows.two_level == (levels == 2)
    index = torch.arange(rows.rows)
    outer, inner, classes = rows.strides[0]
    start = index // rows.inner * outer + index % rows.inner * inner
    size = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    storage = torch.arange(size)
    expected = (
        storage.as_strided(shape, strides).movedim(class_dim, -1).reshape(-1, shape[class_dim])
    )
    actual = storage[start.unsqueeze(-1) + classes * torch.arange(shape[class_dim])]
    assert torch.equal(actual, expected)


def _device() -> str:
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    pytest.skip("needs TRITON_INTERPRET=1 or a GPU")


def _run(
    name: str, backend: str, student: Tensor, teacher: Tensor, **options: object
) -> list[Tensor]:
    leaf = student.detach().clone().requires_grad_()
    if name == "dkd":
        options["target"] = torch.arange(student.shape[0], device=student.device) % 9
    loss = getattr(F, f"{name}_loss")(leaf, teacher, backend=backend, **options)
    loss.backward()
    return [loss.detach(), leaf.grad]


@pytest.mark.parametrize("limits", SMALL)
@pytest.mark.parametrize(
    ("name", "options"),
    [("dkd", {}), ("kd", {"standardize": True}), ("dist", {})],
)
def test_block_size_does_not_matter(
    monkeypatch: pytest.MonkeyPatch, name: str, options: dict[str, object], limits: Limits
) -> None:
    device = _device()
    assert name in rules("divergence") | rules("decoupled") | rules("correlation")
    monkeypatch.setattr(choices, "LIMITS", limits)
    generator = torch.Generator().manual_seed(0)
    rows = 21 if name == "dist" else 7  # columns of several tiles; rows are programs of their own
    student = torch.randn(rows, 9, dtype=torch.float64, generator=generator).mul(2).to(device)
    teacher = torch.randn(rows, 9, dtype=torch.float64, generator=generator).mul(2).to(device)
    student[3, :4] = student[4, 8:] = -20.0
    if "standardize" not in options:
        # Blocks with nothing in them, at either end of the row, must not become NaN.
        student[1, :4] = teacher[1, :4] = teacher[2, :4] = -torch.inf
        student[5, 8:] = teacher[5, 8:] = teacher[6, 4:] = -torch.inf
    actual = _run(name, "triton", student, teacher, **options)
    expected = _run(name, "reference", student, teacher, **options)
    assert expected[1].abs().max() > 0
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-13)


def test_columns_in_several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    device = _device()
    monkeypatch.setattr(choices, "LIMITS", SMALL[0])
    monkeypatch.setattr(choices, "PROGRAMS", 12)
    config = choices.column_launch(50, 9, 8)
    assert config.chunks == 4 and config.chunk_rows > config.rows
    generator = torch.Generator().manual_seed(1)
    student = torch.randn(50, 9, dtype=torch.float64, generator=generator).to(device)
    teacher = torch.randn(50, 9, dtype=torch.float64, generator=generator).to(device)
    student[:, 0] -= 12.0  # a small column beside large ones
    actual = _run("dist", "triton", student, teacher)
    expected = _run("dist", "reference", student, teacher)
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-13)

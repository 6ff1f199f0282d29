"""Launch choices as pure functions of sizes; no autotuning, no device query.

They depend on the number of classes and on the width of the accumulator, never on the number of
rows where that could change the order of a row's sums: a row's bits do not depend on its batch.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

FUSE_MULTIPLY_ADD = False
"""Contraction to fma would round one of two equal products and not the other, so that equal rows
would not give exactly 0; the kernels wait for memory anyway. Triton's default depends on its
version.
"""
OPTIONS: dict[str, Any] = {"enable_fp_fusion": FUSE_MULTIPLY_ADD}


class Limits(NamedTuple):
    """Elements in one program's block, for a 4-byte accumulator (half as many for 8 bytes).

    ``resident``: the longest row that stays in registers. ``streamed``: block of a longer row;
    above 4096 the two inputs' blocks start to spill. ``tile``: rows x classes when several rows
    share a program. ``columns``: classes of a tile of the column sums.
    """

    resident: int = 8192
    streamed: int = 4096
    tile: int = 1024
    columns: int = 128


LIMITS = Limits()
"""Replaced by tests, so that rows of a few classes take several blocks."""


class RowLaunch(NamedTuple):
    """``rows`` whole rows a program, in blocks of ``block`` classes."""

    resident: bool
    rows: int
    block: int
    num_warps: int


class ColumnLaunch(NamedTuple):
    """Tiles of ``rows`` x ``block``; each of a block's ``chunks`` programs walks ``chunk_rows``."""

    rows: int
    block: int
    chunk_rows: int
    chunks: int
    num_warps: int


class FlatLaunch(NamedTuple):
    programs: int
    block: int
    num_warps: int


def power_of_two(value: int) -> int:
    """The smallest power of two that is not smaller."""
    return 1 << max(value - 1, 0).bit_length()


def _warps(elements: int, a_thread: int = 16) -> int:
    """Enough elements a thread for loads in flight, few enough that nothing spills."""
    return min(max(power_of_two(elements) // (32 * a_thread), 1), 16)


def row_launch(classes: int, itemsize: int, limits: Limits | None = None) -> RowLaunch:
    """How a row of ``classes`` is walked with accumulators of ``itemsize`` bytes.

    Loops, and several rows in a program, take registers: fewer elements a thread.
    """
    limits = limits or LIMITS
    share = max(itemsize // 4, 1)
    block = power_of_two(classes)
    if block > max(limits.resident // share, 1):
        block = max(limits.streamed // share, 1)
        return RowLaunch(False, 1, block, _warps(block * share, 8 * share))
    rows = max(limits.tile // share // block, 1)
    return RowLaunch(True, rows, block, _warps(rows * block * share, 8 if rows > 1 else 16))


PROGRAMS = 2048
"""Enough programs to fill any GPU several times over."""


def column_launch(
    rows: int, classes: int, itemsize: int, limits: Limits | None = None
) -> ColumnLaunch:
    """How the columns of (rows, classes) are summed."""
    limits = limits or LIMITS
    share = max(itemsize // 4, 1)
    block = min(power_of_two(classes), limits.columns)
    tile = max(limits.tile * 2 // share // block, 1)
    tiles = -(-rows // tile)
    wanted = max(PROGRAMS // -(-classes // block), 1)
    warps = _warps(tile * block * share, 8)
    chunk_rows = -(-tiles // min(tiles, wanted)) * tile
    return ColumnLaunch(tile, block, chunk_rows, -(-rows // chunk_rows), warps)


def combine_launch(
    chunks: int, classes: int, itemsize: int, limits: Limits | None = None
) -> RowLaunch:
    """How the chunks' column sums are combined: ``rows`` chunks x ``block`` classes at a time."""
    limits = limits or LIMITS
    block = min(power_of_two(classes), 16)
    rows = min(power_of_two(chunks), max(limits.tile * 4 // itemsize // block, 1))
    return RowLaunch(True, rows, block, _warps(rows * block * itemsize // 4))


def scale_launch(size: int) -> FlatLaunch:
    """Few programs that loop: when there is nothing to do, only their start costs time."""
    block = 2048
    return FlatLaunch(min(-(-size // block), PROGRAMS), block, 8)


def accumulator(*dtypes: torch.dtype) -> tl.dtype:
    """The accumulation dtype: float64 if any is, else float32."""
    return tl.float64 if torch.float64 in dtypes else tl.float32


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Make the tensor's device current, as Triton launches on the current one."""
    kind = tensor.device.type
    if kind == "cpu":
        return nullcontext()
    return torch.get_device_module(kind).device(tensor.device)

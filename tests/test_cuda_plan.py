"""The launches of csrc/cuda: every choice is legal on every device, and the intended one."""

from __future__ import annotations

import pytest
import torch

from kdkernels import native

module = native.extension()
pytestmark = pytest.mark.skipif(module is None, reason=native.reason() or "-")

DEVICES = {
    "A100": (80, 108, 166912, 0),
    "RTX3090": (86, 82, 101376, 0),
    "RTX4090": (89, 128, 101376, 0),
    "H200": (90, 132, 232448, 16),
    "H200 slice": (90, 16, 232448, 4),
    "B200": (100, 148, 232448, 16),
    "RTX5090": (120, 170, 101376, 8),
    "one": (80, 1, 101376, 0),
}
"""Architecture, multiprocessors, shared memory of a block in bytes, blocks of a cluster."""
CODES = {torch.float64: 0, torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}
WIDTHS = [torch.float64, torch.float32, torch.bfloat16]
"""One dtype of each width, which is what a plan of correlations looks at."""
ROWS = (1, 2, 3, 7, 64, 131, 1000, 8192, 10**5, 10**7)
ROW_TRAVERSALS = ("lanes", "block", "cluster", "stream", "split", "general")
TRAVERSALS = ("tile", "staged", "stream", "columns", "slices")


def every_class_count() -> list[int]:
    """All small counts, and both sides of every power of two, and vocabularies, beyond."""
    edges = {2**n + d for n in range(11, 22) for d in (-8, -1, 0, 1, 8)}
    real = {19, 150, 1000, 21841, 32000, 32768, 50257, 50304, 128256, 151936, 152064, 256000}
    return sorted({*range(1, 1200), *range(1200, 70000, 97), *edges, *real, 262144, 1048576})


def shapes(classes: int, dtype: torch.dtype) -> list[tuple[bool, bool, bool, bool, bool]]:
    """dense, alike, aligned, adjacent and plain, as they can occur."""
    narrow = dtype != torch.float64
    whole = classes * dtype.itemsize % 16 == 0
    made = [
        (True, False, False, False, narrow),
        (True, True, False, False, narrow),
        (False, False, False, True, narrow),
        (False, False, False, False, narrow),
    ]
    made.append((True, True, whole, False, False))
    return [*made, (True, True, True, False, narrow)] if whole else made


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", CODES, ids=lambda d: str(d).removeprefix("torch."))
def test_every_row_plan_fits(device: str, dtype: torch.dtype) -> None:
    assert module is not None
    for classes in every_class_count():
        for shape in shapes(classes, dtype):
            for rows in ROWS:
                plan = module.cuda_row_plan(rows, classes, CODES[dtype], *shape, *DEVICES[device])
                assert plan["fits"], (rows, classes, shape, plan)
                assert plan["blocks"] < 2**31
                if not shape[0] or not shape[4]:
                    assert ROW_TRAVERSALS[plan["traversal"]] == "general"
                if ROW_TRAVERSALS[plan["traversal"]] == "cluster":
                    assert shape[1]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", WIDTHS, ids=lambda d: str(d).removeprefix("torch."))
def test_every_correlation_plan_fits(device: str, dtype: torch.dtype) -> None:
    assert module is not None
    for classes in every_class_count():
        for dense, _, *others in shapes(classes, dtype):
            shape = (dense, *others)
            for rows in ROWS:
                for run in runs(rows, *shape):
                    plan = module.cuda_correlation_plan(
                        rows, classes, CODES[dtype], *shape, run, *DEVICES[device]
                    )
                    assert plan["fits"], (rows, classes, shape, run, plan)
                    # Every part has rows, and every row a part.
                    assert (plan["parts"] - 1) * plan["tile"] < rows or plan["groups"]
                    traversal = TRAVERSALS[plan["traversal"]]
                    by_columns = run > 0 and shape[3] and 2 <= classes <= 512
                    assert (traversal == "columns") == by_columns
                    if by_columns or dtype == torch.float64:
                        assert traversal != "slices"


def runs(rows: int, dense: bool, aligned: bool, adjacent: bool, plain: bool) -> list[int]:
    """Rows that copies of whole packs bring in together, as csrc/cuda/layout.h counts them."""
    if not plain or not (dense or adjacent):
        return [0]
    return [0, rows] if dense or rows % 8 else [0, rows, 8]


def row_traversal(
    rows: int, classes: int, dtype: torch.dtype, device: str, alike: bool = True
) -> tuple[str, int]:
    assert module is not None
    whole = alike and classes * dtype.itemsize % 16 == 0
    plan = module.cuda_row_plan(
        rows, classes, CODES[dtype], True, alike, whole, False, True, *DEVICES[device]
    )
    return ROW_TRAVERSALS[plan["traversal"]], plan["cluster"]


def test_the_intended_traversals() -> None:
    bf16, fp32 = torch.bfloat16, torch.float32
    assert row_traversal(256, 10, fp32, "H200") == ("lanes", 1)
    assert row_traversal(1024, 1000, fp32, "H200") == ("lanes", 1)
    assert row_traversal(4096, 8192, bf16, "H200") == ("cluster", 1)
    assert row_traversal(4096, 8192, bf16, "A100") == ("block", 1)
    assert row_traversal(4096, 8191, bf16, "H200") == ("cluster", 1)
    assert row_traversal(4096, 8191, bf16, "A100") == ("block", 1)
    assert row_traversal(4096, 8192, bf16, "H200", alike=False) == ("block", 1)
    assert row_traversal(8192, 128256, bf16, "H200") == ("cluster", 8)
    assert row_traversal(8192, 262144, bf16, "H200") == ("cluster", 16)
    assert row_traversal(8192, 128256, bf16, "A100") == ("stream", 1)
    assert row_traversal(4, 1048576, fp32, "H200") == ("split", 33)
    assert row_traversal(8192, 1048576, fp32, "H200") == ("stream", 1)
    assert row_traversal(8192, 50257, bf16, "H200") == ("cluster", 4)
    assert row_traversal(8192, 50257, bf16, "H200", alike=False) == ("stream", 1)
    assert row_traversal(8192, 50257, bf16, "A100") == ("stream", 1)
    assert row_traversal(8192, 151643, bf16, "H200") == row_traversal(8192, 151648, bf16, "H200")
    assert row_traversal(8192, 262144, bf16, "H200 slice") == ("stream", 1)


def columns(rows: int, classes: int, dtype: torch.dtype, device: str = "H200") -> dict[str, int]:
    """The plan of DIST for contiguous rows."""
    assert module is not None
    whole = classes * dtype.itemsize % 16 == 0
    return module.cuda_correlation_plan(
        rows, classes, CODES[dtype], True, whole, False, True, rows, *DEVICES[device]
    )


def test_the_intended_columns() -> None:
    bf16, fp32 = torch.bfloat16, torch.float32
    dense = columns(2_000_000, 150, fp32)
    assert TRAVERSALS[dense["traversal"]] == "columns"
    assert (dense["lanes"], dense["elements"], dense["tile"]) == (8, 19, 16)
    assert dense["blocks"] == 2 * 132
    assert columns(2_000_000, 150, bf16)["tile"] == 32
    # A lane a row where neighbouring rows lie in different banks.
    assert columns(10**6, 19, fp32)["lanes"] == 1
    assert columns(10**6, 20, fp32)["lanes"] == 2
    # A few rows: a tile is one pass of a block's threads, so that many blocks have some.
    small = columns(256, 100, fp32)
    assert small["tile"] * small["blocks"] == 256


def test_the_intended_slices() -> None:
    """Rows that one multiprocessor can keep, then clusters; small problems in one launch."""
    bf16, fp32 = torch.bfloat16, torch.float32

    def slices(rows: int, classes: int, dtype: torch.dtype, device: str = "H200") -> object:
        plan = columns(rows, classes, dtype, device)
        kept = plan["cluster"], plan["blocks"], plan["parts"]
        return kept if TRAVERSALS[plan["traversal"]] == "slices" else TRAVERSALS[plan["traversal"]]

    assert slices(1024, 1000, fp32) == "tile"
    assert slices(50_000, 1000, fp32) == (1, 3 * 132, 3 * 132)
    assert slices(50_000, 1001, fp32) == (1, 3 * 132, 3 * 132)
    assert slices(8192, 4096, bf16) == (1, 132, 132)
    assert slices(8192, 4096, bf16, "A100") == (1, 108, 108)
    assert slices(8192, 21841, fp32) == (8, 128, 16)
    assert slices(4096, 32000, bf16) == (4, 128, 32)
    assert slices(4096, 32000, bf16, "A100") == "stream"
    assert slices(8192, 50257, bf16) == (16, 128, 8)
    assert slices(8192, 128256, bf16) == (16, 128, 8)
    assert slices(8192, 151936, bf16) == "stream"
    # The moments of all parts fit where the gradient will be.
    for rows in (256, 500, 1024):
        plan = columns(rows, 40000, bf16)
        assert TRAVERSALS[plan["traversal"]] == "slices"
        assert plan["parts"] * 5 * 4 <= rows * 2


def test_a_plan_depends_on_rows_only_where_they_are_few() -> None:
    """So that a row's bits do not depend on its batch (but for a split of very long rows)."""
    assert module is not None
    for classes in (10, 1000, 4096, 32000, 50257, 128256):
        kept = [
            {
                name: value
                for name, value in module.cuda_row_plan(
                    rows, classes, 3, True, True, classes % 8 == 0, False, True, *DEVICES["H200"]
                ).items()
                if name not in ("blocks", "fits")
            }
            for rows in (1, 5, 64, 4096)
        ]
        assert all(plan == kept[0] for plan in kept)

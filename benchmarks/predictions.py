"""What the CUDA kernels should take on an H200, written down before any of them ran on one.

``python -m benchmarks.predictions`` writes ``results/h200-predictions.{json,md}``, and
``benchmarks.gpu`` puts its measurements next to them. A prediction is the largest of three times -
the bytes that must move, the instructions that must be issued, the special functions - plus what
starting, meeting and finishing cost. The instructions of a class, and those that a thread spends on
each row, are read off the machine code (sm_90, nvcc 13.0); the row's are good to a fifth.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch

from kdkernels import native

RESULTS = Path(__file__).resolve().parent / "results"
DEVICE = {"arch": 90, "multiprocessors": 132, "block_shared": 232448, "most_cluster": 16}
COPY = 4.3e12
"""Bytes a second, read plus written, that a large copy moves on an H200."""
CLOCK = 1.9e9
CACHE = 50e6
"""Bytes of inputs that stay in the second-level cache between the passes of DIST."""
ISSUE = 0.78
"""Of the issue slots, what kernels with 9 to 24 warps a multiprocessor fill: a guess."""
EXCHANGE = 750
"""Instructions of the warp that exchanges a row's parts, in both walks of ``slices``."""
LAUNCH, MEETING = 2.5, 2.0
"""Microseconds: from launch to launch on a stream; of a barrier of the whole grid."""

ROWS = ("lanes", "block", "cluster", "stream", "split", "general")
CORRELATIONS = ("tile", "staged", "stream", "columns", "slices")
CODES = {torch.float32: 1, torch.bfloat16: 3}


class Kernel(NamedTuple):
    """Of one traversal and dtype: what a class costs, and what a multiprocessor holds."""

    instructions: float
    special: float
    registers: int
    blocks: int  # on a multiprocessor, by registers and shared memory; 0: by the plan's threads
    each_row: float = 0.0  # instructions of a thread for a row


KERNELS = {
    ("lanes", "float32"): Kernel(46, 4, 160, 3, 250),
    ("cluster", "float32"): Kernel(36.5, 4, 80, 3, 500),
    ("cluster", "bfloat16"): Kernel(37.4, 4, 80, 3, 500),
    ("split", "float32"): Kernel(42, 4, 128, 1, 600),
    ("tile", "float32"): Kernel(160, 6, 153, 2),
    ("columns", "float32"): Kernel(48, 4, 227, 2, 330),
    ("columns", "bfloat16"): Kernel(53, 4, 227, 2, 290),
    ("slices", "float32"): Kernel(66, 8, 168, 0, 190),
    ("slices", "bfloat16"): Kernel(68, 8, 168, 0, 253),
    ("stream correlation", "bfloat16"): Kernel(95, 10, 128, 1),
}
CASES = [
    ("kd", (256, 100), torch.float32),
    ("dkd", (256, 100), torch.float32),
    ("dist", (256, 100), torch.float32),
    ("kd", (1024, 1000), torch.float32),
    ("dkd", (1024, 1000), torch.float32),
    ("dist", (1024, 1000), torch.float32),
    ("kd", (4096, 32000), torch.bfloat16),
    ("dkd", (4096, 32000), torch.bfloat16),
    ("dist", (50_000, 1000), torch.float32),
    ("dist", (8192, 21841), torch.float32),
    ("dist", (4096, 32000), torch.bfloat16),
    ("dist", (8192, 128256), torch.bfloat16),
    ("dist", (8192, 151936), torch.bfloat16),
    ("kd", (8192, 128256), torch.bfloat16),
    ("dkd", (8192, 128256), torch.bfloat16),
    ("kd", (8192, 262144), torch.bfloat16),
    ("kd", (4, 1048576), torch.float32),
    ("dist", (2_000_000, 150), torch.float32),
    ("dist", (2_000_000, 150), torch.bfloat16),
    ("dist", (16, 19, 512, 1024), torch.float32),
]


def rows_and_classes(shape: tuple[int, ...]) -> tuple[int, int]:
    """Classes are last, or in dimension 1 of images."""
    classes = shape[1] if len(shape) == 4 else shape[-1]
    return math.prod(shape) // classes, classes


def predict(loss: str, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Any]:
    """Forward and backward: traversal, bytes, registers, microseconds and what bounds them."""
    module = native.extension()
    assert module is not None, native.reason()
    rows, classes = rows_and_classes(shape)
    name = str(dtype).removeprefix("torch.")
    dense = len(shape) == 2
    whole = dense and classes * dtype.itemsize % 16 == 0
    asked, others = (rows, classes, CODES[dtype], dense), (whole, not dense, True)
    if loss == "dist":
        run = rows if dense else math.prod(shape[2:])
        plan = module.cuda_correlation_plan(*asked, *others, run, *DEVICE.values())
        traversal = CORRELATIONS[plan["traversal"]]
        kernel = KERNELS[traversal if traversal != "stream" else "stream correlation", name]
        cached = 2 * rows * classes * dtype.itemsize <= CACHE
        passes = 3 if cached else 7 if traversal == "stream" else 5
        fixed = (4 * LAUNCH if traversal == "slices" else 2 * LAUNCH + 2 * MEETING) + 4
    else:
        plan = module.cuda_row_plan(*asked, dense, *others, *DEVICE.values())
        traversal = ROWS[plan["traversal"]]
        kernel = KERNELS[traversal, name]
        passes = 3 if traversal != "split" else 5
        counted = loss != "kd" and rows > 1024  # the valid of many rows, by a launch before
        fixed = (2 + counted) * LAUNCH + (2 * MEETING if traversal == "split" else 0) + 2
    elements = rows * classes
    moved = passes * elements * dtype.itemsize
    threads = plan["lanes"]  # that share a row
    if loss != "dist":
        threads = threads or plan["cluster"] * plan["threads"]
    slots = elements
    if traversal == "columns":
        moved += 2 * rows * 24  # the terms of each row
        slots = rows * plan["lanes"] * plan["elements"]
    blocks = kernel.blocks
    if traversal == "slices":
        moved += 2 * rows * 24 + 3 * plan["parts"] * classes * 20  # and the moments of each part
        threads = plan["cluster"] * (plan["threads"] - 32)
        exchange = plan["cluster"] * 32 * EXCHANGE / kernel.instructions
        slots = rows * (threads * plan["elements"] + exchange)
        blocks = 12 // (-(-plan["threads"] // 128) * 4)
    # As many multiprocessors as have work.
    busy = min(1.0, plan["blocks"] / (DEVICE["multiprocessors"] * blocks))
    lanes = DEVICE["multiprocessors"] * CLOCK * max(busy, 0.25)
    times = {
        "bytes": moved / COPY,
        "instructions": (slots * kernel.instructions + rows * threads * kernel.each_row)
        / (128 * lanes * ISSUE),
        "special functions": elements * kernel.special / (16 * lanes),
    }
    bound = max(times, key=times.__getitem__)
    microseconds = times[bound] * 1e6 + fixed
    floor = (5 if loss == "dist" and not cached else 3) * elements * dtype.itemsize
    return {
        "loss": loss,
        "shape": "x".join(map(str, shape)),
        "dtype": name,
        "traversal": traversal,
        "bytes": floor,
        "moved": moved,
        "registers": kernel.registers,
        "blocks": plan["blocks"],
        "threads": plan["threads"],
        "occupancy": blocks * plan["threads"] / 2048,
        "bound": bound if times[bound] * 1e6 > fixed else "launches",
        "microseconds": round(microseconds, 1),
        "of_copy": round(floor / COPY / microseconds * 1e6, 2),
    }


def table(predictions: list[dict[str, Any]]) -> str:
    columns = ["loss", "shape", "dtype", "kernel", "registers", "occupancy"]
    columns += ["bytes", "bound", "time", "copy"]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for p in predictions:
        time = p["microseconds"]
        shown = f"{time / 1000:.2f} ms" if time >= 1000 else f"{time:.0f} µs"
        lines.append(
            f"| {p['loss'].upper()} | {p['shape']} | {p['dtype']} | {p['traversal']}, "
            f"{p['blocks']} x {p['threads']} | {p['registers']} | {p['occupancy']:.0%} | "
            f"{p['bytes'] / 1e6:,.1f} MB | {p['bound']} | {shown} | {p['of_copy']:.0%} |"
        )
    return "\n".join(lines)


def main() -> None:
    predictions = [predict(*case) for case in CASES]
    note = (
        "Predicted before any of these kernels ran on a GPU (`python -m benchmarks.predictions`): "
        f"forward and backward on an H200, {COPY / 1e12} TB/s copied, {CLOCK / 1e9} GHz, "
        f"{ISSUE:.0%} of the issue slots filled. *kernel*: traversal, blocks x threads. *bytes*: "
        "the least that must move; *bound*: what takes longest; *copy*: those bytes in the "
        "predicted time, over the copy's bandwidth.\n\n"
    )
    facts = {"what": "predictions, not measurements", "predictions": predictions}
    (RESULTS / "h200-predictions.json").write_text(json.dumps(facts, indent=1) + "\n")
    (RESULTS / "h200-predictions.md").write_text(note + table(predictions) + "\n")
    print(table(predictions))


if __name__ == "__main__":
    main()

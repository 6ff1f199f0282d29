"""What the tables and JSON files of the trainers are made of."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import kdkernels


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (0 for a single value)."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def paired(values: Sequence[float] | None, digits: int = 2) -> str:
    """Mean ± standard deviation, and how many of the seeds gained."""
    if values is None:
        return "-"
    mean, deviation = spread(values)
    gained = sum(v > 0 for v in values)
    return f"{mean:+.{digits}f} ± {deviation:.{digits}f} ({gained}/{len(values)})"


def grid(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table with columns of equal width; words to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in (head, *body)) for i in range(len(head))]
    lines = []
    for row in (head, ["-" * width for width in widths], *body):
        cells = (
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def versions() -> dict[str, str]:
    return {
        "torch": torch.__version__,
        "kdkernels": kdkernels.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        "date": time.strftime("%Y-%m-%d"),
    }


def write_json(content: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(partial, path)

"""The README's table of losses, from the registry: ``python -m kdkernels._table README.md``."""

from __future__ import annotations

import sys
from pathlib import Path

from .losses import *  # noqa: F403  (fills the registry)
from .registry import SPECS

BEGIN, END = "<!-- losses: begin -->", "<!-- losses: end -->"


def table() -> str:
    """A row a loss: what it computes, and what T^2, reduction and eps mean in it."""
    lines = [
        "| loss | Module, function | value | temperature | `mean` is | eps | paper |",
        "|---|---|---|---|---|---|---|",
    ]
    for spec in SPECS.values():
        paper = spec.paper + (f"; **{spec.note}**" if spec.note else "")
        cells = (
            f"**{spec.title}**",
            f"`{spec.module.__name__}`, `functional.{spec.function.__name__}`",
            spec.formula.replace("|", "\\|"),
            spec.temperature,
            spec.reduction,
            spec.eps,
            paper,
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def insert(text: str) -> str:
    """Replace what stands between the markers by the table."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    page = Path(sys.argv[1])
    page.write_text(insert(page.read_text(encoding="utf-8")), encoding="utf-8")

"""The papers' claims beside what ``reproduce.py`` found: the short table of the README.

python examples/claims.py README.md     # writes it between the marks, from examples/results
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tables import grid, paired

BEGIN, END = "<!-- claims: begin -->", "<!-- claims: end -->"
RESULTS = Path(__file__).resolve().parent / "results" / "results.json"


@dataclass(frozen=True)
class Claim:
    text: str
    table: str
    teacher: str
    method: str
    over: str
    split: str = "same"


CLAIMS = (
    *(
        Claim(text, "main", teacher, method, over)
        for text, method, over in (
            ("KD: a teacher helps", "kd", "ce"),
            ("DIST helps more than KD, most with strong teachers", "dist", "kd"),
            ("DIST helps", "dist", "ce"),
        )
        for teacher in ("weak", "medium", "strong")
    ),
    *(Claim("IE-KD helps", "main", teacher, "iekd", "ce") for teacher in ("medium", "strong")),
    Claim("exploration adds to inheritance", "iekd-terms", "medium", "iekd", "iekd:exploration=0"),
    Claim("IE-KD adds to KD", "iekd-kd", "medium", "iekd:kd=0.9,ce=0.1", "kd"),
    Claim("DKD helps more than KD", "main", "medium", "dkd", "kd"),
    Claim("AEKT (reconstructed) helps more than DKD", "main", "medium", "aekt", "dkd"),
    Claim("REFILLED helps, same classes", "refilled-same", "medium", "refilled", "ce"),
    Claim(
        "REFILLED helps, overlapping classes",
        "refilled-overlap",
        "medium",
        "refilled",
        "ce",
        "overlap",
    ),
    Claim(
        "REFILLED helps, other classes", "refilled-disjoint", "medium", "refilled", "ce", "disjoint"
    ),
    Claim(
        "its first stage is worth having, other classes",
        "refilled-disjoint",
        "medium",
        "refilled",
        "refilled:stage1=0",
        "disjoint",
    ),
    Claim(
        "standardised logits help KD",
        "standardisation",
        "medium",
        "kd:standardize=1,temperature=2,weight=9",
        "kd",
    ),
)


def table(tables: Mapping[str, Any]) -> list[str]:
    """A line for each claim; JSON has text for a seed, a run a number."""
    rows = []
    for claim in CLAIMS:
        gain = "not run"
        if claim.table in tables:
            found = tables[claim.table]["accuracy"][claim.split].get(claim.teacher, {})
            if claim.method in found and claim.over in found:
                mine, other = (found[name].values() for name in (claim.method, claim.over))
                gain = paired([a - b for a, b in zip(mine, other, strict=True)])
        rows.append([claim.text, f"{claim.method} − {claim.over}", claim.teacher, gain])
    return grid(["the papers' claim", "here: difference of", "teacher", "points (seeds)"], rows)


def main(path: Path) -> None:
    """Replace what stands between the marks of a file."""
    text = path.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    lines = table(json.loads(RESULTS.read_text())["tables"])
    path.write_text("\n".join([before + BEGIN, *lines, END + after]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

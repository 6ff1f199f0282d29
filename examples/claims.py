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

from report import grid, paired

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
    Claim("IE-KD helps", "main", "medium", "iekd", "ce"),
    Claim("IE-KD helps", "main", "strong", "iekd", "ce"),
    Claim("IE-KD helps, inheritance at 200", "main", "strong", "iekd:inheritance=200", "ce"),
    Claim("exploration adds to inheritance", "iekd-halves", "medium", "iekd", "iekd:exploration=0"),
    Claim("IE-KD adds to KD", "main", "strong", "iekd:kd=0.9,ce=0.1", "kd"),
    Claim("DKD helps more than KD", "main", "strong", "dkd", "kd"),
    Claim("DKD, beta = 8", "main", "strong", "dkd:beta=8", "kd"),
    Claim("AEKT (reconstructed) helps more than DKD", "main", "strong", "aekt", "dkd"),
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
    """A line for each claim whose table is there; JSON has text for a seed, a run a number."""
    rows = []
    for claim in CLAIMS:
        try:
            found = tables[claim.table]["accuracy"][claim.split][claim.teacher]
            mine, other = (list(found[name].values()) for name in (claim.method, claim.over))
        except KeyError:
            continue
        gain = paired([a - b for a, b in zip(mine, other, strict=True)])
        rows.append([claim.text, f"{claim.method} − {claim.over}", claim.teacher, gain])
    head = ["the papers' claim", "here: difference of", "teacher", "points, n"]
    return grid(head, rows) if rows else []


def main(path: Path) -> None:
    """Replace what stands between the marks of a file."""
    text = path.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    lines = table(json.loads(RESULTS.read_text())["tables"])
    path.write_text("\n".join([before + BEGIN, *lines, END + after]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

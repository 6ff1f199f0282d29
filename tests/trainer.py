"""What the tests of the reference trainer share: its modules, tiny runs and single jobs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

for needed in ("sklearn", "matplotlib", "tqdm"):
    pytest.importorskip(needed, reason="pip install -e '.[examples]'")

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))
try:
    import distill as distill
    import engine as engine
    import extras as extras
    import models as models
    import recipes as recipes
    import terms as terms
    from data import digits as digits
finally:
    sys.path.remove(str(EXAMPLES))

import kdkernels  # noqa: E402

BACKEND = "reference" if any(r["native"] for r in kdkernels.available().values()) else "native"
TINY = (
    f"--device cpu --backend {BACKEND} --teacher tiny --student tiny --student-samples 40 "
    "--batch 20 --teacher-epochs 2 --epochs 3 --seeds 0 1 --save-every 1 "
    f"--option iekd.coder_epochs=2 --methods {' '.join(recipes.RECIPES)}"
).split()


def run(folder: Path, *extra: str) -> dict[str, Any]:
    assert distill.main([*TINY, "--output", str(folder), *extra]) == 0
    return json.loads((folder / "results.json").read_text())


def learned(results: dict[str, Any]) -> dict[str, Any]:
    """What must not depend on interrupts: the losses and accuracies of every epoch."""
    histories = {}
    for part in filter(None, (results, results.get("disjoint"))):
        task = "" if part is results else "disjoint-"
        histories[f"{task}teacher"] = part["teacher"]
        for method, seeds in part["students"].items():
            histories |= {f"{task}{method}-{seed}": history for seed, history in seeds.items()}
    return {name: (h["loss"], h["accuracy"]) for name, h in histories.items()}


def tiny_job(folder: Path, method: str, *extra: str) -> engine.Job:
    args = distill.parse([*TINY, "--output", str(folder), *extra])
    teacher = models.build("small", 1, 10, seed=5).requires_grad_(False)
    return distill.job(args, engine.World.join("cpu"), digits(), "student", method, 0, teacher)

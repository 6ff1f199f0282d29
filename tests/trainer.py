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
    import checkpoints as checkpoints
    import claims as claims
    import compare as compare
    import distill as distill
    import engine as engine
    import extras as extras
    import loaders as loaders
    import models as models
    import plan as plan
    import recipes as recipes
    import reproduce as reproduce
    import setups as setups
    import terms as terms
    from loaders import digits as digits
    from world import World as World
finally:
    sys.path.remove(str(EXAMPLES))

import kdkernels  # noqa: E402

BACKEND = "reference" if any(r["native"] for r in kdkernels.available().values()) else "native"
TINY = (
    f"--device cpu --backend {BACKEND} --dataset digits --teachers weak --student 4x1 "
    "--images-per-class 4 --batch 20 --teacher-epochs 2 --epochs 3 --seeds 0 1 --save-every 1 "
    f"--option iekd.coder_epochs=2 --methods {' '.join(recipes.RECIPES)}"
).split()


def run(folder: Path, *extra: str) -> dict[str, Any]:
    assert distill.main([*TINY, "--output", str(folder), *extra]) == 0
    return json.loads((folder / "results.json").read_text())


def learned(results: dict[str, Any]) -> dict[str, Any]:
    """What must not depend on interrupts: the losses and accuracies of every epoch."""
    histories = {}
    for part in results["comparisons"]:
        task = part["split"]
        for method, seeds in part["plain"].items():
            histories |= {f"{task}-{method}-{seed}": history for seed, history in seeds.items()}
        for name, taught in part["teachers"].items():
            histories[f"{task}-{name}"] = taught["teacher"]
            for method, seeds in taught["students"].items():
                histories |= {f"{task}-{name}-{method}-{seed}": h for seed, h in seeds.items()}
    return {name: (h["loss"], h["accuracy"]) for name, h in histories.items()}


def teacher(size: str = "8x1") -> models.ResNet:
    return models.build(size, digits(), seed=5).requires_grad_(False)


def tiny_job(folder: Path, method: str, *extra: str) -> engine.Job:
    args = distill.parse([*TINY, "--output", str(folder), *extra])
    one = recipes.Method.parse(method)
    return plan.student_job(args, World.join("cpu"), digits(), "same", one, 0, teacher(), "weak")

"""The reference trainer's results: how reproduce.py makes them, and that the README shows them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from trainer import EXAMPLES, claims, compare, distill, recipes, reproduce, setups

from kdkernels.functional import dist_loss

README = EXAMPLES.parent / "README.md"


def test_tables_of_tiny_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables of the same settings share their runs; JSON and text are written."""
    monkeypatch.setattr(compare.report, "time_steps", lambda jobs: dict.fromkeys(jobs, 1.0))
    monkeypatch.setattr(compare.report, "time_loss", lambda job: None)
    monkeypatch.setattr(reproduce.figure, "write", lambda *arguments: None)
    arguments = ["--tables", "iekd-terms", "standardisation", "--dataset", "digits"]
    arguments += ["--teacher-epochs", "1", "--epochs", "1", "--batch", "20", "--seeds", "0", "1"]
    arguments += ["--images-per-class", "2", "--option", "iekd.coder_epochs=1", "--device", "cpu"]
    folders = ["--output", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    assert reproduce.main([*arguments, *folders]) == 0
    saved = list((tmp_path / "runs" / "main" / "checkpoints" / "same").iterdir())
    assert len(saved) == 2 * 6  # of seven: CE is part of both tables
    found = json.loads((tmp_path / "results" / "results.json").read_text())
    assert {"torch", "kdkernels", "date", "tables"} <= set(found)
    tables = found["tables"]
    assert list(tables) == ["standardisation", "iekd-terms"]  # their order in the module
    kd, halves = (table["accuracy"]["same"]["medium"] for table in tables.values())
    assert halves["ce"] == kd["ce"] and set(kd["ce"]) == {"0", "1"}
    differences = [halves["iekd"][s] - halves["iekd:exploration=0"][s] for s in ("0", "1")]
    lines = claims.table(tables)
    row = next(line for line in lines if "iekd − iekd:exploration=0" in line)
    assert row.split("|")[4].strip() == compare.report.paired(differences)
    written = (tmp_path / "results" / "README.md").read_text()
    assert all(line in written for line in lines) and "## iekd-terms: " in written


def test_tables_can_be_run() -> None:
    """Every table's arguments are distill.py's; those that choose leave the test split alone."""
    chosen, shown = set(), set()
    for table in reproduce.TABLES:
        args = distill.parse(["--dataset", "fashion-mnist", *table.arguments.split()])
        assert args.validate == table.name.startswith("choose")
        (chosen if args.validate else shown).update(args.seeds)
        assert len(args.seeds) >= (5 if table.name in ("main", "refilled-same") else 2)
        assert args.validate or table.folder != "choices"
    assert not chosen & shown
    names = [table.name for table in reproduce.TABLES]
    assert len(set(names)) == len(names)
    assert {claim.table for claim in claims.CLAIMS} <= set(names)
    assert set(setups.SETUPS["fashion-mnist"].splits) >= {claim.split for claim in claims.CLAIMS}


def test_readme_shows_the_committed_results() -> None:
    found = json.loads(claims.RESULTS.read_text())
    text = README.read_text()
    shown = text.partition(claims.BEGIN)[2].partition(claims.END)[0].strip().splitlines()
    assert shown == claims.table(found["tables"])
    assert len(shown) == len(claims.CLAIMS) + 2


def test_committed_results_hold() -> None:
    """What the project exists for: DIST well above plain training and above KD, IE-KD above plain
    training; every method is there, whatever it reached."""
    tables = json.loads(claims.RESULTS.read_text())["tables"]
    main = tables["main"]["accuracy"]["same"]
    assert {recipes.Method.parse(m).recipe.name for t in main.values() for m in t} >= {
        *("ce", "kd", "dkd", "aekt", "dist", "iekd")
    }

    def gain(method: str, over: str) -> float:
        found = main["medium"]
        pairs = zip(found[method].values(), found[over].values(), strict=True)
        gains = [mine - other for mine, other in pairs]
        assert len(gains) >= 5
        return sum(gains) / len(gains)

    assert gain("dist", "ce") >= 4 and gain("dist", "kd") >= 1.5 and gain("iekd", "ce") > 0


@pytest.mark.parametrize("tau", [1.0, 4.0])
def test_first_gradient_of_dist(tau: float) -> None:
    """What dist_loss says of nearly uniform probabilities, which is why its recipe clips."""
    noise = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 16, 10, dtype=torch.float64, generator=noise)
    student = (0.001 * student).requires_grad_()
    dist_loss(student, 5 * teacher, 1.0, 0.0, tau).backward()
    q, p = ((logits / tau).softmax(1) - 0.1 for logits in (student, 5 * teacher))
    rho = torch.nn.functional.cosine_similarity(q, p)
    centred = student - student.mean(1, keepdim=True)
    expected = tau**2 * (1 - rho**2).sqrt() / (16 * centred.norm(dim=1))
    assert student.grad is not None
    torch.testing.assert_close(student.grad.norm(dim=1), expected, rtol=1e-2, atol=0)

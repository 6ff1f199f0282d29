"""The documents: the table is the registry's, the code runs, the paths exist."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import kdkernels
from benchmarks import group_cost
from kdkernels import _table
from kdkernels.registry import SPECS

ROOT = Path(__file__).resolve().parent.parent
README, CONTRIBUTING, CHANGELOG = (
    (ROOT / name).read_text(encoding="utf-8")
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
)
CODE = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_the_table_is_the_registrys() -> None:
    _, begin, rest = README.partition(_table.BEGIN)
    table, end, _ = rest.partition(_table.END)
    assert begin and end, "the README has lost the markers of its table"
    assert table.strip() == _table.table(), "run: python -m kdkernels._table README.md"


def test_what_ranks_receive_is_the_arithmetic_of_the_benchmark() -> None:
    for line in (group_cost.arithmetic() + "\n" + group_cost.classes()).splitlines():
        assert line in README


def test_every_public_loss_is_mentioned() -> None:
    modules = {spec.module.__name__ for spec in SPECS.values()} | {"FusedLinearKDLoss"}
    public = modules | set(kdkernels.functional.__all__)
    assert {name for name in dir(kdkernels) if name.endswith("Loss")} == modules
    missing = [name for name in sorted(public) if not re.search(rf"\b{name}\b", README)]
    assert not missing


def test_there_is_code() -> None:
    assert CODE


@pytest.mark.parametrize("code", CODE, ids=range(len(CODE)))
def test_code_runs(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a block does not define itself, a reader has: logits, labels, a loss of the task."""
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(6, 10, generator=generator).requires_grad_()
    labels = torch.arange(6)
    names: dict[str, Any] = {
        "torch": torch,
        "student_logits": student,
        "teacher_logits": torch.randn(6, 10, generator=generator),
        "labels": labels,
        "target": labels,
        "process_group": None,
        "tp_group": None,
        "task_loss": torch.nn.functional.cross_entropy(student, labels),
    }
    exec(compile(code, "README.md", "exec"), names)
    if "loss" in names:
        names["loss"].backward()
        leaf = names.get("hidden", student)  # of an output layer's loss
        assert leaf.grad is not None and leaf.grad.isfinite().all() and leaf.grad.any()


def test_links_lead_somewhere() -> None:
    for page in (README, CONTRIBUTING, CHANGELOG):
        for target in re.findall(r"\]\(([^)#\s]+)", page):
            assert target.startswith("http") or (ROOT / target).exists(), target


def test_the_changelog_starts_with_this_version() -> None:
    first = re.search(r"^## (\S+)", CHANGELOG, re.MULTILINE)
    assert first and first[1] == kdkernels.__version__


PATH = re.compile(r"[\w*./]*(?:/|\.(?:py|h|cpp|md|toml))")


def _paths(page: str) -> Iterator[str]:
    """Paths in backticks, and those that a tree (indented by 4 and more) starts its lines with."""
    yield from (name for name in re.findall(r"`([^`\n]+)`", page) if PATH.fullmatch(name))
    above: list[str] = []
    for indent, line in re.findall(r"^ {4}((?:  )*)(\S.*)$", page, re.MULTILINE):
        del above[len(indent) // 2 :]
        for name in line.split():
            if not PATH.fullmatch(name):
                break
            yield "".join(above) + name
        above.append(line.split()[0])


def test_paths_of_the_contributing_guide_exist() -> None:
    """``X`` stands for a loss, and DKD is the guide's model; bare names are of kdkernels/."""
    paths = list(_paths(CONTRIBUTING))
    assert {"kdkernels/losses/X.py", "csrc/cpu/", "kdkernels/registry.py"} <= set(paths)
    for path in paths:
        found = [
            *ROOT.glob(path.replace("X", "dkd")),
            *(ROOT / "kdkernels").glob(path.replace("X", "dkd")),
        ]
        assert found, path

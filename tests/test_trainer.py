"""The reference trainer of examples/: end to end, resuming, DDP, and its error messages.

Tiny runs: what is tested is the machinery, not the accuracy.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import needs_processes, run_on_ranks
from trainer import (
    EXAMPLES,
    TINY,
    World,
    checkpoints,
    compare,
    digits,
    distill,
    engine,
    learned,
    plan,
    recipes,
    run,
    teacher,
)

SPLITS = ["--splits", "same", "disjoint"]
PLAIN = [name for name, recipe in recipes.RECIPES.items() if recipe.term is None]
APART = [name for name, recipe in recipes.RECIPES.items() if not recipe.shared]
"""Methods that do not need the teacher's classes."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """One uninterrupted run of every method, with the same and with disjoint classes."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, run(folder, *SPLITS)


def test_end_to_end(whole: tuple[Path, dict[str, Any]]) -> None:
    folder, results = whole
    same, disjoint = results["accuracy"]["same"]["weak"], results["accuracy"]["disjoint"]["weak"]
    assert set(same) == set(recipes.RECIPES)
    assert set(disjoint) == set(APART)
    assert all(set(found) == {"0", "1"} for found in (*same.values(), *disjoint.values()))
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    for name, (loss, accuracy) in learned(results).items():
        assert len(loss) == (2 if name.endswith("weak") else 3)
        assert len(accuracy) == (1 if name.endswith("weak") else 3)  # a teacher's last epoch only
        lowest = -50 if name.startswith("ie") else 0  # exploration is rewarded
        assert all(lowest < value < 100 for value in loss)
        assert all(0 <= value <= 100 for value in accuracy)
    for part, methods in zip(results["comparisons"], (same, disjoint), strict=True):
        assert set(part["times"]) == set(methods) - set(PLAIN)
        assert set(part["steps"]) == {m if m in part["plain"] else f"{m}@weak" for m in methods}
        assert all(min(t["chosen"], t["reference"]) > 0 for t in part["times"].values())
        assert all(step > 0 for step in part["steps"].values())
        taught = part["teachers"]["weak"]
        assert set(taught["induced"]) == {"refilled"}
        assert all(0 < value <= 100 for value in taught["induced"]["refilled"].values())
    assert not list(folder.rglob("*.partial*"))


def test_table_names_every_method(
    whole: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    run(whole[0], *SPLITS, "--no-times")  # everything is done: only reports
    captured = capsys.readouterr()
    text = captured.out
    for method in recipes.RECIPES:
        assert text.count(f"| {method} ") == (2 if method in APART else 1), method
    assert "disjoint: the teachers know classes 0, 1, 2, 3, 4, the students 5, 6, 7, 8, 9" in text
    assert "without kd, dkd, aekt, dist: logits are compared between the same classes only" in text
    assert text.count("over 2 seeds") == 2
    assert text.count("the classifier that the weak teacher's embedding induces reaches") == 2
    # Not a terminal: a line a run, nothing that overwrites itself.
    runs = len(recipes.RECIPES) + len(APART)
    assert text.count("] student-") == 2 * runs
    assert text.count("] teacher-weak ") == 2
    assert "\r" not in text + captured.err


def test_distillation_trains_another_network(whole: tuple[Path, dict[str, Any]]) -> None:
    curves = [loss for name, (loss, _) in learned(whole[1]).items() if name.endswith("-0")]
    assert len({tuple(loss) for loss in curves}) == len(recipes.RECIPES) + len(APART)


# One of each kind: plain, logits, a method with a preparation, one without, one of two stages.
RESUMED = ("ce", "kd", "iekd", "iedml", "refilled")
SHORT = [*SPLITS, "--methods", *RESUMED, "--seeds", "0"]
# A save is an epoch: 3 of the plain student, 2 of the teacher, then 3 for each method.
AT = {name: 3 + 2 + 3 * place for place, name in enumerate(RESUMED[1:])}
ALL = AT["refilled"] + 3


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run(tmp_path_factory.mktemp("short"), *SHORT)


@pytest.mark.parametrize(
    "saves",
    [1, AT["kd"] - 1, AT["iekd"], AT["iekd"] + 1, AT["iedml"] + 2, AT["refilled"] + 1, ALL + 6],
)
def test_resume_equals_uninterrupted(
    short: dict[str, Any],
    saves: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Interrupt in a student, in a teacher, in a method's preparation and between its stages, at a
    run's end and in the disjoint part: the numbers are the same bits."""
    assert recipes.RECIPES["ce"].term is None and "refilled" in APART
    write, done = checkpoints.write, 0

    def interrupted(path: Path, state: dict[str, Any]) -> None:
        nonlocal done
        if done == saves:
            raise KeyboardInterrupt
        done += 1
        write(path, state)

    monkeypatch.setattr(checkpoints, "write", interrupted)
    # What is slow and not looked at.
    monkeypatch.setattr(compare.report, "time_steps", lambda jobs: {})
    monkeypatch.setattr(compare.report, "time_loss", lambda job: None)
    monkeypatch.setattr(distill.figure, "write", lambda results, folder: None)
    assert distill.main([*TINY, *SHORT, "--output", str(tmp_path)]) == 130
    assert (tmp_path / "checkpoints" / "disjoint").exists() == (saves > ALL)
    monkeypatch.setattr(checkpoints, "write", write)
    assert not (tmp_path / "results.json").exists()
    assert learned(run(tmp_path, *SHORT)) == learned(short)


def test_half_written_checkpoint_is_ignored(
    whole: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crash while a checkpoint is written leaves the one before it."""
    path = tmp_path / "state.pt"
    checkpoints.write(path, {"epoch": 1})

    def crash(state: object, where: Path) -> None:
        where.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", crash)
    with pytest.raises(OSError, match="disk full"):
        checkpoints.write(path, {"epoch": 2})
    assert torch.load(path) == {"epoch": 1}


def test_done_runs_are_skipped_and_fresh_starts_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--methods", "ce", "kd", "--seeds", "0"]
    first = run(tmp_path, *arguments)
    written: list[str] = []
    write = checkpoints.write

    def count(path: Path, state: dict[str, Any]) -> None:
        written.append(path.name)
        write(path, state)

    monkeypatch.setattr(checkpoints, "write", count)
    assert learned(run(tmp_path, *arguments)) == learned(first)
    assert written == []
    assert learned(run(tmp_path, *arguments, "--fresh")) == learned(first)
    assert len(written) == 2 + 3 + 3  # every epoch of the teacher and of two students


def test_other_settings_refuse_the_checkpoint(
    whole: tuple[Path, dict[str, Any]],
) -> None:
    with pytest.raises(SystemExit, match=r"other settings \(lr: 0.05, now 0.25\).*\n.*--fresh"):
        run(whole[0], "--lr", "0.25")


def test_amp(tmp_path: Path) -> None:
    results = run(tmp_path, "--amp", "--methods", *recipes.RECIPES, "--seeds", "0")
    assert all(-50 < value < 100 for loss, _ in learned(results).values() for value in loss)


def test_option_changes_a_weight(tmp_path: Path) -> None:
    option = ["--option", "kd.temperature=2", "--option", "*.clip=3"]
    results = run(tmp_path, "--methods", "kd", "kd:clip=5,weight=2", "--seeds", "0", *option)
    options = results["comparisons"][0]["teachers"]["weak"]["options"]
    for method, temperature, clip in (("kd", 2, 3), ("kd:clip=5,weight=2", 2, 5)):
        assert (options[method]["temperature"], options[method]["clip"]) == (temperature, clip)
    assert options["kd:clip=5,weight=2"]["weight"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--option kd.heat=2", "an option of kd must be NAME=VALUE with a name among ce, clip"),
        ("--option heat=2", "--option must be METHOD.NAME=VALUE, got heat=2"),
        ("--methods kd:temperature=warm", "kd's temperature must be a number, got warm"),
        ("--methods heat", "METHOD must be NAME[:OPTION=VALUE,...][@TEACHER] with a name among ce"),
        ("--methods kd@", "METHOD must be NAME[:OPTION=VALUE,...][@TEACHER]"),
        ("--methods kd@medium", "the teacher of kd@medium must be one of --teachers weak"),
        ("--teachers huge", "--teachers of digits must be weak, medium, strong, got huge"),
        ("--splits half", "--splits of digits must be same, overlap, disjoint, got half"),
        ("--jobs 0", "argument --jobs: it must be a whole number from 1 on, got 0"),
        ("--epochs 0", "argument --epochs: it must be a whole number from 1 on, got 0"),
        ("--images-per-class -1", "argument --images-per-class: "),
        ("--amp fp16", "--amp fp16 needs a GPU"),
        ("--student 4", "size must be WIDTHxBLOCKS, such as 16x2, got 4"),
    ],
)
def test_errors(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        distill.parse([*TINY, *arguments.split()])
    assert message in " ".join(capsys.readouterr().err.split())


def test_several_teachers(tmp_path: Path) -> None:
    """Plain students are trained once; a method may ask for one teacher; the other order of
    teachers finds the same."""
    arguments = ["--seeds", "0", "--teachers", "weak", "medium", "--methods", "ce", "kd@medium"]
    accuracy = run(tmp_path, *arguments, "dist")["accuracy"]["same"]
    assert list(accuracy["weak"]) == ["ce", "dist"]
    assert list(accuracy["medium"]) == ["ce", "kd", "dist"]
    assert accuracy["weak"]["ce"] == accuracy["medium"]["ce"]
    saved = {path.name for path in (tmp_path / "checkpoints" / "same").iterdir()}
    assert saved == {
        "student-ce-seed0.pt",
        *("teacher-weak.pt", "teacher-medium.pt", "student-kd-medium-seed0.pt"),
        *("student-dist-weak-seed0.pt", "student-dist-medium-seed0.pt"),
    }


def test_networks_side_by_side(tmp_path: Path) -> None:
    """What several processes train is the same to the bit, and each network is told once."""
    arguments = ["--seeds", "0", "--teachers", "weak", "medium", "--no-times", "--threads", "1"]
    arguments += ["--methods", "ce", "kd@medium", "dist@weak"]
    alone = run(tmp_path / "alone", *arguments)
    command = [sys.executable, str(EXAMPLES / "distill.py"), *TINY, *arguments, "--jobs", "2"]
    command += ["--output", str(tmp_path / "jobs")]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert shown.returncode == 0, shown.stderr
    together = json.loads((tmp_path / "jobs" / "results.json").read_text())
    assert learned(together) == learned(alone)
    networks = [line for line in shown.stdout.splitlines() if line.startswith("[")]
    assert [line.split("]")[0] for line in networks] == [f"[{i}/5" for i in range(1, 6)]


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch has no distributed part")
def test_two_processes(tmp_path: Path) -> None:
    """torchrun with gloo: the result is written once, and resuming needs as many processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
        *("--master-addr", "127.0.0.1", "--master-port", str(port)),
        *(str(EXAMPLES / "distill.py"), *TINY, "--seeds", "0"),
        *("--methods", "kd", "dist", "iekd", "iedml", "refilled"),
        *("--global-batch-dist", "--output", str(tmp_path)),
    ]
    root = str(EXAMPLES.parent)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])]),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("student-kd-weak-seed0 ") == 1
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["comparisons"][0]["processes"] == 2
    assert all(len(loss) >= 2 for loss, _ in learned(results).values())
    with pytest.raises(SystemExit, match="processes: 2, now 1"):
        run(tmp_path, "--seeds", "0", "--methods", "kd")


def _train_a_replica() -> None:
    world = World(torch.device("cpu"), torch.distributed.get_rank(), 2)
    with tempfile.TemporaryDirectory() as folder:
        args = distill.parse([*TINY, "--output", folder])
        method = recipes.Method.parse("dkd")
        job = plan.student_job(args, world, digits(), "same", method, 0, teacher(), "weak")
        before = [p.detach().clone() for p in job.model.parameters()]
        engine.fit(job, world, Path(folder))
    for parameter, start in zip(job.model.parameters(), before, strict=True):
        here = parameter.detach()
        there = [torch.empty_like(here) for _ in range(2)]
        torch.distributed.all_gather(there, here)
        assert there[0].equal(there[1])
        assert not here.equal(start)


def _replicas() -> Iterator[tuple[str, Callable[[], None]]]:
    yield "two replicas", _train_a_replica


@needs_processes
def test_replicas_stay_equal() -> None:
    """After training on different halves of the batches, both processes hold the same weights."""
    run_on_ranks(2, _replicas)

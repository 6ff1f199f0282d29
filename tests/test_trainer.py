"""The reference trainer of examples/: end to end, resuming, DDP, and its error messages.

Tiny runs: what is tested is the machinery, not the accuracy.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from trainer import EXAMPLES, TINY, digits, distill, engine, learned, models, recipes, run


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """One uninterrupted run of every method."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, run(folder)


def test_end_to_end(whole: tuple[Path, dict[str, Any]]) -> None:
    folder, results = whole
    assert set(results["students"]) == set(recipes.RECIPES)
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    for name, (loss, accuracy) in learned(results).items():
        assert len(loss) == len(accuracy) >= 2
        lowest = -50 if name.startswith("ie") else 0  # exploration is rewarded
        assert all(lowest < value < 100 for value in loss)
        assert all(0 <= value <= 100 for value in accuracy)
    for method, timing in results["times"].items():
        assert (timing is None) == (method == "ce")
        assert timing is None or min(timing["chosen"], timing["reference"]) > 0
    assert not list(folder.rglob("*.partial*"))


def test_table_names_every_method(
    whole: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    run(whole[0])  # everything is done: only reports
    text = capsys.readouterr().out
    for method in recipes.RECIPES:
        assert text.count(f"| {method} ") == (2 if method in ("ce", "refilled") else 1)
    assert "disjoint labels (teacher 0-4, student 5-9)" in text
    assert text.count("over 2 seeds") == 2


def test_distillation_trains_another_network(whole: tuple[Path, dict[str, Any]]) -> None:
    curves = [loss for name, (loss, _) in learned(whole[1]).items() if name.endswith("-0")]
    assert len({tuple(loss) for loss in curves}) == len(recipes.RECIPES) + 2  # and disjoint


# A save is an epoch: teacher 2, then 3 for each student, in the order of the recipes.
AT = {name: 2 + 3 * place for place, name in enumerate(recipes.RECIPES)}


@pytest.mark.parametrize(
    "saves",
    [1, 4, 9, AT["iekd"], AT["iekd"] + 1, AT["iedml"] + 2, AT["refilled"] + 1, 6 * len(AT) + 6],
)
def test_resume_equals_uninterrupted(
    whole: tuple[Path, dict[str, Any]],
    saves: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Interrupt in a teacher, in a student, in a method's preparation and between its stages, at a
    run's end and in the disjoint part: the numbers are the same bits."""
    write, done = engine.write, 0

    def interrupted(path: Path, state: dict[str, Any]) -> None:
        nonlocal done
        if done == saves:
            raise KeyboardInterrupt
        done += 1
        write(path, state)

    monkeypatch.setattr(engine, "write", interrupted)
    assert distill.main([*TINY, "--output", str(tmp_path)]) == 130
    monkeypatch.setattr(engine, "write", write)
    assert not (tmp_path / "results.json").exists()
    assert learned(run(tmp_path)) == learned(whole[1])


def test_half_written_checkpoint_is_ignored(
    whole: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crash while a checkpoint is written leaves the one before it."""
    path = tmp_path / "state.pt"
    engine.write(path, {"epoch": 1})

    def crash(state: object, where: Path) -> None:
        where.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", crash)
    with pytest.raises(OSError, match="disk full"):
        engine.write(path, {"epoch": 2})
    assert torch.load(path) == {"epoch": 1}


def test_done_runs_are_skipped_and_fresh_starts_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--methods", "ce", "--seeds", "0"]
    first = run(tmp_path, *arguments)
    written: list[str] = []
    write = engine.write

    def count(path: Path, state: dict[str, Any]) -> None:
        written.append(path.name)
        write(path, state)

    monkeypatch.setattr(engine, "write", count)
    assert run(tmp_path, *arguments)["students"] == first["students"]
    assert written == []
    assert learned(run(tmp_path, *arguments, "--fresh")) == learned(first)
    assert len(written) == 2 + 3  # every epoch of teacher and student


def test_other_settings_refuse_the_checkpoint(
    whole: tuple[Path, dict[str, Any]],
) -> None:
    with pytest.raises(SystemExit, match=r"other settings \(lr: 0.05, now 0.25\).*\n.*--fresh"):
        run(whole[0], "--lr", "0.25")


def test_amp(tmp_path: Path) -> None:
    results = run(tmp_path, "--amp", "--methods", *recipes.RECIPES, "--seeds", "0")
    assert all(-50 < value < 100 for loss, _ in learned(results).values() for value in loss)


def test_option_changes_a_weight(tmp_path: Path) -> None:
    results = run(tmp_path, "--methods", "kd", "--seeds", "0", "--option", "kd.temperature=2")
    assert results["options"]["kd"]["temperature"] == 2
    with pytest.raises(SystemExit, match=r"kd\.heat must name one of .*kd\.temperature"):
        run(tmp_path, "--methods", "kd", "--option", "kd.heat=2")


def test_disjoint_is_optional(tmp_path: Path) -> None:
    arguments = ["--seeds", "0", "--methods", "refilled"]
    assert run(tmp_path, *arguments, "--no-disjoint")["disjoint"] is None
    found = run(tmp_path, *arguments)["disjoint"]
    assert set(found["students"]) == {"ce", "refilled"}
    assert found["images"][:2] == [501, 20]
    assert run(tmp_path / "other", "--seeds", "0", "--methods", "ce")["disjoint"] is None


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
        *("--methods", "kd", "iekd", "iedml", "refilled"),
        *("--output", str(tmp_path)),
    ]
    root = str(EXAMPLES.parent)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])]),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("student-kd-seed0 ") == 1
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["processes"] == 2
    assert all(len(loss) >= 2 for loss, _ in learned(results).values())
    with pytest.raises(SystemExit, match="processes: 2, now 1"):
        run(tmp_path, "--seeds", "0", "--methods", "kd")


def _replica(rank: int, port: int, folder: str) -> None:
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    world = engine.World.join("cpu")
    args = distill.parse([*TINY, "--output", folder])
    teacher = models.build("tiny", 1, 10, seed=5).requires_grad_(False)
    job = distill.job(args, world, digits(), "student", "dkd", 0, teacher)
    before = [p.detach().clone() for p in job.model.parameters()]
    engine.fit(job, world, Path(folder))
    for parameter, start in zip(job.model.parameters(), before, strict=True):
        here = parameter.detach()
        there = [torch.empty_like(here) for _ in range(2)]
        torch.distributed.all_gather(there, here)
        assert there[0].equal(there[1])
        assert not here.equal(start)
    # One that leaves while the other still talks can bring it down in its last breath.
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch has no distributed part")
def test_replicas_stay_equal(tmp_path: Path) -> None:
    """After training on different halves of the batches, both processes hold the same weights."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(_replica, (port, str(tmp_path)), nprocs=2)

"""The reference trainer of examples/: end to end, resuming, DDP, and its error messages.

Tiny runs: what is tested is the machinery, not the accuracy.
"""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

for needed in ("sklearn", "matplotlib", "tqdm"):
    pytest.importorskip(needed, reason="pip install -e '.[examples]'")

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))
try:
    import distill
    import engine
    import extras
    import models
    import recipes
    from data import digits
finally:
    sys.path.remove(str(EXAMPLES))

import torch  # noqa: E402

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


def test_validation_keeps_the_test_split_out() -> None:
    data = digits()
    held = data.validation()
    assert len(held.targets) + len(held.test_targets) == len(data.targets)
    rows = {image.numpy().tobytes() for image in held.images}
    assert not rows & {image.numpy().tobytes() for image in held.test_images}
    assert not rows & {image.numpy().tobytes() for image in data.test_images}


def test_disjoint_labels_share_no_image() -> None:
    data = digits()
    low, high = data.only(range(5)), data.only(range(5, 10))
    assert (low.classes, high.classes) == (5, 5)
    assert len(low.targets) + len(high.targets) == len(data.targets)
    assert high.targets.add(5).equal(data.targets[data.targets >= 5])
    assert high.test_images.equal(data.test_images[data.test_targets >= 5])
    assert high.subset(20, seed=1).targets.bincount().tolist() == [4] * 5


def test_disjoint_is_optional(tmp_path: Path) -> None:
    arguments = ["--seeds", "0", "--methods", "refilled"]
    assert run(tmp_path, *arguments, "--no-disjoint")["disjoint"] is None
    found = run(tmp_path, *arguments)["disjoint"]
    assert set(found["students"]) == {"ce", "refilled"}
    assert found["images"][:2] == [501, 20]
    assert run(tmp_path / "other", "--seeds", "0", "--methods", "ce")["disjoint"] is None


def _job(folder: Path, method: str, *extra: str) -> engine.Job:
    args = distill.parse([*TINY, "--output", str(folder), *extra])
    teacher = models.build("small", 1, 10, seed=5).requires_grad_(False)
    return distill.job(args, engine.World.join("cpu"), digits(), "student", method, 0, teacher)


def test_factor_autoencoder_learns_and_stays(tmp_path: Path) -> None:
    """IE-KD's auto-encoder reconstructs better after its preparation, then nothing moves it."""
    job = _job(tmp_path, "iekd", "--option", "iekd.coder_epochs=30")
    distiller = engine.Distiller(job)
    factors, teacher = distiller.extra, job.teacher
    assert isinstance(factors, extras.Factors) and teacher is not None
    with torch.no_grad():
        for _ in range(30):  # batch-norm statistics, so that there is something to reconstruct
            teacher.train()(job.data.images)
    teacher.eval()
    with torch.no_grad():
        features = teacher(job.data.images).features
        before = extras.reconstruction_loss(features, factors.train().teacher(features)[1])
    distiller.prepare()
    with torch.no_grad():
        after = extras.reconstruction_loss(features, factors.train().teacher(features)[1])
    assert after < 0.9 * before
    assert not any(p.requires_grad for p in factors.teacher.parameters())
    engine.fit(job, engine.World.join("cpu"), tmp_path)
    saved = torch.load(tmp_path / f"{job.name}.pt", weights_only=True)["model"]
    for name, value in factors.teacher.state_dict().items():
        assert saved[f"extra.teacher.{name}"].equal(value), name
    moved = saved["extra.exploration.1.weight"]
    assert not moved.equal(factors.exploration.state_dict()["1.weight"])


def test_refilled_stages(tmp_path: Path) -> None:
    """The first stage leaves the classifier alone; each stage has a cosine of its own."""
    job = _job(tmp_path, "refilled", "--epochs", "4", "--option", "refilled.stage1=0.5")
    distiller = engine.Distiller(job)
    distiller.prepare()
    assert distiller.extra is not None and job.teacher is not None
    job.teacher.eval()
    embedding = job.teacher(job.data.images).embedding
    expected = kdkernels.losses.class_centers(embedding, job.data.targets, 10)
    torch.testing.assert_close(distiller.extra(), expected)

    images, target = job.data.images[:20], job.data.targets[:20]
    for progress, trained in ((0.25, False), (0.5, False), (0.75, True)):
        distiller.zero_grad()
        distiller(images, target, job.teacher(images), progress).backward()
        gradient = job.model.head.weight.grad
        assert gradient is not None and bool(gradient.any()) == trained
        assert any(p.grad is not None and p.grad.any() for p in job.model.blocks.parameters())

    optimizer = torch.optim.SGD(job.model.parameters(), lr=1.0)
    schedule = engine._schedule(optimizer, job, steps=2)
    rates = []
    for _ in range(8):
        rates += schedule.get_last_lr()
        optimizer.step()
        schedule.step()
    assert rates[:4] == rates[4:] == sorted(rates[:4], reverse=True)
    assert rates[0] == 1.0


def test_mutual_students_both_learn(tmp_path: Path) -> None:
    """IE-DML: two students of different initial weights, neither of which bends the other."""
    job = _job(tmp_path, "iedml")
    distiller = engine.Distiller(job)
    peer = distiller.extra
    assert isinstance(peer, extras.Peer)
    assert not peer.peer.head.weight.equal(job.model.head.weight)
    images, target = job.data.images[:20], job.data.targets[:20]
    student = job.model(images)
    logits, mine, theirs = peer(images, student.features)
    kd = recipes.kd_loss(student.logits, logits.detach(), 1.0)
    (kd + recipes.iekd_loss(mine.inheritance, mine.exploration, theirs.factor)).backward()
    assert all(p.grad is None for p in peer.peer.parameters())
    distiller.zero_grad()
    distiller(images, target, None, 1.0)
    assert job.teacher is not None
    distiller(images, target, job.teacher(images), 1.0).backward()
    assert all(p.grad is not None for p in distiller.parameters())


def test_subset_is_balanced() -> None:
    data = digits()
    counts = data.subset(50, seed=3).targets.bincount()
    assert counts.tolist() == [5] * 10
    assert data.subset(50, seed=3).targets.equal(data.subset(50, seed=3).targets)


def test_processes_share_an_epoch() -> None:
    """Two processes see disjoint halves of what one sees."""
    data = digits()
    data = type(data)(**{**vars(data), "shift": 0})

    def images(rank: int, world: int) -> list[bytes]:
        batches = data.epoch(100, seed=1, epoch=2, rank=rank, world=world)
        return [image.numpy().tobytes() for batch, _ in batches for image in batch]

    both = images(0, 2), images(1, 2)
    assert sorted(both[0] + both[1]) == sorted(images(0, 1))


def test_extra_modules_are_trained_and_saved(tmp_path: Path) -> None:
    """A recipe may bring modules of its own, which train with the student."""

    def term(step: recipes.Step) -> torch.Tensor:
        assert step.extra is not None
        return (step.extra(step.student.embedding) - step.teacher.embedding).square().mean()

    recipe = recipes.Recipe(
        "hint",
        "hint",
        "a test",
        term=term,
        extra=lambda student, teacher: torch.nn.Linear(student.width, teacher.width),
    )
    args = distill.parse([*TINY, "--output", str(tmp_path)])
    world, data = engine.World.join("cpu"), digits()
    teacher = models.build("small", 1, 10, seed=0).requires_grad_(False)
    recipes.RECIPES["hint"] = recipe
    try:
        job = distill.job(args, world, data, "student", "hint", 0, teacher)
    finally:
        del recipes.RECIPES["hint"]
    engine.fit(job, world, tmp_path)
    saved = torch.load(tmp_path / f"{job.name}.pt", weights_only=True)["model"]
    start = engine.Distiller(job).state_dict()
    assert not saved["extra.weight"].equal(start["extra.weight"])


def test_serial_head_starts_as_nothing_trains_and_stays(
    whole: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """AEKT's: cross-entropy trains it, the distillation passes it by, inference goes through it."""
    plain, serial = (models.build("tiny", 1, 10, seed=3, serial=s).eval() for s in (False, True))
    images = digits().images[:5]
    with torch.no_grad():
        assert all(a.equal(b) for a, b in zip(plain(images), serial(images), strict=True))

    args = distill.parse([*TINY, "--output", str(tmp_path)])
    teacher = models.build("tiny", 1, 10, seed=5).requires_grad_(False)
    job = distill.job(args, engine.World.join("cpu"), digits(), "student", "aekt", 3, teacher)
    assert job.recipe.term is not None
    student, target = job.model(images), digits().targets[:5]
    term = job.recipe.term(
        recipes.Step(student, teacher(images), target, 1.0, job.options, BACKEND, None)
    )
    term.backward()
    assert job.model.head.weight.grad is not None and job.model.head.weight.grad.any()
    assert all(p.grad is None for p in job.model.serial.parameters())

    saved = torch.load(whole[0] / "checkpoints" / "student-aekt-seed0.pt", weights_only=True)
    weight = saved["model"]["student.serial.weight"]
    assert not weight.equal(torch.eye(10))
    job.model.load_state_dict(
        {key.removeprefix("student."): value for key, value in saved["model"].items()}
    )
    with torch.no_grad():
        out = job.model.eval()(images)
    assert not torch.allclose(out.logits, out.distilled)


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
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch has no distributed part")
def test_replicas_stay_equal(tmp_path: Path) -> None:
    """After training on different halves of the batches, both processes hold the same weights."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(_replica, (port, str(tmp_path)), nprocs=2)


def test_cifar100_without_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "torchvision" else find(name)
    )
    with pytest.raises(SystemExit, match=r"not installed.*\n.*pip install torchvision"):
        distill.main(["--dataset", "cifar100", "--output", str(tmp_path)])

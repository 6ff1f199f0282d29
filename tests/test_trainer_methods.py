"""The methods of the reference trainer: what each trains, what it leaves alone, what it saves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from trainer import (
    BACKEND,
    World,
    digits,
    engine,
    extras,
    models,
    recipes,
    run,
    teacher,
    terms,
    tiny_job,
)

import kdkernels


def test_factor_autoencoder_learns_and_stays(tmp_path: Path) -> None:
    """IE-KD's auto-encoder reconstructs better after its preparation, then nothing moves it."""
    job = tiny_job(tmp_path, "iekd", "--option", "iekd.coder_epochs=30")
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
    engine.fit(job, World.join("cpu"), tmp_path)
    saved = torch.load(tmp_path / f"{job.name}.pt", weights_only=True)["model"]
    for name, value in factors.teacher.state_dict().items():
        assert saved[f"extra.teacher.{name}"].equal(value), name
    moved = saved["extra.exploration.1.weight"]
    assert not moved.equal(factors.exploration.state_dict()["1.weight"])


def test_refilled_stages(tmp_path: Path) -> None:
    """The first stage leaves the classifier alone; each stage has a cosine of its own."""
    job = tiny_job(tmp_path, "refilled", "--epochs", "4", "--option", "refilled.stage1=0.5")
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

    job.options["lr_warmup"] = 0.0
    rates = learning_rates(job)
    assert rates[:4] == rates[4:] == sorted(rates[:4], reverse=True)
    assert rates[0] == 1.0
    job.options["lr_warmup"] = 3 / 8  # of 8 steps, in every stage anew
    ramp = [a / b for a, b in zip(learning_rates(job), rates, strict=True)]
    assert ramp == pytest.approx([0.25, 0.5, 0.75, 1.0] * 2)
    job.options["stage1"] = 0.0
    ramp = learning_rates(job)
    assert ramp[0] == 0.25 and max(ramp) == ramp[3] and ramp[3:] == sorted(ramp[3:], reverse=True)


def learning_rates(job: engine.Job) -> list[float]:
    """Of 4 epochs of 2 steps each, where the rate asked for is 1."""
    optimizer = torch.optim.SGD(job.model.parameters(), lr=1.0)
    schedule = engine._schedule(optimizer, job, steps=2)
    rates = []
    for _ in range(8):
        rates += schedule.get_last_lr()
        optimizer.step()
        schedule.step()
    return rates


@pytest.mark.parametrize("amp", [None, "bf16"])
def test_gradients_are_clipped(
    amp: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No step is taken with a longer gradient than ``clip``, and 0 leaves them as they are."""
    norms: list[float] = []
    step = torch.optim.SGD.step

    def spy(self: torch.optim.SGD, *args: object) -> object:
        parts = [
            p.grad.norm() for g in self.param_groups for p in g["params"] if p.grad is not None
        ]
        norms.append(torch.stack(parts).norm().item())
        return step(self, *args)

    monkeypatch.setattr(torch.optim.SGD, "step", spy)
    for clip in (0.5, 0.0):
        job = tiny_job(tmp_path / str(clip), f"dist:clip={clip}", *(["--amp"] if amp else []))
        engine.fit(job, World.join("cpu"), tmp_path / str(clip))
    clipped, free = norms[: len(norms) // 2], norms[len(norms) // 2 :]
    assert len(clipped) == len(free) == 6
    assert max(clipped) < 0.5 + 1e-4 < max(free)


def test_mutual_students_both_learn(tmp_path: Path) -> None:
    """IE-DML: two students of different initial weights, neither of which bends the other."""
    job = tiny_job(tmp_path, "iedml")
    distiller = engine.Distiller(job)
    peer = distiller.extra
    assert isinstance(peer, extras.Peer)
    assert not peer.peer.head.weight.equal(job.model.head.weight)
    images, target = job.data.images[:20], job.data.targets[:20]
    student = job.model(images)
    logits, mine, theirs = peer(images, student.features)
    kd = terms.kd_loss(student.logits, logits.detach(), 1.0)
    (kd + terms.iekd_loss(mine.inheritance, mine.exploration, theirs.factor)).backward()
    assert all(p.grad is None for p in peer.peer.parameters())
    distiller.zero_grad()
    distiller(images, target, None, 1.0)
    assert job.teacher is not None
    distiller(images, target, job.teacher(images), 1.0).backward()
    assert all(p.grad is not None for p in distiller.parameters())


def test_extra_modules_are_trained_and_saved(tmp_path: Path) -> None:
    """A recipe may bring modules of its own, which train with the student."""

    def term(step: terms.Step) -> torch.Tensor:
        assert step.extra is not None
        return (step.extra(step.student.embedding) - step.teacher.embedding).square().mean()

    recipe = recipes.Recipe(
        "hint",
        "hint",
        "a test",
        term=term,
        extra=lambda student, teacher: torch.nn.Linear(student.width, teacher.width),
    )
    recipes.RECIPES["hint"] = recipe
    try:
        job = tiny_job(tmp_path, "hint")
    finally:
        del recipes.RECIPES["hint"]
    engine.fit(job, World.join("cpu"), tmp_path)
    saved = torch.load(tmp_path / f"{job.name}.pt", weights_only=True)["model"]
    start = engine.Distiller(job).state_dict()
    assert not saved["extra.weight"].equal(start["extra.weight"])


def test_serial_head_starts_as_nothing_trains_and_stays(tmp_path: Path) -> None:
    """AEKT's: cross-entropy trains it, the distillation passes it by, inference goes through it."""
    plain, serial = (models.build("4x1", digits(), 3, serial=s).eval() for s in (False, True))
    images = digits().images[:5]
    with torch.no_grad():
        assert all(a.equal(b) for a, b in zip(plain(images), serial(images), strict=True))

    job = tiny_job(tmp_path, "aekt")
    assert job.recipe.term is not None
    student, target = job.model(images), digits().targets[:5]
    term = job.recipe.term(
        terms.Step(student, teacher()(images), target, 1.0, job.options, BACKEND, None)
    )
    term.backward()
    assert job.model.head.weight.grad is not None and job.model.head.weight.grad.any()
    assert all(p.grad is None for p in job.model.serial.parameters())

    run(tmp_path, "--methods", "aekt", "--seeds", "0")
    saved = torch.load(
        tmp_path / "checkpoints" / "same" / "student-aekt-weak-seed0.pt", weights_only=True
    )
    weight = saved["model"]["student.serial.weight"]
    assert not weight.equal(torch.eye(10))
    job.model.load_state_dict(
        {key.removeprefix("student."): value for key, value in saved["model"].items()}
    )
    with torch.no_grad():
        out = job.model.eval()(images)
    assert not torch.allclose(out.logits, out.distilled)


def test_induced_classifier(tmp_path: Path) -> None:
    """Images of a class that lie together in the teacher's embedding are told apart by it."""
    job = tiny_job(tmp_path, "refilled")
    assert job.teacher is not None
    centers = extras.Centers(job.model, job.teacher)
    before = centers.accuracy(job.teacher, job.data)
    centers.prepare(job.teacher, job.data, 20, 0, job.options)
    job.teacher.eval()
    with torch.no_grad():
        embedding = job.teacher(job.data.test_images).embedding
        found = (embedding @ centers().T).argmax(1)
    expected = 100 * (found == job.data.test_targets).double().mean().item()
    assert centers.accuracy(job.teacher, job.data) == pytest.approx(expected)
    assert expected > before + 10

"""One comparison: the teachers of a label split, and students by method, teacher and seed."""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import models
import recipes
import report
from arguments import threads
from data import Data
from engine import History, Job, fit
from extras import Centers
from recipes import Method
from setups import SETUPS, Teaching
from world import World


class Runs:
    """Trains one network after the other and tells how far it is."""

    def __init__(self, args: argparse.Namespace, world: World, total: int) -> None:
        self.args, self.world, self.total, self.done = args, world, total, 0

    def __call__(self, job: Job, folder: Path) -> History:
        begin = time.perf_counter()
        history = fit(job, self.world, folder, save_every=self.args.save_every)
        self.done += 1
        if self.world.main:
            count = f"[{self.done:>{len(str(self.total))}}/{self.total}]"
            seconds = time.perf_counter() - begin
            print(f"{count} {job.name:<36} {history.final:6.2f} %  {seconds:6.1f} s", flush=True)
        return history


def split(args: argparse.Namespace, world: World, data: Data, name: str) -> report.Results:
    """Teachers and students, who know all classes, or those that the split gives them."""
    setup = SETUPS[args.dataset]
    labels = setup.splits[name]
    known = data if labels.teacher is None else data.only(labels.teacher)
    new = data if labels.student is None else data.only(labels.student)
    shared = labels.teacher == labels.student
    methods = [m for m in map(Method.parse, args.methods) if shared or not m.recipe.shared]
    if world.main:
        if labels.teacher is not None and labels.student is not None:
            known_, new_ = (", ".join(map(str, some)) for some in (labels.teacher, labels.student))
            print(f"\n{name}: the teachers know classes {known_}, the students {new_}", flush=True)
        left = [text for text in args.methods if Method.parse(text) not in methods]
        if left:
            print(f"without {', '.join(left)}: logits are compared between the same classes only")
    plain = [m for m in methods if m.recipe.term is None]
    taught = [m for m in methods if m.recipe.term is not None]
    pairs = [(t, m) for t in args.teachers for m in taught if m.teacher in (None, t)]
    teachers = [t for t in args.teachers if any(t == one for one, _ in pairs)]
    threads(args.threads)
    runs = Runs(args, world, len(teachers) + len(args.seeds) * (len(plain) + len(pairs)))

    place = f"{name}-validation" if args.validate else name
    folder = args.output / "checkpoints" / place
    teacher_folder = args.teacher_folder / place if args.teacher_folder else folder

    def student(method: Method, seed: int, teacher: models.ResNet | None, by: str | None) -> Job:
        return student_job(args, world, new, name, method, seed, teacher, by)

    reached: dict[str, dict[int, History]] = {m.label: {} for m in plain}
    timed: dict[str, Job] = {}
    for method in plain:
        for seed in args.seeds:
            job = student(method, seed, None, None)
            reached[method.label][seed] = runs(job, folder)
        timed[method.label] = job
    results = report.Results(
        split=name,
        settings={k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
        processes=world.size,
        device=str(world.device),
        images=len(new.subset(seen(args, new, name), 0).targets),
        tested=len(new.test_targets),
        parameters=models.parameters(models.build(args.student, new, 0)),
        plain=reached,
    )
    for by in teachers:
        lesson = teacher_job(args, world, known, name, by)
        threads(args.teacher_threads)
        history = runs(lesson, teacher_folder)
        threads(args.threads)
        lesson.model.requires_grad_(False)
        found = results.teachers[by] = report.Taught(
            teacher=history,
            parameters=models.parameters(lesson.model),
            images=len(lesson.data.targets),
        )
        for method in (m for t, m in pairs if t == by):
            label, jobs = method.label, {}
            found.students[label] = {}
            for seed in args.seeds:
                jobs[seed] = student(method, seed, lesson.model, by)
                found.students[label][seed] = runs(jobs[seed], folder)
            last = jobs[args.seeds[-1]]
            found.options[label] = last.options
            timed.setdefault(label, last)
            if world.main and method.recipe.extra is Centers:
                found.induced[label] = {s: _induced(jobs[s], lesson.model) for s in jobs}
    if world.main and args.times:
        results.steps = report.time_steps(timed)
        times = {label: report.time_loss(job) for label, job in timed.items()}
        results.times = {label: timing for label, timing in times.items() if timing is not None}
    return results


def seen(args: argparse.Namespace, data: Data, split: str) -> int | None:
    """Training images of a student; None: all."""
    each = args.images_per_class
    each = SETUPS[args.dataset].splits[split].images_per_class if each is None else each
    return each * data.classes if each else None


def overrides(args: argparse.Namespace) -> dict[str, float]:
    """``--option METHOD.NAME=VALUE``, as a mapping."""
    pairs = (item.split("=", 1) for item in args.option)
    return {key: float(value) for key, value in pairs}


def teaching(args: argparse.Namespace, name: str) -> Teaching:
    spec = SETUPS[args.dataset].teachers[name]
    return spec if args.teacher_epochs is None else replace(spec, epochs=args.teacher_epochs)


def _common(args: argparse.Namespace, world: World, split: str) -> dict[str, Any]:
    """What every checkpoint of a comparison depends on."""
    names = ("dataset", "validate", "amp", "weight_decay")
    kept = {name: getattr(args, name) for name in names}
    return {**kept, "split": split, "processes": world.size}


def student_job(
    args: argparse.Namespace,
    world: World,
    data: Data,
    split: str,
    method: Method,
    seed: int,
    teacher: models.ResNet | None,
    by: str | None,
) -> Job:
    options = method.options(args.dataset, overrides(args))
    count = seen(args, data, split)
    backend = args.backend if method.recipe.term is not None else None
    setup = SETUPS[args.dataset].splits[split]
    length = {"epochs": args.epochs or setup.epochs, "batch": args.batch or setup.batch}
    global_batch = args.global_batch_dist and world.size > 1
    return Job(
        name="-".join(["student", method.label, *([by] if by else []), f"seed{seed}"]),
        recipe=method.recipe,
        options=options,
        seed=seed,
        model=models.build(args.student, data, seed, serial=method.recipe.serial),
        data=data.subset(count, seed),
        epochs=length["epochs"],
        batch=length["batch"],
        lr=args.lr,
        weight_decay=args.weight_decay,
        amp=args.amp,
        backend=backend,
        settings={
            **_common(args, world, split),
            **length,
            "student": args.student,
            "lr": args.lr,
            "evaluate_every": args.evaluate_every,
            "images": count,
            "options": options,
            "backend": backend,
            "teacher": asdict(teaching(args, by)) if by else None,
            **({"global_batch": True} if global_batch else {}),
        },
        teacher=teacher,
        evaluate_every=args.evaluate_every,
        global_batch=global_batch,
    )


def teacher_job(args: argparse.Namespace, world: World, data: Data, split: str, name: str) -> Job:
    spec = teaching(args, name)
    return Job(
        name=f"teacher-{name}",
        recipe=recipes.RECIPES["ce"],
        options=recipes.TRAINING,
        seed=0,
        model=models.build(spec.size, data, 0),
        data=data.subset(spec.images, 0),
        epochs=spec.epochs,
        batch=spec.batch,
        lr=spec.lr,
        weight_decay=args.weight_decay,
        amp=args.amp,
        backend=None,
        settings={**_common(args, world, split), **asdict(spec)},
        evaluate_every=spec.epochs,
    )


def _induced(job: Job, teacher: models.ResNet) -> float:
    """Accuracy of the teacher's own embedding: by the nearest centre of the student's images."""
    centers = Centers(job.model, teacher).to(job.data.images.device)
    centers.prepare(teacher, job.data, job.batch, job.seed, job.options)
    return centers.accuracy(teacher, job.data)

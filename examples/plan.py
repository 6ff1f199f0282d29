"""What a comparison trains: the networks of a label split, and where their checkpoints lie."""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from typing import Any

import models
import recipes
from data import Data
from engine import Job
from recipes import Method
from setups import SETUPS, Teaching
from world import World


class Plan:
    """Teachers and students, who know all classes, or those that the split gives them."""

    def __init__(self, args: argparse.Namespace, world: World, data: Data, name: str) -> None:
        self.args, self.world, self.name = args, world, name
        labels = self.labels = SETUPS[args.dataset].splits[name]
        self.known = data if labels.teacher is None else data.only(labels.teacher)
        self.new = data if labels.student is None else data.only(labels.student)
        shared = labels.teacher == labels.student
        self.left = [m for m in args.methods if Method.parse(m).recipe.shared and not shared]
        methods = [Method.parse(text) for text in args.methods if text not in self.left]
        self.plain = list({m.label: m for m in methods if m.recipe.term is None}.values())
        taught = [m for m in methods if m.recipe.term is not None]
        pairs = [(t, m) for t in args.teachers for m in taught if m.teacher in (None, t)]
        self.pairs = list({(t, m.label): (t, m) for t, m in pairs}.values())
        self.teachers = [t for t in args.teachers if any(t == one for one, _ in self.pairs)]
        place = f"{name}-validation" if args.validate else name
        self.folder = args.output / "checkpoints" / place
        self.teacher_folder = args.teacher_folder / place if args.teacher_folder else self.folder

    def __len__(self) -> int:
        """Networks to train."""
        return len(self.teachers) + len(self.args.seeds) * (len(self.plain) + len(self.pairs))

    def teacher(self, by: str) -> Job:
        return teacher_job(self.args, self.world, self.known, self.name, by)

    def student(self, method: Method, seed: int, teacher: models.ResNet | None, by: Any) -> Job:
        return student_job(self.args, self.world, self.new, self.name, method, seed, teacher, by)


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


def _common(args: argparse.Namespace, world: World, split: str, data: Data) -> dict[str, Any]:
    """What every checkpoint of a comparison depends on."""
    names = ("dataset", "validate", "amp", "weight_decay")
    kept = {name: getattr(args, name) for name in names}
    return {**kept, "split": split, "processes": world.size, "data": data.stamp()}


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
    some = data.subset(count, seed)
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
        data=some,
        epochs=length["epochs"],
        batch=length["batch"],
        lr=args.lr,
        weight_decay=args.weight_decay,
        amp=args.amp,
        backend=backend,
        settings={
            **_common(args, world, split, some),
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
    some = data.subset(spec.images, 0)
    return Job(
        name=f"teacher-{name}",
        recipe=recipes.RECIPES["ce"],
        options=recipes.TRAINING,
        seed=0,
        model=models.build(spec.size, data, 0),
        data=some,
        epochs=spec.epochs,
        batch=spec.batch,
        lr=spec.lr,
        weight_decay=args.weight_decay,
        amp=args.amp,
        backend=None,
        settings={**_common(args, world, split, some), **asdict(spec)},
        evaluate_every=spec.epochs,
    )

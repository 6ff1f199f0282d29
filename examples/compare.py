"""One comparison: the teachers of a label split, and students by method, teacher and seed."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import models
import report
import side_by_side
from arguments import threads
from data import Data
from engine import History, Job, fit
from extras import Centers
from plan import Plan, seen
from world import World


class Runs:
    """Trains one network after the other and tells how far it is."""

    def __init__(self, args: argparse.Namespace, world: World, total: int) -> None:
        self.args, self.world, self.total = args, world, total
        self.told: set[str] = set()

    def __call__(self, job: Job, folder: Path) -> History:
        begin = time.perf_counter()
        history = fit(job, self.world, folder, save_every=self.args.save_every)
        if self.world.main and job.name not in self.told:
            self.tell(job.name, history.final, time.perf_counter() - begin)
        return history

    def tell(self, name: str, accuracy: float, seconds: float) -> None:
        self.told.add(name)
        count = f"[{len(self.told):>{len(str(self.total))}}/{self.total}]"
        print(f"{count} {name:<36} {accuracy:6.2f} %  {seconds:6.1f} s", flush=True)


def split(args: argparse.Namespace, world: World, data: Data, name: str) -> report.Results:
    """Teachers and students, who know all classes, or those that the split gives them."""
    plan = Plan(args, world, data, name)
    if not len(plan):
        raise SystemExit(f"--methods must have one for --splits {name}, got {args.methods}")
    if world.main:
        labels = plan.labels
        if labels.teacher is not None and labels.student is not None:
            known, new = (", ".join(map(str, some)) for some in (labels.teacher, labels.student))
            print(f"\n{name}: the teachers know classes {known}, the students {new}", flush=True)
        if plan.left:
            names = ", ".join(plan.left)
            print(f"without {names}: logits are compared between the same classes only")
    threads(args.threads)
    runs = Runs(args, world, len(plan))
    if args.jobs > 1:
        side_by_side.train(args, plan, runs.tell)

    reached: dict[str, dict[int, History]] = {m.label: {} for m in plan.plain}
    timed: dict[str, Job] = {}
    """By method and teacher, whose forward pass is part of a step."""
    alone: dict[str, Job] = {}
    """By method, whose loss takes as long with any teacher."""
    for method in plan.plain:
        for seed in args.seeds:
            job = plan.student(method, seed, None, None)
            reached[method.label][seed] = runs(job, plan.folder)
        timed[method.label] = job
    results = report.Results(
        split=name,
        settings={k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
        processes=world.size,
        device=str(world.device),
        images=len(plan.new.subset(seen(args, plan.new, name), 0).targets),
        tested=len(plan.new.test_targets),
        parameters=models.parameters(models.build(args.student, plan.new, 0)),
        plain=reached,
    )
    for by in plan.teachers:
        lesson = plan.teacher(by)
        threads(args.teacher_threads)
        history = runs(lesson, plan.teacher_folder)
        threads(args.threads)
        lesson.model.requires_grad_(False)
        found = results.teachers[by] = report.Taught(
            teacher=history,
            parameters=models.parameters(lesson.model),
            images=len(lesson.data.targets),
        )
        for method in (m for t, m in plan.pairs if t == by):
            label, jobs = method.label, {}
            found.students[label] = {}
            for seed in args.seeds:
                jobs[seed] = plan.student(method, seed, lesson.model, by)
                found.students[label][seed] = runs(jobs[seed], plan.folder)
            last = jobs[args.seeds[-1]]
            found.options[label] = last.options
            timed[f"{label}@{by}"] = last
            alone.setdefault(label, last)
            if world.main and method.recipe.extra is Centers:
                found.induced[label] = {s: _induced(jobs[s], lesson.model) for s in jobs}
    if world.main and args.times:
        results.steps = report.time_steps(timed)
        times = {label: report.time_loss(job) for label, job in alone.items()}
        results.times = {label: timing for label, timing in times.items() if timing is not None}
    return results


def _induced(job: Job, teacher: models.ResNet) -> float:
    """Accuracy of the teacher's own embedding: by the nearest centre of the student's images."""
    centers = Centers(job.model, teacher).to(job.data.images.device)
    centers.prepare(teacher, job.data, job.batch, job.seed, job.options)
    return centers.accuracy(teacher, job.data)

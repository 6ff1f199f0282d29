#!/usr/bin/env python
"""Train a teacher, then students with and without distillation, and compare them.

    python examples/distill.py                              # handwritten digits, about two minutes
    python examples/distill.py --methods ce dist --seeds 0 1 2 --student small
    python examples/distill.py --dataset cifar100 --data-root data --amp
    torchrun --nproc-per-node 4 examples/distill.py --dataset cifar100 --data-root data --amp

Results go to ``--output``: results.json, curves.png and checkpoints. The same command again resumes
where it was interrupted and skips what is done. Nothing here is needed to use the library: the
losses are called in terms.py, one line each.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

try:
    import figure
    import models
    import recipes
    import report
    from data import Data, load
    from engine import History, Job, World, fit
except ModuleNotFoundError as error:
    raise SystemExit(
        f"distill.py: {error}. The examples need:  pip install -e '.[examples]'"
    ) from error

DEFAULTS: dict[str, dict[str, Any]] = {
    "digits": {
        "teacher": "medium",
        "student": "tiny",
        "student_samples": 200,
        "teacher_epochs": 20,
        "epochs": 80,
        "batch": 50,
        "lr": 0.05,
        "weight_decay": 5e-4,
        "threads": 1,  # networks so small gain nothing from more, and a busy machine costs less
        "disjoint": True,
    },
    "cifar100": {
        "teacher": "huge",
        "student": "medium",
        "student_samples": None,
        "teacher_epochs": 240,
        "epochs": 240,
        "batch": 64,
        "lr": 0.05,
        "weight_decay": 5e-4,
        "threads": 0,
        "disjoint": False,
    },
}
"""What a data set takes when the command line does not say."""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--dataset", choices=sorted(DEFAULTS), default="digits")
    add("--data-root", metavar="DIR", help="where CIFAR-100 is or goes")
    add(
        "--methods",
        "--method",
        nargs="+",
        metavar="METHOD",
        choices=list(recipes.RECIPES),
        default=[name for name, recipe in recipes.RECIPES.items() if recipe.demo],
        help="any of " + ", ".join(recipes.RECIPES),
    )
    add(
        "--disjoint",
        action=argparse.BooleanOptionalAction,
        help="with refilled: also teach half of the classes by a teacher of the other half",
    )
    sizes = ", ".join(models.SIZES)
    add("--teacher", choices=list(models.SIZES), metavar="SIZE", help=f"one of {sizes}")
    add("--student", choices=list(models.SIZES), metavar="SIZE", help=f"one of {sizes}")
    add("--student-samples", type=int, metavar="N", help="training images the students see; 0: all")
    add("--seeds", type=int, nargs="+", metavar="SEED", default=[0, 1, 2, 3, 4])
    add("--teacher-epochs", type=int, metavar="N")
    add("--epochs", type=int, metavar="N", help="of the students")
    add("--batch", type=int, metavar="N", help="images a step, over all processes")
    add("--lr", type=float)
    add("--weight-decay", type=float)
    add(
        "--option",
        action="append",
        default=[],
        metavar="METHOD.NAME=VALUE",
        help="change a weight of a recipe, such as kd.temperature=2",
    )
    add("--backend", choices=["native", "triton", "reference"], help="of the losses; default: best")
    add("--amp", nargs="?", const="bf16", choices=["bf16", "fp16"], help="mixed precision")
    add("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    add("--threads", type=int, metavar="N", help="CPU threads; 0: as many as torch takes")
    add("--output", type=Path, default=Path("runs/distill"), metavar="DIR")
    add("--fresh", action="store_true", help="delete --output's checkpoints and start over")
    add("--save-every", type=int, default=10, metavar="N", help="epochs between checkpoints")
    add(
        "--validate",
        action="store_true",
        help="hold out 40 %% of the training images and evaluate there (to choose options)",
    )
    args = parser.parse_args(argv)
    for name, value in DEFAULTS[args.dataset].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.student_samples = args.student_samples or None
    for item in args.option:
        method, _, rest = item.partition(".")
        if method not in recipes.RECIPES or "=" not in rest:
            parser.error(f"--option must be METHOD.NAME=VALUE, got {item}")
    if args.amp == "fp16" and (args.device or "cuda") == "cpu":
        parser.error("--amp fp16 needs a GPU; on the CPU use --amp bf16")
    return args


def settings(args: argparse.Namespace, world: World, role: str, **more: Any) -> dict[str, Any]:
    """What a result depends on, apart from role, method and seed."""
    names = ["dataset", "validate", "teacher", "teacher_epochs", "batch", "lr", "weight_decay"]
    if role == "student":
        names += ["student", "student_samples", "epochs"]
    kept = {name: getattr(args, name) for name in names}
    return {**kept, "amp": args.amp, "processes": world.size, **more}


def job(
    args: argparse.Namespace,
    world: World,
    data: Data,
    role: str,
    method: str,
    seed: int,
    teacher: models.ResNet | None = None,
) -> Job:
    recipe = recipes.RECIPES[method]
    options = recipes.options(recipe, args.dataset, dict(o.split("=", 1) for o in args.option))
    size = args.teacher if role == "teacher" else args.student
    backend = args.backend if recipe.term is not None else None
    return Job(
        role=role,
        recipe=recipe,
        options=options,
        seed=seed,
        model=models.build(size, data.channels, data.classes, seed, serial=recipe.serial),
        data=data if role == "teacher" else data.subset(args.student_samples, seed),
        epochs=args.teacher_epochs if role == "teacher" else args.epochs,
        batch=args.batch,
        lr=args.lr,
        weight_decay=args.weight_decay,
        amp=args.amp,
        backend=backend,
        settings=settings(args, world, role, options=options, backend=backend),
        teacher=teacher,
    )


def compare(
    args: argparse.Namespace,
    world: World,
    task: str,
    teacher_data: Data,
    student_data: Data,
    folder: Path,
) -> report.Results:
    """Train the teacher, then a student for every method and seed."""

    def run(what: Job) -> History:
        history = fit(what, world, folder, save_every=args.save_every)
        if world.main:
            print(f"{what.name:<24} {history.accuracy[-1]:6.2f} %", flush=True)
        return history

    teaching = job(args, world, teacher_data, "teacher", "ce", 0)
    teacher_history = run(teaching)
    teacher = teaching.model.requires_grad_(False)
    histories: dict[str, dict[int, History]] = {method: {} for method in args.methods}
    last: dict[str, Job] = {}
    for seed in args.seeds:
        for method in args.methods:
            last[method] = job(args, world, student_data, "student", method, seed, teacher)
            histories[method][seed] = run(last[method])
    one = last[args.methods[0]]
    return report.Results(
        task=task,
        settings={k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
        processes=world.size,
        device=str(world.device),
        images=(len(teacher_data.targets), len(one.data.targets), len(one.data.test_targets)),
        sizes=(models.parameters(teacher), models.parameters(one.model)),
        teacher=teacher_history,
        students=histories,
        times={m: report.time_loss(j) for m, j in last.items()} if world.main else {},
        options={method: j.options for method, j in last.items()},
    )


def train(args: argparse.Namespace, world: World) -> list[report.Results]:
    """The comparison, and where it is asked for the one with disjoint labels."""
    data = load(args.dataset, args.data_root)
    data = (data.validation() if args.validate else data).to(world.device)
    folder = args.output / "checkpoints"
    if args.fresh and world.main:
        shutil.rmtree(folder, ignore_errors=True)
    world.barrier()
    found = [compare(args, world, args.dataset, data, data, folder)]
    if args.disjoint and "refilled" in args.methods:
        half = data.classes // 2
        samples = args.student_samples and max(1, args.student_samples // 2)  # as many of a class
        some = argparse.Namespace(**vars(args))
        some.methods, some.student_samples = ["ce", "refilled"], samples
        task = f"{args.dataset}, disjoint labels (teacher 0-{half - 1}, student {half}-"
        task += f"{data.classes - 1})"
        known, new = data.only(range(half)), data.only(range(half, data.classes))
        if world.main:
            print(f"\n{task}", flush=True)
        found.append(compare(some, world, task, known, new, folder / "disjoint"))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    world = World.join(args.device)
    try:
        results = train(args, world)
        if world.main:
            for one in results:
                print(f"\n{report.table(one)}")
            report.write(results, args.output)
            figure.write(results, args.output)
            print(f"\nFigure and numbers: {args.output}/curves.png, {args.output}/results.json")
    except KeyboardInterrupt:
        if world.main:
            print("\ninterrupted; the same command resumes")
        return 130
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    torch.backends.cudnn.deterministic = True
    raise SystemExit(main())

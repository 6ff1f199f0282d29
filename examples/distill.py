#!/usr/bin/env python
"""Train teachers, then students with and without distillation, and compare them.

    python examples/distill.py                  # Fashion-MNIST where it is found, else digits
    python examples/distill.py --methods ce kd dist --teachers weak medium strong --seeds 0 1 2
    python examples/distill.py --methods ce dist dist:gamma=0 dist:beta=0 --batch 128
    python examples/distill.py --methods ce refilled refilled:stage1=0 --splits disjoint
    python examples/distill.py --dataset cifar100 --data-root data --amp
    torchrun --nproc-per-node 4 examples/distill.py --dataset cifar100 --data-root data --amp

A method is NAME[:OPTION=VALUE,...][@TEACHER]: with some options changed, with one teacher only.
Results go to ``--output``: results.json, curves.png and checkpoints. The same command again resumes
where it was interrupted and skips what is done. Nothing here is needed to use the library: the
losses are called in terms.py, one line each.
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

try:
    import compare
    import figure
    import loaders
    import models
    import recipes
    import report
    import side_by_side
    from arguments import checked, decay, natural, positive, rate
    from setups import SETUPS
    from world import World
except ModuleNotFoundError as error:
    raise SystemExit(
        f"distill.py: {error}. The examples need:  pip install -e '.[examples]'"
    ) from error


def _option(text: str) -> None:
    method, _, rest = text.partition(".")
    if method not in (*recipes.RECIPES, "*"):
        raise ValueError(f"--option must be METHOD.NAME=VALUE, got {text}")
    recipes.change(rest, method)


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = result.add_argument
    add("--dataset", choices=sorted(SETUPS), help="default: fashion-mnist if found, else digits")
    add("--data-root", metavar="DIR", help=f"where the data is or goes; default: ${loaders.ROOT}")
    add(
        "--methods",
        "--method",
        nargs="+",
        metavar="METHOD",
        type=checked(recipes.Method.parse),
        help="NAME[:OPTION=VALUE,...][@TEACHER]; names: " + ", ".join(recipes.RECIPES),
    )
    add("--teachers", nargs="+", metavar="NAME", help="of the data set: weak, medium or strong")
    add("--splits", nargs="+", metavar="NAME", help="classes known: same, overlap or disjoint")
    add("--student", type=checked(models.size), metavar="WxB", help="width x blocks a stage")
    add("--images-per-class", type=natural, metavar="N", help="that the students see; 0: all")
    add("--seeds", type=int, nargs="+", metavar="SEED")
    add("--teacher-epochs", type=positive, metavar="N")
    add("--epochs", type=positive, metavar="N", help="of the students")
    add("--batch", type=positive, metavar="N", help="images a step, over all processes")
    add("--lr", type=rate)
    add("--weight-decay", type=decay)
    add(
        "--option",
        action="append",
        default=[],
        metavar="METHOD.NAME=VALUE",
        type=checked(_option),
        help="change an option of a method (*: of all), such as kd.temperature=2",
    )
    add("--backend", choices=["native", "triton", "reference"], help="of the losses; default: best")
    add("--amp", nargs="?", const="bf16", choices=["bf16", "fp16"], help="mixed precision")
    add(
        "--global-batch-dist",
        action="store_true",
        help="under torchrun: DIST's columns over the images of all processes, as of one batch",
    )
    add("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    add(
        "--threads",
        type=natural,
        metavar="N",
        help="CPU threads; 0: as many as torch takes; default: 1 or 2 for small networks",
    )
    add(
        "--jobs",
        type=positive,
        default=1,
        metavar="N",
        help="networks trained at once, each by a process with one CPU thread: for small networks",
    )
    add("--output", type=Path, default=Path("runs/distill"), metavar="DIR")
    add("--teacher-folder", type=Path, metavar="DIR", help="of teachers that several runs share")
    add("--fresh", action="store_true", help="delete --output's checkpoints and start over")
    add("--save-every", type=positive, default=10, metavar="N", help="epochs between checkpoints")
    add("--evaluate-every", type=positive, metavar="N", help="epochs between evaluations")
    add("--times", action=argparse.BooleanOptionalAction, default=True, help="of steps and losses")
    add(
        "--validate",
        action="store_true",
        help="hold out 40 %% of the training images, or 10000, and evaluate there "
        "(to choose options)",
    )
    return result


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    reader = parser()
    args = reader.parse_args(argv)
    if args.dataset is None:
        found = loaders.fashion_folder(args.data_root) is not None
        args.dataset = "fashion-mnist" if found else "digits"
        args.missing = not found
    setup = SETUPS[args.dataset]
    for name in ("student", "lr", "weight_decay", "evaluate_every"):
        if getattr(args, name) is None:
            setattr(args, name, getattr(setup, name))
    args.teacher_threads = setup.teacher_threads if args.threads is None else args.threads
    args.threads = setup.threads if args.threads is None else args.threads
    if args.jobs > 1 and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        reader.error("--jobs must be 1 under torchrun, whose processes train one network together")
    args.methods = list(dict.fromkeys(args.methods or setup.methods))
    args.seeds = list(dict.fromkeys(args.seeds or setup.seeds))
    args.splits = list(dict.fromkeys(args.splits or ["same"]))
    args.teachers = list(dict.fromkeys(args.teachers or ["medium"]))
    known = {"--teachers": (args.teachers, setup.teachers), "--splits": (args.splits, setup.splits)}
    for option, (names, choices) in known.items():
        for name in names:
            if name not in choices:
                reader.error(f"{option} of {args.dataset} must be {', '.join(choices)}, got {name}")
    for text in args.methods:
        teacher = recipes.Method.parse(text).teacher
        if teacher is not None and teacher not in args.teachers:
            reader.error(
                f"the teacher of {text} must be one of --teachers {' '.join(args.teachers)}"
            )
    if args.amp == "fp16" and (args.device == "cpu" or not torch.cuda.is_available()):
        reader.error("--amp fp16 needs a GPU; on the CPU use --amp bf16")
    return args


def run(args: argparse.Namespace, world: World) -> list[report.Results]:
    """Every label split of the command line, one after the other."""
    if world.main and getattr(args, "missing", False):
        print(
            f"Fashion-MNIST was not found; digits instead, on which teachers can show less.\n"
            f"{loaders.GET_FASHION}\n",
            flush=True,
        )
    torch.backends.cudnn.deterministic = True
    data = side_by_side.load(args).to(world.device)
    if args.fresh and world.main:
        shutil.rmtree(args.output / "checkpoints", ignore_errors=True)
    world.barrier()
    return [compare.split(args, world, data, name) for name in args.splits]


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    world = World.join(args.device)
    try:
        results = run(args, world)
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
    raise SystemExit(main())

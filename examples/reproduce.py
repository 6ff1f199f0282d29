#!/usr/bin/env python
"""What the papers claim, and what of it this trainer finds: the tables of examples/results/.

    python examples/reproduce.py                          # everything; resumes after an interrupt
    python examples/reproduce.py --tables main dist-terms
    python examples/reproduce.py --tables main --seeds 0  # what else is given goes to distill.py

Every table is one call of distill.py. Those that choose come first: they look at held-out training
images only, with seeds that no other table uses, and what they decided stands in recipes.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import claims
import distill
import figure
import report
import tables
from world import World


@dataclass(frozen=True)
class Table:
    name: str
    title: str
    arguments: str
    """Of distill.py."""
    folder: str
    """Of its checkpoints. Tables of the same settings share one: nothing is trained twice."""


STRENGTH = "--teachers weak medium strong"
CHOOSE = "--validate --seeds 10 11 12"
UNSTABLE = ("clip=0,lr_warmup=0", "clip=2,lr_warmup=0", "clip=0,lr_warmup=0.1")
STABILITY = " ".join(f"{m} " + " ".join(f"{m}:{o}" for o in UNSTABLE) for m in ("ce", "kd", "dist"))
BATCHES = ((16, 17), (32, 33), (128, 150), (256, 300))
"""Batch and epochs: about 300 steps each, as those of 50 in the table "main"."""

TABLES = (
    Table(
        "choose-stability",
        "clipping and warm-up, chosen on held-out training images",
        f"{CHOOSE} --methods {STABILITY}",
        "choices",
    ),
    Table(
        "choose-weights",
        "weights that are published in several versions, chosen on held-out training images",
        "--validate --seeds 10 11 --methods ce kd dkd:beta=1 dkd:beta=8 iekd:inheritance=200 "
        "iekd:inheritance=50,clip=0,lr_warmup=0",
        "choices",
    ),
    Table(
        "choose-dist",
        "DIST without clipping, at the published and at a lower temperature",
        f"{CHOOSE} --methods ce dist dist:clip=0,lr_warmup=0 dist:clip=0,lr_warmup=0,tau=1",
        "choices",
    ),
    Table(
        "choose-refilled",
        "REFILLED, chosen on held-out training images: the weight of stage 2, and whether stage 1",
        f"{CHOOSE} --splits disjoint --methods ce refilled:stage1=0,weight=100 "
        "refilled:stage1=0,weight=30 refilled:stage1=0,weight=10 refilled:stage1=0,weight=3 "
        "refilled:stage1=0.25,weight=10",
        "choices",
    ),
    Table(
        "main",
        "all methods, by the strength of the teacher",
        f"{STRENGTH} --methods ce kd dist dkd@medium aekt@medium iekd@medium iekd@strong",
        "main",
    ),
    Table(
        "refilled-same",
        "REFILLED with few images of the same classes",
        "--images-per-class 10 --methods ce refilled refilled:stage1=0",
        "refilled",
    ),
    Table(
        "refilled-overlap",
        "REFILLED with classes of which the teacher knows four of seven",
        "--splits overlap --seeds 0 1 2 --methods ce refilled refilled:stage1=0",
        "refilled",
    ),
    Table(
        "refilled-disjoint",
        "REFILLED with classes that the teacher never saw",
        "--splits disjoint --seeds 0 1 2 3 4 5 6 7 --methods ce refilled refilled:stage1=0",
        "refilled",
    ),
    Table(
        "dist-terms",
        "DIST's terms apart: gamma = 0 is the inter-class term alone, beta = 0 the intra-class one",
        "--methods ce kd dist dist:gamma=0 dist:beta=0",
        "main",
    ),
    Table(
        "iekd-kd",
        "IE-KD and KD in one loss",
        "--seeds 0 1 2 --methods ce kd iekd iekd:kd=0.9,ce=0.1",
        "main",
    ),
    *(
        Table(
            f"batch-{batch}",
            f"a batch of {batch} images, about 300 steps",
            f"--batch {batch} --epochs {epochs} --seeds 0 1 2 --methods ce kd dist",
            f"batch-{batch}",
        )
        for batch, epochs in BATCHES
    ),
    Table(
        "standardisation",
        "logit standardisation with KD, at the weights published with it",
        "--methods ce kd kd:standardize=1,temperature=2,weight=9",
        "main",
    ),
    Table(
        "iekd-terms",
        "IE-KD's halves apart: inheritance alone, exploration alone",
        "--methods ce iekd iekd:exploration=0 iekd:inheritance=0",
        "main",
    ),
)


def content(found: Sequence[report.Results]) -> dict[str, Any]:
    """What is kept of a table: the numbers that others are made of."""
    one = found[0]
    return {
        "images": {results.split: results.images for results in found},
        "tested": {results.split: results.tested for results in found},
        "student": f"{one.settings['student']}, {one.parameters} parameters",
        "teachers": {
            results.split: {
                name: {
                    "accuracy": taught.teacher.final,
                    "images": taught.images,
                    "parameters": taught.parameters,
                }
                for name, taught in results.teachers.items()
            }
            for results in found
        },
        "accuracy": {results.split: report.accuracies(results) for results in found},
        "induced": {
            results.split: {name: taught.induced for name, taught in results.teachers.items()}
            for results in found
            if any(taught.induced for taught in results.teachers.values())
        },
        "options": {m: o for r in found for t in r.teachers.values() for m, o in t.options.items()},
        "step_ms": {results.split: results.steps for results in found},
    }


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        epilog="what else is given goes to distill.py, for every table",
        allow_abbrev=False,
    )
    names = [table.name for table in TABLES]
    add = parser.add_argument
    add("--tables", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    add("--output", type=Path, default=Path("runs/reproduce"), metavar="DIR", help="checkpoints")
    add("--results", type=Path, metavar="DIR", help="tables, JSON, figure; default: --output")
    return parser.parse_known_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args, more = parse(argv)
    folder = args.results or args.output
    kept: dict[str, Any] = {}
    lines: list[str] = []
    for table in TABLES:
        if table.name not in args.tables:
            continue
        print(f"\n{table.name}: {table.title}", flush=True)
        shared = ["--output", str(args.output / table.folder)]
        shared += ["--teacher-folder", str(args.output / "teachers"), "--threads", "1"]
        times = "--times" if table.name == "main" else "--no-times"
        settings = distill.parse([*shared, times, *table.arguments.split(), *more])
        world = World.join(settings.device)
        try:
            found = distill.run(settings, world)
        except KeyboardInterrupt:
            print("\ninterrupted; the same command resumes")
            return 130
        kept[table.name] = {"title": table.title, "arguments": table.arguments, **content(found)}
        lines += ["", f"## {table.name}: {table.title}", "", f"    {table.arguments}", ""]
        for results in found:
            text = report.table(results)
            lines += [text, ""]
            print(f"\n{text}", flush=True)
        if table.name == "main":
            figure.write(found, folder, "strength.png")
    stamp = tables.versions()
    head = ", ".join(f"{name} {value}" for name, value in stamp.items())
    summary = claims.table(kept)
    missing = [table.name for table in TABLES if table.name not in kept]
    if missing:
        summary += ["", f"Tables that were not made: {', '.join(missing)}."]
    tables.write_json({**stamp, "tables": kept}, folder / "results.json")
    text = "\n".join(
        [
            "# What the papers claim, and what is found here",
            "",
            f"Written by `examples/reproduce.py` ({head}).",
            "Every table is one call of `examples/distill.py` with the arguments above it.",
            "",
            *summary,
            *lines,
        ]
    )
    (folder / "README.md").write_text(text.rstrip() + "\n")
    print("\n".join(["", *summary, "", f"Tables, numbers and figure: {folder}"]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

#!/usr/bin/env python
"""Distil a small language model: a teacher, then students with and without it, compared.

    python examples/distill_lm.py                          # the text of Python's own help
    python examples/distill_lm.py --text kjv.txt           # any English text, UTF-8
    python examples/distill_lm.py --methods ce kl kl:weight=1 jsd:beta=0.1 --seeds 0 1 2 3 4
    python examples/distill_lm.py --teacher topk           # from a cache of its 32 likeliest tokens
    torchrun --nproc-per-node 4 examples/distill_lm.py     # four processes, the same steps
    python examples/distill_lm.py --validate --seeds 10 11 # to choose options

A method is NAME[:OPTION=VALUE,...]. Results go to ``--output``: results.json, lm_curves.png and
checkpoints. The same command again resumes where it was interrupted and skips what is done.
Nothing here is needed to use the library: the losses are called in lm_methods.py.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

try:
    import lm_data
    import lm_engine
    import lm_figure
    import lm_models
    import lm_report
    import lm_teachers
    import models
    from arguments import checked, decay, dropped, natural, positive, rate, share, threads
    from lm_methods import METHODS, Method
    from world import World

    from kdkernels.functional import topk_kd_loss
    from kdkernels.teacher import top_k
except ModuleNotFoundError as error:
    raise SystemExit(
        f"distill_lm.py: {error}. The examples need:  pip install -e '.[examples]'"
    ) from error


SIZE = "width x blocks"


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = result.add_argument
    add("--text", type=Path, metavar="FILE", help="UTF-8; default: Python's pydoc_data.topics")
    add("--vocab-size", type=positive, default=2048, metavar="N", help="byte-pair tokens")
    add("--context", type=positive, default=64, metavar="N", help="tokens of a sequence")
    add(
        "--methods",
        nargs="+",
        metavar="METHOD",
        type=checked(Method.parse),
        help="NAME[:OPTION=VALUE,...]; names: " + ", ".join(METHODS) + "; default: all that the"
        " form of the teacher allows",
    )
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="SEED")
    add(
        "--teacher",
        choices=lm_teachers.FORMS,
        default="dense",
        help="how it reaches the student: its logits; its likeliest tokens, cached on disk once;"
        " hidden states and head",
    )
    add("--top-k", type=positive, default=32, metavar="K", help="tokens of --teacher topk")
    add(
        "--teacher-size",
        default="128x3",
        type=checked(models.size),
        metavar="WxB",
        help="width x blocks",
    )
    add("--teacher-steps", type=positive, default=400, metavar="N")
    add("--teacher-batch", type=positive, default=16, metavar="N", help="sequences a step")
    add("--teacher-lr", type=rate, default=8e-3)
    add("--dropout", type=dropped, default=0.2, help="of the teacher")
    add("--student", default="64x2", type=checked(models.size), metavar="WxB", help=SIZE)
    add("--share", type=share, default=0.25, help="of the training text that a student sees")
    add("--steps", type=positive, default=250, metavar="N", help="of the students")
    add("--batch", type=positive, default=8, metavar="N", help="sequences a step")
    add("--lr", type=rate, default=1.6e-2)
    add("--weight-decay", type=decay, default=1.0)
    add("--evaluate-every", type=positive, default=100, metavar="N", help="steps; and checkpoints")
    add("--backend", choices=["native", "triton", "reference"], help="of the losses; default: best")
    add("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    add("--threads", type=natural, default=0, metavar="N", help="of the CPU; 0: as torch has it")
    add("--output", type=Path, default=Path("runs/lm"), metavar="DIR")
    add("--fresh", action="store_true", help="delete --output's checkpoints and start over")
    add("--times", action=argparse.BooleanOptionalAction, default=True, help="of steps and losses")
    add(
        "--validate",
        action="store_true",
        help="hold out a part of the training text and evaluate there (to choose options)",
    )
    return result


def _methods(given: Sequence[str] | None, form: str) -> list[str]:
    """The methods, all that the form of the teacher allows where none is named."""
    allowed = [name for name in METHODS if form != "topk" or name in ("ce", *TOPK_DIVERGENCES)]
    for text in given or ():
        if text.partition(":")[0] not in allowed:
            raise SystemExit(
                f"distill_lm.py: --methods must be among {', '.join(allowed)} where --teacher is"
                f" {form}, got {text}"
            )
    return list(given or allowed)


TOPK_DIVERGENCES = ("kl", "reverse_kl", "jsd")
"""The methods that a teacher of a few tokens can teach."""


class Comparison:
    """The teacher and the students of one command line."""

    def __init__(self, args: argparse.Namespace, world: World) -> None:
        self.args, self.world = args, world
        self.device = world.device
        self.methods = [Method.parse(text) for text in dict.fromkeys(args.methods)]
        self.taught = any(method.entry is not None for method in self.methods)
        self.corpus = lm_data.corpus(args.text, args.vocab_size, validate=args.validate)
        if args.teacher == "topk":
            logits = torch.zeros(1, self.corpus.vocabulary)
            try:
                some = top_k(logits, args.top_k)
                topk_kd_loss(logits, some.ids, some.logprobs)
            except ValueError as error:
                raise SystemExit(f"distill_lm.py: --top-k: {error}") from None
        inputs, labels = lm_data.windows(self.corpus.held, args.context)
        self.held = inputs.to(self.device), labels.to(self.device)
        self.folder = args.output / "checkpoints" / ("validation" if args.validate else "main")
        self.total = self.taught + len(self.methods) * len(args.seeds)
        self.done = 0

    def job(
        self, name: str, method: Method, seed: int, network: lm_models.Decoder | None
    ) -> lm_engine.Job:
        """A student's; the teacher's own is ``teacher_job``."""
        args = self.args
        settings = self.settings("student", "share", "steps", "batch", "lr", "evaluate_every")
        stream, teacher = self.stream(args.share, seed), None
        if network is not None:
            settings |= {"backend": args.backend, "of": self.teacher_settings()}
            settings["form"] = args.teacher if args.teacher != "topk" else f"top-{args.top_k}"
            teacher = self.teacher(network, method, seed, stream)
        return lm_engine.Job(
            name=name,
            method=method,
            seed=seed,
            model=self.build(args.student, seed),
            stream=stream,
            held=self.held,
            context=args.context,
            steps=args.steps,
            batch=args.batch,
            lr=args.lr,
            weight_decay=args.weight_decay,
            evaluate_every=args.evaluate_every,
            backend=args.backend,
            settings={**settings, "options": dict(method.options)},
            teacher=teacher,
            world=self.world,
        )

    def teacher(
        self, network: lm_models.Decoder, method: Method, seed: int, stream: torch.Tensor
    ) -> lm_teachers.Teacher:
        """In the form that was asked for, with its cache where that is one."""
        args = self.args
        if args.teacher != "topk":
            return lm_teachers.Teacher(network, args.teacher)
        temperature = method.options["temperature"]
        of = json.dumps({"teacher": self.teacher_settings(), "share": args.share, "seed": seed})
        name = f"top{args.top_k}-seed{seed}-temperature{temperature:g}"
        folder = args.output / "teacher-cache" / ("validation" if args.validate else "main") / name
        how = (args.context, args.top_k, temperature, folder, of)
        if self.world.main:
            lm_teachers.cached(network, stream, *how)
        self.world.barrier()
        return lm_teachers.Teacher(network, "topk", lm_teachers.cached(network, stream, *how))

    def teacher_job(self) -> lm_engine.Job:
        args = self.args
        return lm_engine.Job(
            name="teacher",
            method=Method.parse("ce"),
            seed=0,
            model=self.build(args.teacher_size, 0, args.dropout),
            stream=self.stream(1.0, 0),
            held=self.held,
            context=args.context,
            steps=args.teacher_steps,
            batch=args.teacher_batch,
            lr=args.teacher_lr,
            weight_decay=args.weight_decay,
            evaluate_every=args.evaluate_every,
            backend=None,
            settings=self.teacher_settings(),
            world=self.world,
        )

    def settings(self, *names: str) -> dict[str, Any]:
        """What a checkpoint depends on: the text, by its tokens, and some of the arguments."""
        kept = ("vocab_size", "context", "validate", "weight_decay", *names)
        return {name: getattr(self.args, name) for name in kept} | {"text": self.corpus.stamp}

    def teacher_settings(self) -> dict[str, Any]:
        names = ("teacher_size", "teacher_steps", "teacher_batch", "teacher_lr", "dropout")
        settings = self.settings(*names, "evaluate_every")  # on which the dropout's draws depend
        if self.args.dropout and self.world.size > 1:  # each process draws masks of its own
            settings["processes"] = self.world.size
        return settings

    def build(self, size: str, seed: int, dropout: float = 0.0) -> lm_models.Decoder:
        args = self.args
        return lm_models.build(size, self.corpus.vocabulary, args.context, seed, dropout)

    def stream(self, share: float, seed: int) -> torch.Tensor:
        found = self.corpus.subset(share, seed)
        least = 3 * self.args.context
        if len(found) < least:
            raise SystemExit(
                f"distill_lm.py: the text of a run must have {least} tokens or more, got "
                f"{len(found)} ({self.corpus.tokens} to train on, of which {share:.0%})"
            )
        return found.to(self.device)

    def fit(self, job: lm_engine.Job) -> lm_engine.History:
        begin = time.perf_counter()
        history = lm_engine.fit(job, self.folder)
        self.done += 1
        count = f"[{self.done:>{len(str(self.total))}}/{self.total}]"
        seconds = time.perf_counter() - begin
        if self.world.main:
            print(f"{count} {job.name:<36} {history.final:6.3f} nats  {seconds:6.1f} s", flush=True)
        return history

    def run(self) -> lm_report.Results:
        args, corpus = self.args, self.corpus
        lesson = self.teacher_job()
        student = self.build(args.student, 0)
        results = lm_report.Results(
            settings={k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
            device=str(self.device),
            characters=corpus.characters,
            tokens=(corpus.tokens, int((self.held[1] != lm_data.IGNORED).sum())),
            vocabulary=corpus.vocabulary,
            parameters=(models.parameters(lesson.model), models.parameters(student)),
            seen=len(corpus.subset(args.share, 0)),
        )
        if self.taught:
            results.teacher = self.fit(lesson)
            lesson.model.requires_grad_(False)
        jobs: dict[str, lm_engine.Job] = {}
        for method in self.methods:
            teacher = lesson.model if method.entry is not None else None
            found = results.students[method.label] = {}
            for seed in args.seeds:
                job = self.job(f"student-{method.label}-seed{seed}", method, seed, teacher)
                found[seed] = self.fit(job)
            jobs[method.label] = job
            results.options[method.label] = dict(method.options)
        if args.times and self.world.main:
            results.times = lm_report.time_steps(jobs)
        return results


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    args.seeds = list(dict.fromkeys(args.seeds))  # a seed is counted once
    args.methods = _methods(args.methods, args.teacher)
    threads(args.threads)
    world = World.join(args.device)
    if args.fresh and world.main:
        shutil.rmtree(args.output / "checkpoints", ignore_errors=True)
    world.barrier()
    try:
        results = Comparison(args, world).run()
        if world.main:
            print(f"\n{lm_report.table(results)}")
            lm_report.write(results, args.output)
            lm_figure.write(results, args.output)
            print(f"\nFigure and numbers: {args.output}/lm_curves.png, {args.output}/results.json")
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

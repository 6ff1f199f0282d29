"""The networks of a comparison trained in several processes, each on one CPU thread.

A network of 20000 parameters gains little from a second thread. What a process leaves is a
checkpoint, the same to the bit as without processes: the comparison itself then goes through its
networks one after the other, and finds each of them done.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from typing import NamedTuple

import loaders
import torch
from data import Data
from engine import fit
from plan import Plan
from recipes import Method
from world import World


class Network(NamedTuple):
    split: str
    by: str | None
    """The teacher of a student; without a method the network itself, a teacher."""
    method: str | None = None
    seed: int = 0


class Trained(NamedTuple):
    name: str
    accuracy: float
    seconds: float


_given: tuple[argparse.Namespace, Data]
"""Of this process: set once, because data takes longer to load than a network to train."""


def load(args: argparse.Namespace) -> Data:
    data = loaders.load(args.dataset, args.data_root)
    return data.validation() if args.validate else data


def _begin(args: argparse.Namespace) -> None:
    global _given
    _given = args, load(args)  # with as many threads as where there are no jobs: means depend on it
    torch.set_num_threads(1)
    torch.backends.cudnn.deterministic = True


def _train(network: Network) -> Trained:
    args, data = _given
    world = World.join(args.device)
    plan = Plan(args, world, data.to(world.device), network.split)
    teacher, folder = None, plan.folder
    if network.by is not None:
        lesson = plan.teacher(network.by)
        begin = time.perf_counter()
        history = fit(lesson, world, plan.teacher_folder, save_every=args.save_every, quiet=True)
        if network.method is None:
            return Trained(lesson.name, history.final, time.perf_counter() - begin)
        teacher = lesson.model.requires_grad_(False)
    assert network.method is not None
    method = Method.parse(network.method)
    job = plan.student(method, network.seed, teacher, network.by)
    begin = time.perf_counter()
    history = fit(job, world, folder, save_every=args.save_every, quiet=True)
    return Trained(job.name, history.final, time.perf_counter() - begin)


def train(args: argparse.Namespace, plan: Plan, tell: Callable[[str, float, float], None]) -> None:
    """Train all networks of the plan; students begin when their teacher is done."""
    students = [
        (by, Network(plan.name, by, method.label, seed))
        for by, method in [*((None, m) for m in plan.plain), *plan.pairs]
        for seed in args.seeds
    ]
    # The largest teacher takes longest, so that it comes first.
    ready = [Network(plan.name, by) for by in reversed(plan.teachers)]
    ready += [network for by, network in students if by is None]
    # Not forked: threads of a product that ran here would be missing there.
    pool = ProcessPoolExecutor(args.jobs, get_context("spawn"), _begin, (args,))
    try:
        running: dict[Future[Trained], Network] = {}
        while ready or running:
            # No more than there are processes: what the pool holds it trains, whatever happens.
            while ready and len(running) < args.jobs:
                network = ready.pop(0)
                running[pool.submit(_train, network)] = network
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                network = running.pop(future)
                tell(*future.result())
                if network.method is None:
                    ready += [n for by, n in students if by == network.by]
    finally:
        pool.shutdown(cancel_futures=True)

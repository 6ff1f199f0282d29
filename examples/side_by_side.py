"""The networks of a comparison trained in several processes, each on one CPU thread.

A network of 20000 parameters gains little from a second thread. What a process leaves is a
checkpoint, the same to the bit as without processes: the comparison itself then goes through its
networks one after the other, and finds each of them done.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import loaders
import models
import torch
from data import Data
from engine import Job, fit
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


@functools.cache
def _plan(split: str) -> Plan:
    """Made once, because a split copies the images of its classes."""
    args, data = _given
    world = World.join(args.device)
    return Plan(args, world, data.to(world.device), split)


def _fit(plan: Plan, job: Job, folder: Path) -> Trained:
    begin = time.perf_counter()
    history = fit(job, plan.world, folder, save_every=plan.args.save_every, quiet=True)
    return Trained(job.name, history.final, time.perf_counter() - begin)


@functools.cache
def _teacher(split: str, by: str) -> tuple[models.ResNet, Trained]:
    """Trained by this process, or restored once for all its students."""
    plan = _plan(split)
    lesson = plan.teacher(by)
    trained = _fit(plan, lesson, plan.teacher_folder)
    return lesson.model.requires_grad_(False), trained


def _train(network: Network) -> Trained:
    teacher = None
    if network.by is not None:
        teacher, trained = _teacher(network.split, network.by)
        if network.method is None:
            return trained
    assert network.method is not None
    plan, method = _plan(network.split), Method.parse(network.method)
    return _fit(plan, plan.student(method, network.seed, teacher, network.by), plan.folder)


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

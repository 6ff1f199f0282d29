"""Processes of this machine that form a gloo group, for the tests of torch.distributed."""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from kdkernels.registry import LossSpec

Cases = Callable[[], Iterator[tuple[str, Callable[[], None]]]]

needs_processes = pytest.mark.skipif(
    not dist.is_available() or sys.platform != "linux", reason="torch.distributed is not available"
)


def of_this_world(specs: Sequence[LossSpec]) -> Sequence[LossSpec]:
    """The losses to try: all on two ranks, and the first of each family on more."""
    if dist.get_world_size() == 2:
        return specs
    return list({spec.family: spec for spec in reversed(specs)}.values())


def _worker(rank: int, path: str, world: int, cases: Cases, failures: Any) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{path}", rank=rank, world_size=world,
        timeout=timedelta(seconds=60),
    )  # fmt: skip
    name = "the cases"
    try:
        for name, case in cases():  # noqa: B007
            case()
    except Exception:
        failures.put(f"rank {rank}, {name}:\n{traceback.format_exc()}")
    finally:
        dist.destroy_process_group()


def run_on_ranks(world: int, cases: Cases) -> None:
    """Run cases, with their names, one after the other on every rank, up to the first failure."""
    # Ranks are forked from a process that has imported the tests: torch takes longer than these.
    context = mp.get_context("forkserver")
    context.set_forkserver_preload([cases.__module__])
    failures = context.SimpleQueue()
    arguments: Any = world, cases, failures
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        mp.start_processes(
            _worker, (os.path.join(folder, "rendezvous"), *arguments),
            nprocs=world, start_method="forkserver",
        )  # fmt: skip
    found = []
    while not failures.empty():
        found.append(failures.get())
    assert not found, "\n".join(found)

"""``python -m benchmarks.group_cost``: what ``process_group`` exchanges, and what a step takes.

Times are of gloo on the cores of this machine, which its processes share: they say what the calls
cost, not what a network does. For clusters there is arithmetic: what a rank receives, and how long
that takes at least at the bandwidth of a link.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from kdkernels import functional

from .machine import busy


class Workload(NamedTuple):
    """A loss of one rank's tensors, and the bytes that a rank gives to all others."""

    name: str
    loss: Callable[..., Tensor]
    shapes: tuple[tuple[int, ...], ...]
    given: int
    labels: bool = False

    def tensors(self) -> list[Tensor]:
        made = [torch.randn(shape) for shape in self.shapes]
        if self.labels:
            made.append(torch.randint(10, made[0].shape[:1]))
        return made


def moments(columns: int) -> int:
    """Rows, row term, and five float64 moments a column."""
    return 8 * (5 * columns + 2)


def embeddings(rows: int, *row: int) -> int:
    """Bytes of a rank's rows; before them each tensor's width and dtype, and the rows, in int64."""
    return 8 * (1 + 2 * len(row)) + rows * sum(row)


def _pairs(*shape: int) -> tuple[tuple[int, ...], ...]:
    return shape, shape


WORKLOADS = (
    Workload("mean of KD, 256 x 1000", functional.kd_loss, _pairs(256, 1000), 8),
    Workload("DIST, 256 x 1000", functional.dist_loss, _pairs(256, 1000), moments(1000)),
    Workload("DIST, 256 x 32000", functional.dist_loss, _pairs(256, 32000), moments(32000)),
    Workload("PKD, 8 x 256 x 14 x 14", functional.pkd_loss, _pairs(8, 256, 14, 14), moments(256)),
    Workload("RKD, 32 x 512", functional.rkd_loss, _pairs(32, 512), embeddings(32, 2048, 2048)),
    Workload(
        "REFILLED, stage 1, 32 x 512",
        functional.tuple_matching_loss, _pairs(32, 512), embeddings(32, 2048, 2048, 8), True,
    ),
)  # fmt: skip
RANKS = (8, 64, 512, 4096)
LINKS = {"NVLink, 450 GB/s": 450e9, "400 Gb/s": 50e9, "100 Gb/s": 12.5e9}
"""Bytes a second into one GPU."""


def _milliseconds(workload: Workload, steps: int, **options: Any) -> float:
    """Median of forward and backward passes."""
    student, *rest = workload.tensors()
    times = []
    for _ in range(steps + 2):
        leaf = student.detach().requires_grad_()
        dist.barrier()
        start = time.perf_counter()
        workload.loss(leaf, *rest, **options).backward()
        times.append(time.perf_counter() - start)
    return 1e3 * sorted(times[2:])[steps // 2]


def _rank(rank: int, path: str, ranks: int, steps: int) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=ranks)
    for workload in WORKLOADS:
        alone = _milliseconds(workload, steps)
        joined = _milliseconds(workload, steps, process_group=dist.group.WORLD)
        if rank == 0:
            print(f"| {workload.name} | {ranks} | {alone:.2f} | {joined:.2f} |", flush=True)
    dist.destroy_process_group()


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def arithmetic() -> str:
    """What a rank receives of all others, as a table."""
    lines = [
        f"| loss | a rank gives | {' | '.join(f'of {r} ranks' for r in RANKS)} |",
        "|---|---|" + "---|" * len(RANKS),
    ]
    for workload in WORKLOADS[1:]:  # an all-reduce of one number receives hardly more than one
        received = [(ranks - 1) * workload.given for ranks in RANKS]
        cells = [_bytes(workload.given), *map(_bytes, received)]
        lines.append(f"| {workload.name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def at_least() -> str:
    """Milliseconds that a rank receives for, by the bandwidth alone."""
    lines = [
        f"| loss | link | {' | '.join(f'{r} ranks' for r in RANKS)} |",
        "|---|---|" + "---|" * len(RANKS),
    ]
    for workload in WORKLOADS[1:]:
        for link, rate in LINKS.items():
            times = [1e3 * (ranks - 1) * workload.given / rate for ranks in RANKS]
            lines.append(f"| {workload.name} | {link} | {' | '.join(f'{t:.2g}' for t in times)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, nargs="*", default=[2, 4])
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    print("Arithmetic: bytes that a rank receives in a step\n")
    print(arithmetic())
    print("\nArithmetic: milliseconds at least, by the bandwidth alone\n")
    print(at_least())
    if not arguments.processes:
        return
    print(f"\nMeasured: gloo on {os.cpu_count()} cores, one thread a process. {busy()}\n")
    print("| loss | processes | ms alone | ms with the group |\n|---|---|---|---|", flush=True)
    for ranks in arguments.processes:
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "rendezvous")
            mp.spawn(_rank, (path, ranks, arguments.steps), nprocs=ranks)


if __name__ == "__main__":
    main()

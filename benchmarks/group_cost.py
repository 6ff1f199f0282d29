"""``python -m benchmarks.group_cost``: what ``process_group`` and ``tp_group`` exchange, and what a
step takes.

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


def ring(size: float, ranks: int) -> float:
    """Bytes that a rank receives for a sum of tensors of ``size`` bytes."""
    return 2 * (ranks - 1) / ranks * size


class Sharded(NamedTuple):
    """A loss of rows whose classes lie on the ranks."""

    name: str
    loss: Callable[..., Tensor]
    gathered: int
    """Bytes of a row that each rank gives to all others."""
    summed: Callable[[int], int]
    """Bytes of a row that are summed over so many ranks, in both passes."""
    labels: bool = False
    ids: int = 0
    """K, where the teacher is ids of all ranks' classes."""

    def received(self, rows: int, ranks: int) -> float:
        """Bytes. In a ring each part of a sum is received twice: to be added to, and as the sum."""
        each = (ranks - 1) * (AGREED + rows * self.gathered)
        return each + ring(rows * self.summed(ranks), ranks)

    def tensors(self, rows: int, classes: int, rank: int, ranks: int) -> list[Tensor]:
        """The rank's student first, then the other arguments."""
        generator = torch.Generator().manual_seed(0)
        shape = rows, classes
        student, teacher = (torch.randn(shape, generator=generator) for _ in range(2))
        own = slice(rank * classes // ranks, (rank + 1) * classes // ranks)
        made = [student[:, own].contiguous(), teacher[:, own].contiguous()]
        if self.ids:
            logprobs, ids = teacher.log_softmax(-1).topk(self.ids)
            made[1:] = [ids, logprobs]
        if self.labels:
            made.append(torch.randint(classes, (rows,), generator=generator))
        return made


AGREED = 40
"""Bytes that a rank gives first: rows, classes, dtype, gradient, options."""
SHARDED = (
    Sharded("KD", functional.kd_loss, 24, lambda ranks: 0),
    Sharded("JSD", functional.jsd_loss, 16, lambda ranks: 8 + 8 * ranks),
    Sharded("DKD", functional.dkd_loss, 32, lambda ranks: 8 + 16 * ranks, labels=True),
    Sharded("top 64", functional.topk_kd_loss, 0, lambda ranks: 8 * (64 + ranks), ids=64),
)
TOKENS, WIDTH = 4096, 4096
"""Of the model beside which a step of the loss is set, whose layers sum their activations."""
SPLITS = (2, 4, 8, 64)
RANKS = (8, 64, 512, 4096)
LINKS = {"NVLink, 450 GB/s": 450e9, "400 Gb/s": 50e9, "100 Gb/s": 12.5e9}
"""Bytes a second into one GPU."""


def _milliseconds(
    loss: Callable[..., Tensor], tensors: list[Tensor], steps: int, **options: Any
) -> float:
    """Median of forward and backward passes."""
    student, *rest = tensors
    times = []
    for _ in range(steps + 2):
        leaf = student.detach().requires_grad_()
        dist.barrier()
        start = time.perf_counter()
        loss(leaf, *rest, **options).backward()
        times.append(time.perf_counter() - start)
    return 1e3 * sorted(times[2:])[steps // 2]


def _rank(rank: int, path: str, ranks: int, steps: int) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=ranks)
    group = dist.group.WORLD

    def say(name: str, alone: float, joined: float) -> None:
        if rank == 0:
            print(f"| {name} | {ranks} | {alone:.2f} | {joined:.2f} |", flush=True)

    for workload in WORKLOADS:
        loss, tensors = workload.loss, workload.tensors()
        alone = _milliseconds(loss, tensors, steps)
        say(workload.name, alone, _milliseconds(loss, tensors, steps, process_group=group))
    for split in SHARDED:
        whole, own = (split.tensors(256, 8000, *of) for of in ((0, 1), (rank, ranks)))
        alone = _milliseconds(split.loss, whole, steps)
        joined = _milliseconds(split.loss, own, steps, tp_group=group)
        say(f"{split.name} over classes, 256 x 8000", alone, joined)
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


def classes() -> str:
    """What a rank receives where the classes lie on the ranks, beside a sum of activations."""
    lines = [
        f"| {TOKENS} tokens, over classes | {' | '.join(f'of {r} ranks' for r in SPLITS)} |",
        "|---|" + "---|" * len(SPLITS),
    ]
    for split in SHARDED:
        received = [split.received(TOKENS, r) for r in SPLITS]
        lines.append(f"| {split.name} | {' | '.join(map(_bytes, received))} |")
    layer = [ring(TOKENS * WIDTH * 2, r) for r in SPLITS]
    name = f"a layer's sum of bf16 activations, {WIDTH} wide"
    lines.append(f"| {name} | {' | '.join(map(_bytes, layer))} |")
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
    print("\nArithmetic: likewise, of ranks that share the classes\n")
    print(classes())
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

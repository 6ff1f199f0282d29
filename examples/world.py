"""This process, alone or among those that torchrun started."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class World:
    """This process among those that torchrun started; alone by default."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def main(self) -> bool:
        return self.rank == 0

    @staticmethod
    def join(device: str | None) -> World:
        kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return World(torch.device(kind))
        if kind == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            kind = f"cuda:{torch.cuda.current_device()}"
        if not dist.is_initialized():
            dist.init_process_group("nccl" if kind.startswith("cuda") else "gloo")
        return World(torch.device(kind), dist.get_rank(), size)

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def total(self, values: Tensor) -> Tensor:
        if self.size > 1:
            dist.all_reduce(values)
        return values

"""Losses of a group inside what trains on many processes: FSDP2, checkpointing, accumulated steps.

What the parameters' gradients must equal is one process's, on the rows of all ranks, in float64.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from every import GROUPED, example
from ranks import needs_processes, of_this_world, run_on_ranks
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from kdkernels.registry import LossSpec

OF_LOGITS = [spec for spec in GROUPED if spec.by_row or spec.family == "correlation"]
ROWS = 6


class Batch:
    """A loss's inputs, a linear model of its student's width, and the gradient that is right."""

    def __init__(self, spec: LossSpec) -> None:
        self.spec, self.case = spec, example(spec, torch.float64, ROWS)
        classes = self.case.student.shape[1]
        generator = torch.Generator().manual_seed(5)
        self.model = nn.Linear(classes, classes, bias=False).double()
        weight = torch.randn(classes, classes, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            self.model.weight.copy_(weight)
        leaf = weight.requires_grad_()
        loss = self.case.of(self.case.student @ leaf.T, backend="reference")
        self.expected = torch.autograd.grad(loss, leaf)[0]
        rank, world = dist.get_rank(), dist.get_world_size()
        edges = [0, 1, ROWS] if world == 2 else [0, 1, 3, 3, ROWS]
        self.own = slice(*edges[rank : rank + 2])

    def tensors(self, rows: slice) -> list[Tensor]:
        return [x[rows] if len(x) == ROWS else x for x in self.case.tensors]

    def loss(self, model: nn.Module, rows: slice, **options: Any) -> Tensor:
        student, *rest = self.tensors(rows)
        loss: Tensor = self.spec.module(**options)(model(student), *rest)
        return loss

    def check(self, gradient: Tensor | None) -> None:
        assert gradient is not None
        if isinstance(gradient, DTensor):
            gradient = gradient.full_tensor()
        torch.testing.assert_close(gradient, self.expected, rtol=1e-9, atol=1e-12)


def _sharded(spec: LossSpec) -> None:
    """FSDP2 averages over the ranks as DistributedDataParallel does."""
    batch = Batch(spec)
    fully_shard(batch.model)
    batch.loss(batch.model, batch.own, process_group=dist.group.WORLD).backward()
    batch.check(batch.model.weight.grad)


def _checkpointed(spec: LossSpec) -> None:
    """Model and loss run again in the backward pass, with their collectives."""
    batch = Batch(spec)
    model = DistributedDataParallel(batch.model)
    run = functools.partial(batch.loss, batch.model, batch.own, process_group=dist.group.WORLD)
    loss = checkpoint(run, use_reentrant=False)
    assert isinstance(loss, Tensor)
    loss.backward()
    gradient = model.module.weight.grad.clone()
    dist.all_reduce(gradient)  # the module itself was called: nobody averaged
    batch.check(gradient / dist.get_world_size())


def _accumulated(spec: LossSpec) -> None:
    """Two parts a rank, each divided by the step's rows over the ranks."""
    batch = Batch(spec)
    model = DistributedDataParallel(batch.model)
    items = ROWS / dist.get_world_size()
    middle = (batch.own.start + batch.own.stop) // 2
    first, last = slice(batch.own.start, middle), slice(middle, batch.own.stop)
    student, *rest = batch.tensors(first)
    with model.no_sync():
        spec.module()(model(student), *rest, num_items_in_batch=items).backward()
    student, *rest = batch.tensors(last)
    spec.module()(model(student), *rest, num_items_in_batch=items).backward()
    batch.check(model.module.weight.grad)


def _cases() -> Iterator[tuple[str, Callable[[], None]]]:
    for spec in of_this_world(OF_LOGITS):
        checks = {"FSDP2": _sharded, "checkpointed": _checkpointed}
        if spec.by_row:
            checks["accumulated"] = _accumulated
        for name, check in checks.items():
            yield f"{spec.name} {name}", functools.partial(check, spec)


@needs_processes
@pytest.mark.parametrize("world", [2, 4])
def test_every_loss_of_logits(world: int) -> None:
    run_on_ranks(world, _cases)

"""DTensors on processes of this machine: values and gradients of one process, however sharded."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from every import example, gradient
from ranks import needs_processes, run_on_ranks

from kdkernels.registry import SPECS, LossSpec

WORLD = 2
NUMBERS_OF_ROWS = ("token_weight", "temperature")


def _check(spec: LossSpec, reduction: str, dim: int, ignored: bool) -> None:
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    mesh = dist.init_device_mesh("cpu", (WORLD,))
    case = example(spec, rows=5)  # uneven shards
    options: dict[str, Any] = {"reduction": reduction}
    if ignored and spec.takes_target and spec.family != "embedding":
        labels = torch.tensor([-100, 2, -100, 3, 1, 2])  # more on one rank than on the other
        labels = labels[: len(case.student)]
        case.tensors[2 + (spec.family == "sampled") :] = []
        options[spec.target_name] = labels
    expected = case.of(case.student, **options)
    slope = gradient(case.function(**options), case.student)

    def place(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        at = Shard(dim) if dim < x.dim() else Replicate()
        return distribute_tensor(x, mesh, [at])

    leaf = place(case.student.clone()).requires_grad_()
    rest = [place(x) for x in case.tensors[1:]]
    loss = spec.function(leaf, *rest, **{k: place(v) for k, v in options.items()})
    assert isinstance(loss, DTensor)
    torch.testing.assert_close(loss.full_tensor(), expected, rtol=1e-5, atol=1e-6)
    loss.sum().backward()
    given: Any = leaf.grad
    torch.testing.assert_close(given.full_tensor(), slope, rtol=1e-5, atol=1e-7)
    if spec.by_row and dim == 0 and reduction == "none":
        assert loss.placements == (Shard(0),)  # rows that are sharded stay sharded
    with pytest.raises(TypeError, match="must be a DTensor"):
        spec.function(leaf, *case.tensors[1:], **options)


def _check_image() -> None:
    """Classes in dim 1: rows sharded behind them keep their place among the rows."""
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = dist.init_device_mesh("cpu", (WORLD,))
    generator = torch.Generator().manual_seed(5)
    student, teacher = (torch.randn(2, 7, 3, 4, generator=generator) for _ in range(2))
    labels = torch.randint(7, (2, 3, 4), generator=generator)
    spec = SPECS["dkd"]
    expected = spec.function(student, teacher, labels, reduction="none")
    s, t = (distribute_tensor(x, mesh, [Shard(2)]) for x in (student, teacher))
    y = distribute_tensor(labels, mesh, [Shard(1)])
    loss: Any = spec.function(s, t, y, reduction="none")
    assert loss.placements == (Shard(1),) and loss.shape == labels.shape
    torch.testing.assert_close(loss.full_tensor(), expected, rtol=1e-5, atol=1e-6)
    # Numbers of rows are sharded as the rows are.
    numbers = {name: 1 + torch.rand(2, 3, 4, generator=generator) for name in NUMBERS_OF_ROWS}
    expected = spec.function(student, teacher, labels, hard_weight=0.5, **numbers)
    sharded = {name: distribute_tensor(x, mesh, [Shard(1)]) for name, x in numbers.items()}
    loss = spec.function(s, t, y, hard_weight=0.5, **sharded)
    torch.testing.assert_close(loss.full_tensor(), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="return_parts must be False where logits are DTensors"):
        spec.function(s, t, y, return_parts=True)


def _check_sparse(spec: LossSpec) -> None:
    """Sharded rows of sparse teachers are refused in words."""
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = dist.init_device_mesh("cpu", (WORLD,))
    tensors = [distribute_tensor(x, mesh, [Shard(0)]) for x in example(spec).tensors[:3]]
    with pytest.raises(ValueError, match="student_logits must be a plain Tensor"):
        spec.function(*tensors)


def _cases() -> Iterator[tuple[str, Callable[[], None]]]:
    yield "image", _check_image
    for spec in SPECS.values():
        if spec.family == "sparse":
            yield spec.name, functools.partial(_check_sparse, spec)
            continue
        for reduction in ("mean", "sum", "none") if spec.by_row else ("mean", "sum"):
            for dim in (0, 1):
                for ignored in (False, True):
                    name = f"{spec.name} {reduction} Shard({dim}) ignored={ignored}"
                    yield name, functools.partial(_check, spec, reduction, dim, ignored)


@needs_processes
def test_every_loss_of_sharded_tensors() -> None:
    run_on_ranks(WORLD, _cases)

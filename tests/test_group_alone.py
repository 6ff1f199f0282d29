"""``process_group`` in one process: what is refused, what is exchanged, what underflows."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from every import GROUPED, example
from ranks import needs_processes
from torch import Tensor

from benchmarks import group_cost
from kdkernels import KDLoss, _group, _moments
from kdkernels.registry import LossSpec


@pytest.fixture
def alone(tmp_path: Any) -> Iterator[Any]:
    """A group of this process only."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/alone", rank=0, world_size=1)
    yield dist.group.WORLD
    if dist.is_initialized():
        dist.destroy_process_group()


def test_moments_that_underflow() -> None:
    """A float32 gradient cannot hold the slope of a norm of 1e-20: such a column is constant."""
    squares = torch.tensor([1e-40], dtype=torch.float64, requires_grad=True)
    one = torch.ones(1, dtype=torch.float64)
    for dtype, expected in ((torch.float64, 0.5), (torch.float32, 0.0)):
        moments = _moments.Moments(10 * one, squares, one, 5e-21 * one)
        rho = _moments.correlation(moments, 0.0, dtype)
        (slope,) = torch.autograd.grad(rho, squares)
        assert rho.item() == pytest.approx(expected)
        assert slope.item() == pytest.approx(-expected / 2 / 1e-40)


@needs_processes
def test_copies_of_a_module_share_its_group(alone: Any) -> None:
    """As an averaged copy of a model that holds its loss does."""
    loss = KDLoss(4.0, process_group=alone)
    copied = copy.deepcopy(torch.nn.ModuleList([loss]))[0]
    assert copied is not loss and copied.process_group is alone
    student, teacher = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(copied(student, teacher), loss(student, teacher))


@needs_processes
@pytest.mark.parametrize("workload", group_cost.WORKLOADS, ids=lambda workload: workload.name)
def test_ranks_give_the_bytes_that_the_arithmetic_says(
    workload: group_cost.Workload, alone: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = []

    def counted(function: Callable[..., Any], argument: int) -> Callable[..., Any]:
        def call(*tensors: Tensor, group: Any) -> Any:
            given.append(tensors[argument].nbytes)
            return function(*tensors, group=group)

        return call

    monkeypatch.setattr(_group, "_all_gather", counted(_group._all_gather, 1))
    monkeypatch.setattr(dist, "all_reduce", counted(dist.all_reduce, 0))
    workload.loss(*workload.tensors(), process_group=alone)
    assert sum(given) == workload.given
    assert f"| {workload.name} |" in group_cost.arithmetic() or workload.given == 8


every_grouped = pytest.mark.parametrize("spec", GROUPED, ids=lambda spec: spec.name)


@needs_processes
@every_grouped
def test_a_call_that_raises_does_so_before_a_collective(
    spec: LossSpec, alone: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other ranks would wait in theirs. A group of one rank changes nothing."""
    case = example(spec, torch.float64)
    expected = case.of(case.student)
    torch.testing.assert_close(case.of(case.student, process_group=alone), expected)

    def started(*_: Any, **__: Any) -> None:
        raise AssertionError("a collective has started")

    monkeypatch.setattr(_group, "_all_gather", started)
    monkeypatch.setattr(dist, "all_reduce", started)
    with pytest.raises(AssertionError, match="started"):
        case.of(case.student, process_group=alone)
    bad: list[dict[str, Any]] = [{"backend": "cuda"}, {"reduction": "avg"}, {"loss_weight": "1"}]
    if spec.by_row:
        bad += [{"reduction": "sum"}, {"reduction": "none"}, {"num_items_in_batch": 3}]
    for options in bad:
        with pytest.raises((ValueError, TypeError), match=rf"^{next(iter(options))} must be "):
            case.of(case.student, process_group=alone, **options)
    for i, name in enumerate(inspect.signature(spec.function).parameters):
        if i == len(case.tensors):
            break
        tensors = list(case.tensors)
        tensors[i] = tensors[i][..., None, None, None]
        with pytest.raises((ValueError, TypeError), match=r"_?\w+ must be "):
            spec.function(*tensors, process_group=alone)
        if spec.needs_target and spec.by_row and name == "target":
            tensors[i] = case.tensors[i] + 100
            with pytest.raises(ValueError, match=r"^class indices must be in"):
                spec.function(*tensors, process_group=alone)
    with pytest.raises(ValueError, match=r"^process_group must be None in a transform of torch"):
        torch.func.grad(case.function(process_group=alone))(case.student)


@needs_processes
@every_grouped
def test_groups_that_cannot_be(spec: LossSpec, alone: Any) -> None:
    from torch.distributed.tensor import Replicate, distribute_tensor

    mesh = dist.init_device_mesh("cpu", (1,))
    case = example(spec)
    sharded = [distribute_tensor(x, mesh, [Replicate()]) for x in case.tensors]
    with pytest.raises(ValueError, match=r"^process_group must be None where .* are DTensors"):
        spec.function(*sharded, process_group=alone)
    module = spec.module(process_group=alone)
    torch.testing.assert_close(module(*case.tensors), case.of(case.student))
    dist.destroy_process_group()
    for call in (lambda: module(*case.tensors), lambda: spec.module(process_group=alone)):
        with pytest.raises(ValueError, match=r"^process_group must be of an initialised torch"):
            call()

"""``tp_group``: classes on several ranks. What a loss must equal is itself, in float64 by the
reference, on the joined classes; a rank's gradient is its part of that one's."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from inputs import make
from ranks import needs_processes, run_on_ranks
from torch import Tensor
from torch.distributed.tensor.debug import CommDebugMode

from kdkernels import functional
from kdkernels.registry import SPECS, LossSpec

CLASSES = 23
CUTS = {
    "uneven": {2: (0, 8, 23), 4: (0, 1, 9, 15, 23)},
    "empty": {2: (0, 0, 23), 4: (0, 11, 11, 12, 23)},
}
TOLERANCES = {torch.float64: 1e-9, torch.float32: 2e-5, torch.bfloat16: 2e-2}
SHARDED = [
    spec
    for spec in SPECS.values()
    if spec.by_row
    and spec.family != "sparse"
    and "tp_group" in inspect.signature(spec.function).parameters
]


def _own(cut: str) -> slice:
    edges, rank = CUTS[cut][dist.get_world_size()], dist.get_rank()
    return slice(edges[rank], edges[rank + 1])


def _check(
    spec: LossSpec, family: str, dtype: torch.dtype, cut: str, options: dict[str, Any]
) -> None:
    student, teacher, target = make(family, 6, CLASSES, dtype=dtype)
    options = dict(options)
    if spec.takes_target and spec.target_name not in options:
        options[spec.target_name] = target.index_fill(0, torch.tensor([4]), -100)
    teachers: list[Tensor] = [teacher]
    if spec.family == "sampled":
        teachers = [target, teacher.double().log_softmax(-1).gather(1, target[:, None])[:, 0]]
    own = _own(cut)
    mine = [x[:, own].clone() if x.dim() == 2 else x for x in teachers]
    whole = [x.double() if x.is_floating_point() else x for x in teachers]
    leaf = student.double().clone().requires_grad_()
    wide = {
        k: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
        for k, x in options.items()
    }
    expected = spec.function(leaf, *whole, **wide, backend="reference")
    (slope,) = torch.autograd.grad(expected.sum(), leaf)
    shard = student[:, own].clone().requires_grad_()
    actual = spec.function(shard, *mine, **options, tp_group=dist.group.WORLD)
    actual.sum().backward()
    same = [torch.empty_like(actual) for _ in range(dist.get_world_size())]
    dist.all_gather(same, actual.detach())
    assert all(torch.equal(x, same[0]) for x in same)
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)
    assert shard.grad is not None
    size = slope.abs().max().item()
    torch.testing.assert_close(
        shard.grad.double(), slope[:, own], rtol=tolerance, atol=tolerance * size
    )


def _check_keywords(spec: LossSpec) -> None:
    weights = torch.linspace(0.5, 2, 6, dtype=torch.float64)
    for options in (
        {"hard_weight": 0.5, "token_weight": weights, "temperature": weights},
        {"reduction": "none"},
        {"num_items_in_batch": 11, "loss_weight": torch.tensor(0.5)},
    ):
        if spec.family != "sampled" or "temperature" not in options:
            _check(spec, "gaussian", torch.float64, "uneven", dict(options))


def _check_parts() -> None:
    student, teacher, target = make("gaussian", 6, CLASSES, dtype=torch.float64)
    own, options = _own("uneven"), {"target": target, "hard_weight": 0.5, "return_parts": True}
    _, expected = functional.dkd_loss(student, teacher, **options)
    _, parts = functional.dkd_loss(
        student[:, own], teacher[:, own], tp_group=dist.group.WORLD, **options
    )
    for a, b in zip(parts, expected, strict=True):
        torch.testing.assert_close(a, b)


def _check_excluded(spec: LossSpec) -> None:
    """All classes of the first rank excluded by both: nothing is NaN."""
    student, teacher, target = make("gaussian", 6, CLASSES, dtype=torch.float64)
    first = CUTS["uneven"][dist.get_world_size()][1]
    student[:, :first] = teacher[:, :first] = -torch.inf
    options = {spec.target_name: target.clamp(min=first)} if spec.takes_target else {}
    leaf = student.clone().requires_grad_()
    expected = spec.function(leaf, teacher, **options, backend="reference")
    (slope,) = torch.autograd.grad(expected, leaf)
    own = _own("uneven")
    shard = student[:, own].clone().requires_grad_()
    actual = spec.function(shard, teacher[:, own], **options, tp_group=dist.group.WORLD)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.autograd.grad(actual, shard)[0], slope[:, own])


def _check_collectives() -> None:
    student, teacher, _ = make("gaussian", 6, CLASSES)
    own = _own("uneven")
    for name, (forward, backward) in {"kd": (2, 0), "jsd": (4, 1)}.items():
        leaf = student[:, own].clone().requires_grad_()
        with CommDebugMode() as exchanged:
            loss = SPECS[name].function(leaf, teacher[:, own], tp_group=dist.group.WORLD)
        assert exchanged.get_total_counts() == forward
        with CommDebugMode() as exchanged:
            loss.backward()
        assert exchanged.get_total_counts() == backward


def _check_mismatch() -> None:
    rank = dist.get_rank()
    x = torch.randn(3 + rank, 5)
    with pytest.raises(ValueError, match=r"^tp_group must be given the same rows on all ranks, "):
        functional.kd_loss(x, x, tp_group=dist.group.WORLD)
    x = torch.randn(3, 5)
    with pytest.raises(ValueError, match=r"^tp_group must be given the same loss and options on"):
        functional.kd_loss(x, x, temperature=1.0 + rank, tp_group=dist.group.WORLD)
    y = torch.full((3,), 5 * dist.get_world_size())
    with pytest.raises(ValueError, match=rf"^target must be in \[0, {5 * dist.get_world_size()}\)"):
        functional.dkd_loss(x, x, y, tp_group=dist.group.WORLD)
    with pytest.raises(ValueError, match=r"^standardize must be False where tp_group is given"):
        functional.kd_loss(x, x, standardize=True, tp_group=dist.group.WORLD)


def _check_beside_rows() -> None:
    """Classes over two ranks, rows over two such pairs, of different numbers of rows."""
    ranks = [[0, 1], [2, 3], [0, 2], [1, 3]]
    groups: list[Any] = [dist.new_group(x) for x in ranks]
    column, row = dist.get_rank() % 2, dist.get_rank() // 2
    student, teacher, _ = make("gaussian", 6, CLASSES, dtype=torch.float64)
    leaf = student.clone().requires_grad_()
    expected = functional.jsd_loss(leaf, teacher, backend="reference")
    (slope,) = torch.autograd.grad(expected, leaf)
    own = (slice(0, 2) if row == 0 else slice(2, 6), slice(0, 9) if column == 0 else slice(9, 23))
    shard = student[own].clone().requires_grad_()
    given = {"tp_group": groups[row], "process_group": groups[2 + column]}
    loss = functional.jsd_loss(shard, teacher[own], **given)
    (actual,) = torch.autograd.grad(loss, shard)
    torch.testing.assert_close(actual, 2 * slope[own])
    total = loss.detach().clone()
    dist.all_reduce(total, group=groups[2 + column])
    torch.testing.assert_close(total / 2, expected.detach())


def _check_timeout() -> None:
    """A rank that raises leaves the others waiting, and they fail with the group's timeout."""
    group: Any = dist.new_group(timeout=timedelta(seconds=1))
    x = torch.randn(3, 5)
    bad = dist.get_rank() == 0
    with pytest.raises(ValueError if bad else RuntimeError):
        functional.kd_loss(x, x, temperature=-1.0 if bad else 1.0, tp_group=group)
    dist.barrier()


def _cases() -> Iterator[tuple[str, Callable[[], None]]]:
    for spec in SHARDED:
        for dtype in TOLERANCES:
            samples = spec.samples if dtype == torch.float64 else spec.samples[:1]
            for options in samples:
                if not options.get("standardize"):
                    for cut in CUTS:
                        check = functools.partial(
                            _check, spec, "gaussian", dtype, cut, dict(options)
                        )
                        yield f"{spec.name} {dtype} {cut} {options}", check
        yield f"{spec.name} keywords", functools.partial(_check_keywords, spec)
        if spec.family != "sampled":
            yield f"{spec.name} excluded", functools.partial(_check_excluded, spec)
    yield "parts", _check_parts
    yield "collectives", _check_collectives
    yield "mismatch", _check_mismatch
    if dist.get_world_size() == 2:
        yield "timeout", _check_timeout
    else:
        yield "beside rows", _check_beside_rows


@needs_processes
@pytest.mark.parametrize("world", (2, 4))
def test_every_row_loss_of_shards_of_classes(world: int) -> None:
    run_on_ranks(world, _cases)

"""``tp_group``: classes on several ranks. What a loss must equal is itself, in float64 by the
reference, on the joined classes; a rank's gradient is its part of that one's."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from inputs import make
from ranks import needs_processes, of_this_world, run_on_ranks
from torch import Tensor
from torch.distributed.tensor.debug import CommDebugMode

from benchmarks import group_cost
from kdkernels import _group, functional
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
    if spec.by_row and "tp_group" in inspect.signature(spec.function).parameters
]


def own_classes(cut: str) -> slice:
    edges, rank = CUTS[cut][dist.get_world_size()], dist.get_rank()
    return slice(edges[rank], edges[rank + 1])


def _teachers(spec: LossSpec, teacher: Tensor, target: Tensor) -> list[Tensor]:
    """What a loss takes as the teacher; ids are every rank's."""
    logprobs = teacher.double().log_softmax(-1)
    if spec.family == "sampled":
        return [target, logprobs.gather(1, target[:, None])[:, 0]]
    if spec.family == "sparse":  # an entry and a row are absent
        logprobs, ids = logprobs.topk(5)
        logprobs[0, 1] = logprobs[3] = -torch.inf
        return [ids, logprobs]
    return [teacher]


def _check(
    spec: LossSpec, family: str, dtype: torch.dtype, cut: str, options: dict[str, Any]
) -> None:
    student, teacher, target = make(family, 6, CLASSES, dtype=dtype)
    options = dict(options)
    if spec.takes_target and spec.target_name not in options:
        options[spec.target_name] = target.index_fill(0, torch.tensor([4]), -100)
    teachers = _teachers(spec, teacher, target)
    own = own_classes(cut)
    mine = [x[:, own].clone() if x.shape == student.shape else x for x in teachers]
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


def _check_no_rows(spec: LossSpec) -> None:
    student, teacher, target = make("gaussian", 6, CLASSES, dtype=torch.float64)
    own = own_classes("empty")
    teachers = _teachers(spec, teacher, target)
    mine = [x[:0, own] if x.shape == student.shape else x[:0] for x in teachers]
    options: dict[str, Any] = {}
    if spec.takes_target:
        options = {spec.target_name: target[:0], "hard_weight": 0.5, "return_parts": True}
    leaf = student[:0, own].clone().requires_grad_()
    loss = spec.function(leaf, *mine, **options, tp_group=dist.group.WORLD)
    loss = loss[0] if options else loss
    loss.backward()
    assert loss == 0 and leaf.grad is not None and leaf.grad.shape == leaf.shape


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
    own = own_classes("uneven")
    options = {"target": target, "hard_weight": 0.5, "return_parts": True}
    _, expected = functional.dkd_loss(student, teacher, **options)
    _, parts = functional.dkd_loss(
        student[:, own], teacher[:, own], tp_group=dist.group.WORLD, **options
    )
    for a, b in zip(parts, expected, strict=True):
        torch.testing.assert_close(a, b)


def _check_ids() -> None:
    """Ids of a sparse teacher: their mass, all of them, and wrong ones."""
    loss, group = functional.topk_kd_loss, dist.group.WORLD
    student, teacher, _ = make("gaussian", 6, CLASSES, dtype=torch.float64)
    own = own_classes("uneven")
    logprobs, ids = teacher.log_softmax(-1).topk(CLASSES)
    expected = functional.kd_loss(student, teacher, temperature=1.0)
    none = torch.full((6,), -torch.inf)
    actual = loss(student[:, own], ids, logprobs, log_rest=none, tp_group=group)
    torch.testing.assert_close(actual, expected)
    few = ids[:, :4], logprobs[:, :4]
    for tail in ("bucket", "renormalize"):
        given = {"tail": tail, "return_mass": True}
        _, wanted = loss(student, *few, backend="reference", **given)
        _, mass = loss(student[:, own], *few, tp_group=group, **given)
        for a, b in zip(mass, wanted, strict=True):
            torch.testing.assert_close(a, b)
    for wrong, said in ((CLASSES, rf"in \[0, {CLASSES}\)"), (-1, "in "), (3, "different")):
        changed = few[0].index_fill(1, torch.tensor([0, 1]), wrong)
        with pytest.raises(ValueError, match=f"^teacher_ids must be {said}"):
            loss(student[:, own], changed, few[1], tp_group=group)
    k = 3 + dist.get_rank()
    with pytest.raises(ValueError, match=r"^tp_group must be given the same loss and options on"):
        loss(student[:, own], ids[:, :k], logprobs[:, :k], tp_group=group)


def _check_excluded(spec: LossSpec) -> None:
    """All classes of the first rank excluded by both: nothing is NaN."""
    student, teacher, target = make("gaussian", 6, CLASSES, dtype=torch.float64)
    first = CUTS["uneven"][dist.get_world_size()][1]
    student[:, :first] = teacher[:, :first] = -torch.inf
    options = {spec.target_name: target.clamp(min=first)} if spec.takes_target else {}
    leaf = student.clone().requires_grad_()
    teachers = _teachers(spec, teacher, target)
    expected = spec.function(leaf, *teachers, **options, backend="reference")
    (slope,) = torch.autograd.grad(expected, leaf)
    own = own_classes("uneven")
    shard = student[:, own].clone().requires_grad_()
    mine = [x[:, own] if x.shape == student.shape else x for x in teachers]
    actual = spec.function(shard, *mine, **options, tp_group=dist.group.WORLD)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.autograd.grad(actual, shard)[0], slope[:, own])


def _is_exchanged(spec: LossSpec, given: dict[str, Any]) -> bool:
    """Whether the kernels of a loss with exchanged roles make the teacher's gradient."""
    defaults = inspect.signature(spec.function).parameters
    return spec.exchanged(*(given.get(k, defaults[k].default) for k in spec.options)) is not None


def _check_teacher(spec: LossSpec, options: dict[str, Any]) -> None:
    """``teacher_grad``: each rank's part of the teacher's gradient beside the student's."""
    given = make("gaussian", 6, CLASSES, dtype=torch.float64)
    target = given[2].index_fill(0, torch.tensor([4]), -100)
    options = {**options, spec.target_name: target, "hard_weight": 0.5, "teacher_grad": True}
    leaves = [x.clone().requires_grad_() for x in given[:2]]
    expected = spec.function(*leaves, **options, backend="reference")
    slopes = torch.autograd.grad(expected, leaves)
    for cut in CUTS:
        own = own_classes(cut)
        shards = [x[:, own].clone().requires_grad_() for x in given[:2]]
        actual = spec.function(*shards, **options, tp_group=dist.group.WORLD)
        torch.testing.assert_close(actual, expected)
        for one, slope in zip(torch.autograd.grad(actual, shards), slopes, strict=True):
            torch.testing.assert_close(one, slope[:, own])


def _check_collectives() -> None:
    student, teacher, target = make("gaussian", 6, CLASSES)
    own = own_classes("uneven")
    for name, (forward, backward) in {"kd": (2, 0), "jsd": (4, 1), "topk_kd": (2, 0)}.items():
        leaf = student[:, own].clone().requires_grad_()
        mine = (teacher[:, own],)
        if name == "topk_kd":
            mine = _teachers(SPECS[name], teacher, target)
        with CommDebugMode() as exchanged:
            loss = SPECS[name].function(leaf, *mine, tp_group=dist.group.WORLD)
        assert exchanged.get_total_counts() == forward
        with CommDebugMode() as exchanged:
            loss.backward()
        assert exchanged.get_total_counts() == backward


def _check_bytes() -> None:
    """What benchmarks/group_cost.py says that a rank gives."""
    rank, world = dist.get_rank(), dist.get_world_size()
    for split in group_cost.SHARDED:
        student, *rest = split.tensors(5, 90, rank, world)
        gathered: list[int] = []
        summed: list[int] = []

        def counting(function: Any, argument: int, given: list[int]) -> Any:
            def call(*tensors: Tensor, group: Any) -> Any:
                given.append(tensors[argument].nbytes)
                return function(*tensors, group=group)

            return call

        with (
            mock.patch.object(_group, "_all_gather", counting(_group._all_gather, 1, gathered)),
            mock.patch.object(dist, "all_reduce", counting(dist.all_reduce, 0, summed)),
        ):
            split.loss(student.requires_grad_(), *rest, tp_group=dist.group.WORLD).backward()
        assert sum(gathered) == group_cost.AGREED + 5 * split.gathered, split.name
        assert sum(summed) == 5 * split.summed(world), split.name


def _check_mismatch() -> None:
    rank = dist.get_rank()
    x = torch.randn(3 + rank, 5)
    with pytest.raises(ValueError, match=r"^tp_group must be given the same rows on all ranks, "):
        functional.kd_loss(x, x, tp_group=dist.group.WORLD)
    x = torch.randn(3, 5)
    with pytest.raises(ValueError, match=r"^tp_group must be given the same loss and options on"):
        functional.kd_loss(x, x, temperature=1.0 + rank, tp_group=dist.group.WORLD)
    y = torch.full((3,), 5 * dist.get_world_size())
    with pytest.raises(
        ValueError, match=rf"^class indices must be in \[0, {5 * dist.get_world_size()}\)"
    ):
        functional.dkd_loss(x, x, y, tp_group=dist.group.WORLD)
    with pytest.raises(ValueError, match=r"^standardize must be False where tp_group is given"):
        functional.kd_loss(x, x, standardize=True, tp_group=dist.group.WORLD)
    on: dict[str, Any] = {"teacher_grad": True, "tp_group": dist.group.WORLD}
    with pytest.raises(ValueError, match=r"^tp_group must be given the same loss and options on"):
        functional.jsd_loss(x, x.clone().requires_grad_(rank == 0), **on)


def _check_beside_rows(edge: int) -> None:
    """Classes over two ranks, rows over two such pairs, of different numbers of rows."""
    ranks = [[0, 1], [2, 3], [0, 2], [1, 3]]
    groups: list[Any] = [dist.new_group(x) for x in ranks]
    column, row = dist.get_rank() % 2, dist.get_rank() // 2
    student, teacher, _ = make("gaussian", 6, CLASSES, dtype=torch.float64)
    leaf = student.clone().requires_grad_()
    expected = functional.jsd_loss(leaf, teacher, backend="reference")
    (slope,) = torch.autograd.grad(expected, leaf)
    classes = slice(0, edge) if column == 0 else slice(edge, CLASSES)
    own = (slice(0, 2) if row == 0 else slice(2, 6), classes)
    shard = student[own].clone().requires_grad_()
    given = {"tp_group": groups[row], "process_group": groups[2 + column]}
    loss = functional.jsd_loss(shard, teacher[own], **given)
    (actual,) = torch.autograd.grad(loss, shard)
    torch.testing.assert_close(actual, 2 * slope[own])
    total = loss.detach().clone()
    dist.all_reduce(total, group=groups[2 + column])
    torch.testing.assert_close(total / 2, expected.detach())


def _check_small_rates() -> None:
    """Acceptance of drafts that are nearly all refused: the gradient has digits of its own size, in
    each class."""
    rank, world = dist.get_rank(), dist.get_world_size()
    far: dict[torch.dtype, tuple[float, ...]] = {
        torch.float32: (0.0, 3.0, 14.0, 20.0, 55.0),
        torch.float64: (0.0, 20.0, 300.0),
    }
    for dtype, sizes in far.items():
        for size in sizes:
            student = torch.tensor([[size, 0, 1, size, 0, 2, -1, 0.5]], dtype=dtype)
            teacher = torch.tensor([[0, size, 0, 0, 1, size - 2, 3, 1]], dtype=dtype)
            leaf = student.double().clone().requires_grad_()
            least = torch.minimum(leaf.log_softmax(-1), teacher.double().log_softmax(-1))
            expected = -least.logsumexp(-1).sum()
            (slope,) = torch.autograd.grad(expected, leaf)
            own = slice(8 // world * rank, 8 // world * (rank + 1))
            for backend in (None, "reference"):
                shard = student[:, own].clone().requires_grad_()
                loss = functional.acceptance_loss(
                    shard, teacher[:, own], tp_group=dist.group.WORLD, backend=backend
                )
                loss.backward()
                tolerance = {"rtol": 1e-5 if dtype == torch.float32 else 1e-10, "atol": 1e-300}
                torch.testing.assert_close(loss.double(), expected, **tolerance)
                assert shard.grad is not None
                torch.testing.assert_close(shard.grad.double(), slope[:, own], **tolerance)
    student, teacher = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(8))
    student[1] = teacher[2] = torch.nan  # of rows that are ignored
    shard = student[:, own].clone().requires_grad_()
    labels = torch.tensor([0, -100, -100])
    given = teacher[:, own], labels
    functional.acceptance_loss(shard, *given, tp_group=dist.group.WORLD).backward()
    assert shard.grad is not None
    assert shard.grad[0].isfinite().all() and shard.grad[0].any() and not shard.grad[1:].any()


def _check_second(spec: LossSpec) -> None:
    """Numbers of other ranks are constants in a gradient, which therefore has no derivative."""
    student, teacher, target = make("gaussian", 6, CLASSES, dtype=torch.float64)
    leaf = student[:, own_classes("uneven")].clone().requires_grad_()
    other = teacher if spec.family in ("sampled", "sparse") else teacher[:, own_classes("uneven")]
    given = {"target": target} if spec.needs_target else {}
    loss = spec.function(
        leaf, *_teachers(spec, other, target), **given, backend="reference",
        tp_group=dist.group.WORLD,
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(loss, leaf, create_graph=True)


def _check_timeout() -> None:
    """A rank that raises leaves the others waiting, and they fail with the group's timeout."""
    group: Any = dist.new_group(timeout=timedelta(seconds=1))
    x = torch.randn(3, 5)
    bad = dist.get_rank() == 0
    with pytest.raises(ValueError if bad else RuntimeError):
        functional.kd_loss(x, x, temperature=-1.0 if bad else 1.0, tp_group=group)
    dist.barrier()


def _cases() -> Iterator[tuple[str, Callable[[], None]]]:
    for spec in of_this_world(SHARDED):
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
        yield f"{spec.name} without rows", functools.partial(_check_no_rows, spec)
        yield f"{spec.name} twice", functools.partial(_check_second, spec)
        if spec.family != "sampled":  # a common offset, of which no rank may lose digits
            far = functools.partial(
                _check, spec, "offset", torch.float32, "uneven", {"temperature": 3.0}
            )
            yield f"{spec.name} far", far
        if spec.family != "sampled":
            yield f"{spec.name} excluded", functools.partial(_check_excluded, spec)
        if "teacher_grad" in inspect.signature(spec.function).parameters:
            for options in spec.samples:
                own = {k: x for k, x in options.items() if k in spec.options}
                if not options.get("standardize") and _is_exchanged(spec, own):
                    check = functools.partial(_check_teacher, spec, dict(options))
                    yield f"{spec.name} teacher {options}", check
    yield "parts", _check_parts
    yield "ids", _check_ids
    yield "collectives", _check_collectives
    yield "bytes", _check_bytes
    yield "mismatch", _check_mismatch
    yield "small rates", _check_small_rates
    if dist.get_world_size() == 2:
        yield "timeout", _check_timeout
    else:
        for edge in (9, CLASSES):  # of which the second rank has none
            yield f"beside rows {edge}", functools.partial(_check_beside_rows, edge)


@needs_processes
@pytest.mark.parametrize("world", (2, 4))
def test_every_row_loss_of_shards_of_classes(world: int) -> None:
    run_on_ranks(world, _cases)

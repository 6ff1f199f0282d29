"""DTensors on processes of this machine: values and gradients of one process, however sharded."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import LOSSES, SOFTMAX_ROWS
from every import example, gradient
from ranks import needs_processes, run_on_ranks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kdkernels import functional
from kdkernels.functional import ClassCenters, class_centers, semihard_tuples
from kdkernels.registry import SPECS, LossSpec
from kdkernels.teacher import EnsembleTeacher, LinearTeacher, TopKTeacher, top_k

WORLD = 2
NUMBERS_OF_ROWS = ("token_weight", "temperature")


def _check(spec: LossSpec, reduction: str, dim: int, ignored: bool) -> None:
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    mesh = dist.init_device_mesh("cpu", (WORLD,))
    case = example(spec, rows=5)  # uneven shards
    options: dict[str, Any] = {"reduction": reduction}
    if spec.counted is not None:
        case.tensors = case.tensors[:3]
        case.tensors[2][3] = -torch.inf  # a row of which the teacher says nothing
    if ignored and spec.takes_target and spec.family != "embedding":
        labels = torch.tensor([-100, 2, -100, 3, 1, 2])  # more on one rank than on the other
        labels = labels[: len(case.student)]
        case.tensors[2 + (spec.family in ("sampled", "sparse")) :] = []
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
    placed = {k: place(v) for k, v in options.items()}
    loss = spec.function(leaf, *rest, **placed)
    assert isinstance(loss, DTensor)
    torch.testing.assert_close(loss.full_tensor(), expected, rtol=1e-5, atol=1e-6)
    loss.sum().backward()
    given: Any = leaf.grad
    torch.testing.assert_close(given.full_tensor(), slope, rtol=1e-5, atol=1e-7)
    if spec.by_row and dim == 0 and reduction == "none":
        assert loss.placements == (Shard(0),)  # rows that are sharded stay sharded
    with pytest.raises(TypeError, match="must be a DTensor"):
        spec.function(leaf, *case.tensors[1:], **options)
    if spec.by_row and spec.family not in ("binary", "embedding"):  # what has parts
        _check_beside(spec, leaf, rest, placed, case.of(case.student, return_parts=True, **options))
    if spec.family == "divergence" and not spec.t_squared:  # what the user calls it
        heats = torch.ones(leaf.shape[:1])
        with pytest.raises(TypeError, match=r"^temperature must be a DTensor"):
            spec.function(leaf, *rest, **placed, temperature=heats)


def _check_beside(
    spec: LossSpec, leaf: Any, rest: list[Any], options: dict[str, Any], expected: Any
) -> None:
    """The loss's parts, and its entropies by row."""
    loss, parts = spec.function(leaf, *rest, return_parts=True, **options)
    for given, wanted in zip((loss, *parts), (expected[0], *expected[1]), strict=True):
        assert given.shape == wanted.shape
        torch.testing.assert_close(given.full_tensor(), wanted, rtol=1e-5, atol=1e-6)


class _Exchanged(TorchDispatchMode):
    """The number of elements of the largest tensor that a collective takes or gives."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func.namespace in ("c10d", "_c10d_functional"):
            for x in tree_leaves((args, kwargs, made)):
                if isinstance(x, torch.Tensor):
                    self.largest = max(self.largest, x.numel())
        return made


def _check_classes(spec: LossSpec) -> None:
    """Classes that are sharded stay so: numbers of rows are exchanged, and no logits. The gradient
    lies as the student does. Of losses that do not take ``tp_group`` they are gathered."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = dist.init_device_mesh("cpu", (WORLD,))
    generator = torch.Generator().manual_seed(7)
    rows, classes = 3, 501
    student, teacher = (torch.randn(rows, classes, generator=generator) for _ in range(2))
    labels = torch.tensor([500, 2, 100])
    options: dict[str, Any] = {spec.target_name: labels} if spec.needs_target else {}
    teachers = [teacher]
    if spec.family == "sampled":
        teachers = [labels, teacher.log_softmax(-1).gather(1, labels[:, None])[:, 0]]
    if spec.family == "sparse":
        teachers = [*reversed(teacher.log_softmax(-1).topk(5))]
    expected = spec.function(student.requires_grad_(), *teachers, **options)
    (slope,) = torch.autograd.grad(expected, student)

    def place(x: torch.Tensor) -> Any:
        return distribute_tensor(x, mesh, [Shard(1) if classes in x.shape else Replicate()])

    leaf, placed = place(student.detach()).requires_grad_(), [place(x) for x in teachers]
    with _Exchanged() as seen:
        loss = spec.function(leaf, *placed, **{k: place(v) for k, v in options.items()})
        loss.backward()
    by_shards = "tp_group" in inspect.signature(spec.function).parameters
    assert (seen.largest < rows * classes // WORLD) == by_shards
    torch.testing.assert_close(loss.full_tensor(), expected, rtol=1e-5, atol=1e-6)
    given: Any = leaf.grad
    assert given.placements == leaf.placements
    torch.testing.assert_close(given.full_tensor(), slope, rtol=1e-5, atol=1e-7)


def _check_standardized() -> None:
    """What shards cannot give is gathered."""
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = dist.init_device_mesh("cpu", (WORLD,))
    generator = torch.Generator().manual_seed(7)
    student, teacher = (torch.randn(5, 9, generator=generator) for _ in range(2))
    expected = SPECS["kd"].function(student, teacher, standardize=True)
    placed = [distribute_tensor(x, mesh, [Shard(1)]) for x in (student, teacher)]
    loss: Any = SPECS["kd"].function(*placed, standardize=True)
    torch.testing.assert_close(loss.full_tensor(), expected, rtol=1e-5, atol=1e-6)


def _check_both(reduction: str, spec: LossSpec) -> None:
    """Rows over one dimension of the mesh and classes over the other, either of which is uneven."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    generator = torch.Generator().manual_seed(7)
    student, teacher = (torch.randn(5, 5, generator=generator).double() for _ in range(2))
    labels = torch.tensor([1, -100, 3, 4, -100])
    weights = torch.rand(5, generator=generator).double()
    options: dict[str, Any] = {spec.target_name: labels, "token_weight": weights}
    options |= {"hard_weight": 0.5, "reduction": reduction}
    leaf = student.clone().requires_grad_()
    expected = spec.function(leaf, teacher, **options, backend="reference")
    (slope,) = torch.autograd.grad(expected.sum(), leaf)
    flat = dist.init_device_mesh("cpu", (4,))
    square = dist.init_device_mesh("cpu", (2, 2))
    for mesh, at, of_rows in (
        (square, [Shard(0), Shard(1)], [Shard(0), Replicate()]),
        (square, [Shard(1), Shard(0)], [Replicate(), Shard(0)]),
        (square, [Replicate(), Shard(1)], [Replicate(), Replicate()]),
        (square, [Shard(1), Shard(1)], [Replicate(), Replicate()]),  # gathered
        (flat, [Shard(1)], [Replicate()]),  # of which the last rank has none
    ):
        placed: Any = distribute_tensor(student, mesh, at).requires_grad_()
        given = {
            k: distribute_tensor(x, mesh, of_rows) if isinstance(x, torch.Tensor) else x
            for k, x in options.items()
        }
        loss: Any = spec.function(placed, distribute_tensor(teacher, mesh, at), **given)
        torch.testing.assert_close(loss.full_tensor(), expected.detach())
        loss.sum().backward()
        assert placed.grad.placements == tuple(at)
        torch.testing.assert_close(placed.grad.full_tensor(), slope)


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
    hard = {"hard_weight": 0.5}
    beside = spec.function(student, teacher, labels, return_parts=True, **hard)
    _check_beside(spec, s, [t, y], hard, beside)


def _check_plain(spec: LossSpec) -> None:
    """A DTensor beside plain tensors is refused by name, whatever it is."""
    from torch.distributed.tensor import Replicate, distribute_tensor

    mesh = dist.init_device_mesh("cpu", (WORLD,))
    case = example(spec)
    names = list(inspect.signature(spec.function).parameters)
    tensors = dict(zip(names, case.tensors, strict=False))
    given = dict(tensors)
    if spec.by_row and spec.family != "embedding":
        rows = torch.ones(len(case.student))
        given |= {name: rows for name in (*NUMBERS_OF_ROWS, "log_rest") if name in names}
        given[spec.target_name] = rows.long()
        numbers = ("loss_weight", "num_items_in_batch")
        given |= {name: torch.tensor(3.0) for name in numbers if name in names}
    for name in list(given)[1:]:
        placed = distribute_tensor(given[name], mesh, [Replicate()])
        with pytest.raises(TypeError, match=r"must be a (plain Tensor|DTensor), as "):
            spec.function(**{**tensors, name: placed})


def _check_head() -> None:
    """Likewise beside plain hidden states."""
    from torch.distributed.tensor import Replicate, distribute_tensor

    mesh = dist.init_device_mesh("cpu", (WORLD,))
    hidden, weight, teacher = torch.randn(3, 4), torch.randn(7, 4), torch.randn(3, 7)
    placed: Any = distribute_tensor(torch.ones(3, dtype=torch.int64), mesh, [Replicate()])
    for name, x in (("labels", placed), ("token_weight", placed.float())):
        with pytest.raises(TypeError, match=f"{name} must be a plain Tensor, as student_hidden"):
            functional.linear_kd_loss(hidden, weight, teacher, **{name: x})
    layer, pair = LinearTeacher(hidden, weight), top_k(teacher, 2)
    alike = [Replicate()]
    split: list[Any] = [distribute_tensor(x, mesh, alike) for x in (hidden, teacher, pair.logprobs)]
    ids = distribute_tensor(pair.ids, mesh, alike)
    for name, other, more in (
        ("teacher", split[1], {}),
        ("teacher.hidden", LinearTeacher(split[0], distribute_tensor(weight, mesh, alike)), {}),
        ("teacher.ids", TopKTeacher(ids, split[2]), {}),
        ("loss_weight", layer, {"loss_weight": distribute_tensor(torch.ones(()), mesh, alike)}),
    ):
        with pytest.raises(TypeError, match=f"^{name} must be a plain Tensor, as student_hidden"):
            functional.linear_kd_loss(hidden, weight, other, **more)
    with pytest.raises(TypeError, match="ids must be a plain Tensor, as hidden"):
        functional.linear_logprob(hidden, weight, placed)


def _check_narrow(spec: LossSpec, kind: torch.dtype) -> None:
    """Labels of a type that holds neither every class nor what is ignored."""
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = dist.init_device_mesh("cpu", (WORLD,))
    generator = torch.Generator().manual_seed(7)
    student, teacher = (torch.randn(6, 200, generator=generator) for _ in range(2))
    labels = torch.tensor([0, 100, 3, 100, 5, 0] if kind == torch.int8 else [0, 156, 3, 156, 5, 0])
    for ignored in (None, -100, 2**40 + 156):
        options: dict[str, Any] = {"ignore_index": ignored}
        if spec in SOFTMAX_ROWS and not spec.needs_target:
            options["hard_weight"] = 0.5
        expected = spec.function(student, teacher, **{spec.target_name: labels}, **options)
        for given in (labels, labels.to(kind)):
            y = distribute_tensor(given, mesh, [Shard(0)])
            s, t = (distribute_tensor(x, mesh, [Shard(0)]) for x in (student, teacher))
            loss: Any = spec.function(s, t, **{spec.target_name: y}, **options)
            torch.testing.assert_close(loss.full_tensor(), expected, rtol=1e-5, atol=1e-6)


def _check_sparse() -> None:
    """A teacher of a few ids a row: rows of images, the mass of its ids; and a plain student."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = dist.init_device_mesh("cpu", (WORLD,))
    generator = torch.Generator().manual_seed(5)
    student, teacher = (torch.randn(2, 7, 3, 4, generator=generator) for _ in range(2))
    logprobs, ids = teacher.log_softmax(1).movedim(1, -1).topk(3)
    spec = SPECS["topk_kd"]
    expected, mass = spec.function(student, ids, logprobs, return_mass=True)
    for dim, of_rows in ((2, Shard(1)), (1, Replicate())):
        s = distribute_tensor(student, mesh, [Shard(dim)])
        sparse = [distribute_tensor(x, mesh, [of_rows]) for x in (ids, logprobs)]
        loss, given = spec.function(s, *sparse, return_mass=True)
        for a, b in zip((loss, *given), (expected, *mass), strict=True):
            assert a.shape == b.shape
            torch.testing.assert_close(a.full_tensor(), b, rtol=1e-5, atol=1e-6)
    with pytest.raises(TypeError, match="teacher_ids must be a plain Tensor, as student_logits is"):
        spec.function(student, *sparse)


def _check_parts() -> None:
    """What stands beside the losses: miners and centres."""
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = dist.init_device_mesh("cpu", (WORLD,))
    embeddings = torch.randn(8, 3, generator=torch.Generator().manual_seed(6))
    target = torch.arange(8) % 3
    x, y = (distribute_tensor(tensor, mesh, [Shard(0)]) for tensor in (embeddings, target))
    for function in (semihard_tuples, functools.partial(class_centers, num_classes=3)):
        given: Any = function(x, y)
        assert torch.equal(given.full_tensor(), function(embeddings, target))
    with pytest.raises(TypeError, match="embeddings must be a plain Tensor"):
        ClassCenters(3, 3).update(x, y)


def _check_numbers(dim: int) -> None:
    """Numbers that are DTensors of no dimension; several teachers beside tensors of other kinds."""
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    mesh = dist.init_device_mesh("cpu", (WORLD,))
    generator = torch.Generator().manual_seed(7)
    student, teacher = torch.randn(2, 5, 7, generator=generator)
    labels = torch.arange(5)
    s, t = (distribute_tensor(x, mesh, [Shard(dim)]) for x in (student, teacher))
    y = distribute_tensor(labels, mesh, [Shard(0) if dim == 0 else Replicate()])
    two = DTensor.from_local(torch.tensor(2.0), mesh, [Replicate()])
    hard = {"hard_weight": 0.5}
    for loss, alone in (
        (functional.jsd_loss(s, t, temperature=two),
         functional.jsd_loss(student, teacher, temperature=2.0)),
        (functional.jsd_loss(s, t, y, loss_weight=two, **hard),
         functional.jsd_loss(student, teacher, labels, loss_weight=2.0, **hard)),
        (functional.kd_loss(s, [t, s], two), functional.kd_loss(student, [teacher, student], 2.0)),
    ):  # fmt: skip
        torch.testing.assert_close(loss.full_tensor(), alone)
    for other, temperature in (
        ([t, teacher], 2.0),
        (EnsembleTeacher([t, t], torch.ones(2, 5)), 2.0),
        ([t, t], torch.ones(5)),
    ):
        with pytest.raises(TypeError, match="must be a DTensor, as the others are, got Tensor"):
            functional.kd_loss(s, other, temperature)


def _check_second() -> None:
    """Not of sharded classes, nor by the reference."""
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = dist.init_device_mesh("cpu", (WORLD,))
    s, t = (distribute_tensor(torch.randn(4, 6), mesh, [Shard(1)]) for _ in range(2))
    loss = functional.kd_loss(s.requires_grad_(), t, 2.0, backend="reference")
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(loss, s, create_graph=True)


def _cases() -> Iterator[tuple[str, Callable[[], None]]]:
    yield "image", _check_image
    yield "sparse", _check_sparse
    yield "head", _check_head
    yield "parts", _check_parts
    for dim in (0, 1):
        yield f"numbers {dim}", functools.partial(_check_numbers, dim)
    yield "twice", _check_second
    for spec in SPECS.values():
        yield f"{spec.name} plain", functools.partial(_check_plain, spec)
        if spec in LOSSES and spec.takes_target:
            for kind in (torch.uint8, torch.int8, torch.int32):
                yield f"{spec.name} {kind}", functools.partial(_check_narrow, spec, kind)
    yield "standardized", _check_standardized
    for spec in SPECS.values():
        if spec.by_row:
            yield f"{spec.name} classes", functools.partial(_check_classes, spec)
    for spec in SPECS.values():
        for reduction in ("mean", "sum", "none") if spec.by_row else ("mean", "sum"):
            for dim in (0, 1):
                for ignored in (False, True):
                    name = f"{spec.name} {reduction} Shard({dim}) ignored={ignored}"
                    yield name, functools.partial(_check, spec, reduction, dim, ignored)


def _cases_of_both() -> Iterator[tuple[str, Callable[[], None]]]:
    for name in ("kd", "jsd", "dkd"):
        for reduction in ("mean", "none"):
            yield f"{name} {reduction}", functools.partial(_check_both, reduction, SPECS[name])


@needs_processes
def test_rows_and_classes_of_sharded_tensors() -> None:
    run_on_ranks(4, _cases_of_both)


@needs_processes
def test_every_loss_of_sharded_tensors() -> None:
    run_on_ranks(WORLD, _cases)

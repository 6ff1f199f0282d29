"""``process_group``: the loss of the joined batch, on processes of this machine.

What a loss must equal is itself, in float64 by the reference, on the rows of all ranks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import LOSSES
from every import GROUPED, example
from inputs import make
from ranks import needs_processes, of_this_world, run_on_ranks
from torch import Tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel

from kdkernels import functional
from kdkernels.registry import SPECS, LossSpec

CUTS = {
    "uneven": {2: (0, 0.3, 1), 4: (0, 0.2, 0.5, 0.9, 1)},
    "empty": {2: (0, 0, 1), 4: (0, 0.5, 0.5, 1, 1)},
    "no rows": {2: (0, 0, 0), 4: (0, 0, 0, 0, 0)},
}
"""Where the batch is cut into the ranks' shards, as fractions of its rows."""
TOLERANCES = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 1e-2}
OF_MASKS = [spec for spec in GROUPED if spec in LOSSES or spec.family == "sparse"]


class Shards:
    """A batch cut into the ranks' parts."""

    def __init__(self, cut: str, rows: int) -> None:
        self.world, self.rank = dist.get_world_size(), dist.get_rank()
        edges = [round(x * rows) for x in CUTS[cut][self.world]]
        self.rows, self.total = rows, edges[-1]
        self.own = slice(*edges[self.rank : self.rank + 2])

    def __call__(self, x: Any) -> Any:
        of_rows = isinstance(x, Tensor) and x.dim() and len(x) == self.rows
        return x[self.own].clone() if of_rows else x

    def whole(self, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        x = x[: self.total] if x.dim() and len(x) == self.rows else x
        return x.detach().double() if x.is_floating_point() else x


def _summed(x: Tensor) -> Tensor:
    total = x.detach().double().clone()
    dist.all_reduce(total)
    return total


def _close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    size = expected.abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(
        actual.double(), expected, rtol=tolerance, atol=tolerance * size + 1e-15
    )


def _check(
    spec: LossSpec, tensors: list[Tensor], cut: str, options: dict[str, Any], tolerance: float
) -> None:
    """Value, and gradient by the rank's rows, of which W times the derivative is wanted."""
    shards = Shards(cut, len(tensors[0]))
    student, *rest = (shards.whole(x) for x in tensors)
    student.requires_grad_()
    whole_options = {k: shards.whole(v) for k, v in options.items()}
    expected = spec.function(student, *rest, **whole_options, backend="reference")
    (slope,) = torch.autograd.grad(expected, student)

    leaf, *others = (shards(x) for x in tensors)
    given = {k: shards(v) for k, v in options.items()}
    before = [x.clone() for x in (leaf, *others)]
    loss = spec.function(leaf.requires_grad_(), *others, **given, process_group=dist.group.WORLD)
    loss.backward()
    assert all(torch.equal(a, b) for a, b in zip((leaf, *others), before, strict=True))
    mean = _summed(loss) / shards.world
    if not spec.by_row:
        assert torch.equal(mean, loss.detach().double())  # the same on every rank
    _close(mean, expected.detach(), tolerance)
    assert leaf.grad is not None and leaf.grad.dtype == leaf.dtype
    _close(leaf.grad, shards.world * slope[shards.own], tolerance)


class _Scaled(torch.nn.Module):
    """A model with one number for each element of a sample."""

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.scale = torch.nn.Parameter(
            1 + 0.1 * torch.randn(like.shape[1:], generator=generator, dtype=torch.float64)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def _check_trained(spec: LossSpec, cut: str) -> None:
    """Parameters' gradients under DistributedDataParallel are those of one process."""
    tensors = example(spec, torch.float64).tensors
    shards = Shards(cut, len(tensors[0]))
    model = _Scaled(tensors[0])
    student, *rest = (shards.whole(x) for x in tensors)
    expected = spec.function(model(student), *rest, backend="reference")
    (slope,) = torch.autograd.grad(expected, model.scale)
    wrapped = DistributedDataParallel(model)
    loss = spec.module(process_group=dist.group.WORLD)
    student, *rest = (shards(x) for x in tensors)
    loss(wrapped(student), *rest).backward()
    _close(model.scale.grad, slope, 1e-10)


def _check_masked(spec: LossSpec, labels: Tensor) -> None:
    """Rows that are ignored on one rank only, or all rows of one."""
    case = example(spec, torch.float64)
    options: dict[str, Any] = {spec.target_name: labels}
    other = {spec.target_name: labels.abs().clamp(max=2), "ignore_index": 2}
    tensors = case.tensors[: 3 if spec.family == "sparse" else 2]
    _check(spec, tensors, "uneven", options, 1e-10)
    if not spec.needs_target:
        _check(spec, tensors, "uneven", {spec.target_name: labels != -100}, 1e-10)
    if spec.counted is not None:
        silent = tensors[2].clone()
        silent[1::3] = -torch.inf  # rows of which the teacher says nothing
        for masked in ({}, options):
            _check(spec, [*tensors[:2], silent], "uneven", masked, 1e-10)
    _check(spec, tensors, "uneven", other, 1e-10)


def _check_keywords() -> None:
    """Weights, cross-entropy, learned weights, and parts, one collective for all."""
    student, teacher, labels = make("gaussian", 6, 7, dtype=torch.float64)
    labels = labels.clamp(min=1)
    labels[4] = -100
    weights = torch.linspace(0.5, 2, 6, dtype=torch.float64)
    options = {"labels": labels, "token_weight": weights, "hard_weight": 0.5}
    for name, more in (
        ("kd", {"temperature": weights}),
        ("mixed_kl", {"forward_weight": weights / 2}),
        ("mixed_kl", {"forward_weight": weights / 2, "token_weight": None, "hard_weight": 0.0}),
        ("acceptance", {"kind": "hybrid"}),
    ):
        _check(SPECS[name], [student, teacher], "uneven", options | more, 1e-10)
    shards = Shards("uneven", 6)
    learned = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    options |= {"return_parts": True, "loss_weight": learned}
    expected, parts = functional.kd_loss(student, teacher, **options)
    (slope,) = torch.autograd.grad(expected, learned)
    given = {k: shards(v) for k, v in options.items()} | {"process_group": dist.group.WORLD}
    with CommDebugMode() as exchanged:
        loss, own = functional.kd_loss(shards(student), shards(teacher), **given)
    assert exchanged.get_total_counts() == 1
    (own_slope,) = torch.autograd.grad(loss, learned)
    for a, b in (
        (own_slope, slope),
        (own.distillation, parts.distillation),
        (own.hard, parts.hard),
    ):
        _close(_summed(a) / shards.world, b, 1e-10)
    _close(own.entropy, parts.entropy[shards.own], 1e-10)


def _check_collectives(spec: LossSpec) -> None:
    """One of a mean and of moments, two of rows; none in the backward pass."""
    case = example(spec)
    leaf = case.student.requires_grad_()
    with CommDebugMode() as exchanged:
        case.of(leaf, process_group=dist.group.WORLD).backward()
    assert exchanged.get_total_counts() == (2 if spec.name in ("rkd", "tuple_matching") else 1)


def _check_conditioned(family: str, eps: float) -> None:
    """DIST in float32 of columns that hardly vary, or not at all."""
    student, teacher, _ = make(family, 6, 9)
    for tau in (1.0, 4.0):
        options = {"eps": eps, "tau": tau}
        _check(SPECS["dist"], [student, teacher], "uneven", options, 1e-4)
        _check(SPECS["dist"], [student, teacher], "empty", options, 1e-4)


def _check_mismatch() -> None:
    """Widths that differ between ranks are an error on all of them."""
    x = torch.randn(3, 5 + dist.get_rank())
    text = r"^student_embeddings must be of one width and dtype on all ranks, got \[\(5, "
    with pytest.raises(ValueError, match=text):
        functional.rkd_loss(x, torch.randn(3, 4), process_group=dist.group.WORLD)


def _check_compiled(name: str) -> None:
    case = example(SPECS[name])
    loss = SPECS[name].module(process_group=dist.group.WORLD)
    leaf = case.student.clone().requires_grad_()
    expected = loss(leaf, *case.tensors[1:])
    (slope,) = torch.autograd.grad(expected, leaf)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    actual = compiled(leaf, *case.tensors[1:])
    _close(actual.detach(), expected.detach().double(), 1e-6)
    _close(torch.autograd.grad(actual, leaf)[0], slope.double(), 1e-6)


def _check_second(name: str) -> None:
    """Other ranks' moments are constants in a gradient, which therefore has no derivative."""
    case = example(SPECS[name])
    leaf = case.student.clone().requires_grad_()
    of = {"process_group": dist.group.WORLD, "backend": "reference"}
    loss = SPECS[name].function(leaf, *case.tensors[1:], **of)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(loss, leaf, create_graph=True)


def _check_timeout() -> None:
    """A rank that raises leaves the others waiting, and they fail with the group's timeout."""
    group: Any = dist.new_group(timeout=timedelta(seconds=1))
    x = torch.randn(3, 5)
    if dist.get_rank() == 0:
        with pytest.raises(ValueError, match=r"^beta must be >= 0, got -1"):
            functional.dist_loss(x, x, beta=-1.0, process_group=group)
    else:
        with pytest.raises(RuntimeError):
            functional.dist_loss(x, x, process_group=group)
    dist.barrier()


def _cases() -> Iterator[tuple[str, Callable[[], None]]]:
    world = dist.get_world_size()
    for spec in of_this_world(GROUPED):
        for dtype, tolerance in TOLERANCES.items():
            tensors = example(spec, dtype).tensors
            samples = spec.samples if dtype == torch.float64 else spec.samples[:1]
            totals = () if spec.by_row else ({"reduction": "sum"},)
            for cut in CUTS:
                for options in (*samples, *totals):
                    check = functools.partial(_check, spec, tensors, cut, dict(options), tolerance)
                    yield f"{spec.name} {dtype} {cut} {options}", check
        for cut in ("uneven", "empty"):
            yield f"{spec.name} under DDP, {cut}", functools.partial(_check_trained, spec, cut)
        if world == 2:
            yield f"collectives of {spec.name}", functools.partial(_check_collectives, spec)
    masks = {"one rank": [1, 2, 3, 0, -100, 1], "all of one": [-100, -100, 1, 2, 3, 3]}
    for spec in OF_MASKS:
        for name, labels in masks.items():
            check = functools.partial(_check_masked, spec, torch.tensor(labels))
            yield f"{spec.name} ignoring {name}", check
    for family in ("gaussian", "constant_rows", "offset", "ties"):
        for eps in (1e-8, 0.0):
            check = functools.partial(_check_conditioned, family, eps)
            yield f"DIST of {family}, eps {eps}", check
    for name in ("dist", "sigmoid_dist"):
        yield f"{name} twice", functools.partial(_check_second, name)
    yield "keywords", _check_keywords
    yield "mismatch", _check_mismatch
    if world == 2:
        for name in ("dist", "dkd"):
            yield f"{name} compiled", functools.partial(_check_compiled, name)
        yield "timeout", _check_timeout


@needs_processes
@pytest.mark.parametrize("world", (2, 4))
def test_every_loss_of_a_group(world: int) -> None:
    run_on_ranks(world, _cases)

"""``tp_group`` of losses through the output layer: its weight lies on several ranks by rows. What a
loss must equal is itself, in float64 by the reference, on one process with the whole weight."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import needs_processes, run_on_ranks
from test_sharded_classes import CLASSES, TOLERANCES, own_classes
from torch import Tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils._python_dispatch import TorchDispatchMode

from kdkernels import FusedLinearKDLoss, linear_kd_loss, linear_logprob
from kdkernels.linear import _chunks
from kdkernels.linear.kd import DIVERGENCES
from kdkernels.losses.topk_kd import DENSE, TAILS
from kdkernels.teacher import LinearTeacher, TopKTeacher, top_k

WIDTH = 6
HEAD: dict[str, Any] = {"softcap": 3.0, "logit_scale": 0.8}


@dataclasses.dataclass
class Layer:
    """A student's hidden states and output layer, a teacher's, and labels."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor
    teacher: LinearTeacher
    labels: Tensor

    def own(self, cut: str) -> Layer:
        """This rank's part; rows and labels are every rank's."""
        at, t = own_classes(cut), self.teacher
        mine = dataclasses.replace(t, weight=t.weight[at], bias=t.bias[at])  # type: ignore[index]
        shards = [x.detach()[at].clone().requires_grad_() for x in (self.weight, self.bias)]
        hidden = self.hidden.detach().clone().requires_grad_()
        return Layer(hidden, shards[0], shards[1], mine, self.labels)

    def double(self) -> Layer:
        student = (x.detach().double() for x in (self.hidden, self.weight, self.bias))
        teacher = self.teacher.to(torch.float64)
        return Layer(*(x.requires_grad_() for x in student), teacher, self.labels)

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.hidden, self.weight, self.bias


def layer(dtype: torch.dtype = torch.float64, rows: tuple[int, ...] = (3, 4)) -> Layer:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    student = normal(*rows, WIDTH), normal(CLASSES, WIDTH), normal(CLASSES)
    teacher = normal(*rows, 5), normal(CLASSES, 5), normal(CLASSES)
    labels = torch.randint(CLASSES, rows, generator=generator)
    labels.view(-1)[::5] = -100
    of_teacher = LinearTeacher(*(x.to(dtype) for x in teacher), softcap=8.0, logit_scale=1.5)
    return Layer(*(x.to(dtype).requires_grad_() for x in student), of_teacher, labels)


def _teacher(of: Layer, form: str, whole: LinearTeacher) -> Any:
    """A teacher of a form: what is of all classes is made of the ``whole``."""
    if form == "linear":
        return of.teacher
    if form == "logits":
        return of.teacher.logits()
    sparse = top_k(whole.logits().double(), 4)
    sparse.logprobs[0, 1, 1] = -torch.inf  # an entry, and a row of which nothing is known
    sparse.logprobs[1, 2] = -torch.inf
    assert sparse.log_rest is not None
    sparse.log_rest[1, 2] = -torch.inf
    return sparse


def _same_everywhere(x: Tensor) -> None:
    there = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(there, x.detach().contiguous())
    assert all(torch.equal(y, there[0]) for y in there)


def _close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    size = max(expected.abs().max().item(), 1e-12) if expected.numel() else 1.0
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=tolerance * size)


def _check(
    divergence: str, form: str, dtype: torch.dtype, cut: str, options: dict[str, Any]
) -> None:
    given = layer(dtype)
    options = {"divergence": divergence, "chunk_tokens": 5, **options}
    wide, own = given.double(), given.own(cut)
    reduction = options.get("reduction", "mean")
    teacher = _teacher(wide, form, given.teacher.to(torch.float64))
    expected, parts = linear_kd_loss(
        wide.hidden, wide.weight, teacher, wide.labels, student_bias=wide.bias,
        return_parts=True, **options, backend="reference",
    )  # fmt: skip
    upstream = torch.linspace(0.5, 2, expected.numel(), dtype=torch.float64).view(expected.shape)
    slopes = torch.autograd.grad(expected, wide.leaves, upstream)
    mine = _teacher(own, form, given.teacher.to(torch.float64))
    actual, found = linear_kd_loss(
        own.hidden, own.weight, mine, own.labels, student_bias=own.bias, return_parts=True,
        tp_group=dist.group.WORLD, **options,
    )  # fmt: skip
    actual.backward(upstream.to(actual.dtype))
    assert actual.shape == (given.labels.shape if reduction == "none" else ())
    _same_everywhere(actual)
    _close(actual, expected.detach(), TOLERANCES[dtype])
    for one, other in zip(found, parts, strict=True):
        _close(one, other, TOLERANCES[dtype])
    assert own.hidden.grad is not None
    _same_everywhere(own.hidden.grad)
    at = own_classes(cut)
    for leaf, slope in zip(own.leaves, (slopes[0], slopes[1][at], slopes[2][at]), strict=True):
        assert leaf.grad is not None and leaf.grad.dtype == dtype
        _close(leaf.grad, slope, 2 * TOLERANCES[dtype])


def _check_logprob(dtype: torch.dtype, cut: str, k: int | None) -> None:
    given = layer(dtype)
    generator = torch.Generator().manual_seed(3)
    shape = given.labels.shape if k is None else (*given.labels.shape, k)
    ids = torch.randint(CLASSES, shape, generator=generator)
    if k is not None and k > 1:
        ids[..., -1] = ids[..., 0]
    wide, own = given.double(), given.own(cut)
    how = {"temperature": 1.5, "chunk_tokens": 5, **HEAD}
    expected = linear_logprob(
        wide.hidden, wide.weight, ids, bias=wide.bias, backend="reference", **how
    )
    actual = linear_logprob(
        own.hidden, own.weight, ids, bias=own.bias, tp_group=dist.group.WORLD, **how
    )
    for one, other in zip(actual, expected, strict=True):
        _same_everywhere(one)
        _close(one, other.detach(), TOLERANCES[dtype])
    upstream = torch.randn(ids.shape, generator=generator, dtype=torch.float64)
    slopes = torch.autograd.grad(expected.logprob, wide.leaves, upstream)
    actual.logprob.backward(upstream.to(actual.logprob.dtype))
    assert own.hidden.grad is not None
    _same_everywhere(own.hidden.grad)
    at = own_classes(cut)
    for leaf, slope in zip(own.leaves, (slopes[0], slopes[1][at], slopes[2][at]), strict=True):
        assert leaf.grad is not None and leaf.grad.dtype == dtype
        _close(leaf.grad, slope, 2 * TOLERANCES[dtype])
    assert not actual.lse.requires_grad and not actual.entropy.requires_grad


def _check_certain() -> None:
    """The gradient of a token that is nearly certain keeps its digits, whoever has the others."""
    hidden = torch.ones(2, 1, dtype=torch.float32)
    weight = torch.zeros(CLASSES, 1)
    weight[3] = 30.0
    wide = [x.double().requires_grad_() for x in (hidden, weight)]
    ids = torch.tensor([3, 4])
    expected = linear_logprob(*wide, ids, backend="reference").logprob
    slopes = torch.autograd.grad(expected[0], wide)
    at = own_classes("uneven")
    own = [hidden.requires_grad_(), weight[at].clone().requires_grad_()]
    found = linear_logprob(*own, ids, tp_group=dist.group.WORLD).logprob
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=0)
    made = torch.autograd.grad(found[0], own)
    for one, other in zip(made, (slopes[0], slopes[1][at]), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-3, atol=0)


def _check_module_and_frozen() -> None:
    """The Module; a frozen weight, which leaves its gradient out; no gradient at all."""
    given, group = layer(), dist.group.WORLD
    own = given.own("uneven")
    module = FusedLinearKDLoss("jsd", beta=0.3, tp_group=group)
    expected = linear_kd_loss(
        given.hidden, given.weight, given.teacher, given.labels, "jsd", beta=0.3
    )
    (slope,) = torch.autograd.grad(expected, given.hidden)
    actual = module(own.hidden, own.weight.detach(), own.teacher, own.labels)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.autograd.grad(actual, own.hidden)[0], slope)
    with torch.no_grad():
        torch.testing.assert_close(module(own.hidden, own.weight, own.teacher, own.labels), actual)
    again = module(own.hidden, own.weight, own.teacher, own.labels)  # the stored gradient is given
    first = torch.autograd.grad(again, own.leaves[:2], retain_graph=True)  # away, then made again
    for a, b in zip(torch.autograd.grad(again, own.leaves[:2]), first, strict=True):
        torch.testing.assert_close(a, b)
    strided = own.hidden.detach().flatten(0, 1).T.contiguous().T.requires_grad_()
    rows = dataclasses.replace(own.teacher, hidden=own.teacher.hidden.flatten(0, 1))
    again = module(strided, own.weight, rows, own.labels.flatten())
    torch.testing.assert_close(torch.autograd.grad(again, strided)[0], slope.flatten(0, 1))
    ignored = torch.full_like(given.labels, -100)
    nothing = module(own.hidden, own.weight, own.teacher, ignored)
    assert nothing == 0
    assert not any(x.any() for x in torch.autograd.grad(nothing, own.leaves[:2]))


def _check_collectives() -> None:
    """One that the host reads, then some a chunk, and one for the hidden states' gradient."""
    given, group = layer(), dist.group.WORLD
    own = given.own("uneven")
    sparse = _teacher(own, "topk", given.teacher)
    for divergence, teacher, labels, of_chunk, chunks in (  # of 5 tokens, of 9 or 12
        ("kl", own.teacher, own.labels, 1, 2),
        ("jsd", own.teacher, own.labels, 4, 2),
        ("kl", own.teacher, None, 1, 3),
        ("kl", sparse, None, 1, 3),
    ):
        with CommDebugMode() as exchanged:
            loss = linear_kd_loss(
                own.hidden, own.weight, teacher, labels, divergence, chunk_tokens=5,
                tp_group=group,
            )  # fmt: skip
        assert exchanged.get_total_counts() == 1 + of_chunk * chunks + 1
        with CommDebugMode() as exchanged:
            loss.backward()
        assert exchanged.get_total_counts() == 0
    with CommDebugMode() as exchanged:
        found = linear_logprob(
            own.hidden, own.weight, given.labels.clamp(min=0), chunk_tokens=5, tp_group=group
        )
    assert exchanged.get_total_counts() == 1 + 3
    with CommDebugMode() as exchanged:
        found.logprob.sum().backward()
    assert exchanged.get_total_counts() == 1


class _Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.found = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for x in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(x, Tensor):
                self.found = max(self.found, x.numel())
        return made


def _check_memory() -> None:
    """No tensor is of all rows and a rank's classes, and what is of a chunk is small."""
    rows, width, classes, tokens = 1024, 2, 64, 32
    hidden = torch.randn(rows, width, requires_grad=True)
    weight, other = torch.randn(classes, width, requires_grad=True), torch.randn(classes, width)
    teacher = LinearTeacher(torch.randn(rows, width), other)
    given: dict[str, Any] = {"chunk_tokens": tokens, "tp_group": dist.group.WORLD}
    ids = torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(0))
    for divergence in ("kl", "jsd", None):
        with _Largest() as seen:
            if divergence is None:
                loss = linear_logprob(hidden, weight, ids, **given).logprob.sum()
            else:
                loss = linear_kd_loss(hidden, weight, teacher, None, divergence, **given)
            loss.backward()
        assert seen.found <= 4 * rows * dist.get_world_size() < rows * classes


def _check_chunks() -> None:
    """Chunks are of as many tokens on all ranks, whatever the width of their shards."""
    given = layer(rows=(200,))
    own = given.own("uneven")
    expected = linear_kd_loss(given.hidden, given.weight, given.teacher)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(_chunks._BUDGET, "cpu", 16384)
        actual = linear_kd_loss(own.hidden, own.weight, own.teacher, tp_group=dist.group.WORLD)
        found = linear_logprob(own.hidden, own.weight, own.labels.clamp(min=0),
                               tp_group=dist.group.WORLD)  # fmt: skip
    torch.testing.assert_close(actual, expected)
    wanted = linear_logprob(given.hidden, given.weight, given.labels.clamp(min=0))
    torch.testing.assert_close(found.logprob, wanted.logprob)


def _check_mismatch() -> None:
    given, rank, group = layer(), dist.get_rank(), dist.group.WORLD
    own = given.own("uneven")
    tensors = own.hidden, own.weight, own.teacher

    def wrong(expected: str, *tensors: Any, **options: Any) -> None:
        with pytest.raises(ValueError, match=rf"^{expected}"):
            linear_kd_loss(*tensors, **{"labels": own.labels, "tp_group": group, **options})

    said = "tp_group must be given the same loss and options on all ranks, got"
    for different in (
        {"temperature": 1.0 + rank}, {"divergence": ("kl", "jsd", "tv", "skew_kl")[rank]},
        {"softcap": 1.0 + rank}, {"chunk_tokens": 5 + rank}, {"loss_weight": 1.0 + rank},
        {"reduction": ("mean", "sum", "none", "mean")[rank]}, {"return_parts": rank == 0},
    ):  # fmt: skip
        wrong(said, *tensors, **different)
    labels = own.labels.clone()
    labels.view(-1)[: 2 * rank] = -100
    wrong("tp_group must be given the same rows on all ranks", *tensors, labels=labels)
    narrow = [x.float() if rank == 0 else x for x in (own.hidden, own.weight)]
    wrong(said, *narrow, own.teacher)
    hidden = own.hidden.detach().requires_grad_(rank == 0)
    wrong("tp_group must be given the same gradient on all ranks", hidden, *tensors[1:])
    beyond = torch.full_like(labels, CLASSES)
    wrong(rf"class indices must be in \[0, {CLASSES}\)", *tensors, labels=beyond, hard_weight=1.0)
    ids = torch.full((*labels.shape, 1), CLASSES)
    sparse = TopKTeacher(ids, torch.zeros(ids.shape))
    wrong(rf"teacher_ids must be in \[0, {CLASSES}\)", *tensors[:2], sparse)
    wrong("vocab must be None where tp_group is given", *tensors, vocab="truncate")
    alone = own.weight[: int(rank == 0)], own.teacher.weight[: int(rank == 0)]
    one = LinearTeacher(own.teacher.hidden, alone[1])
    wrong("student_weight must be of at least two classes", own.hidden, alone[0], one)
    with pytest.raises(ValueError, match=r"^student_weight must be \(V, 6\) with V >= 2"):
        linear_kd_loss(own.hidden, own.weight[:1], one)
    found = functools.partial(linear_logprob, own.hidden, own.weight, tp_group=group)
    with pytest.raises(ValueError, match=rf"^ids must be in \[0, {CLASSES}\), got {CLASSES}"):
        found(beyond)
    with pytest.raises(ValueError, match=r"^tp_group must be given the same loss and options on"):
        found(own.labels.clamp(min=0), temperature=1.0 + rank)


def _check_differentiated_once() -> None:
    """The first gradient of a graph of gradients is right, the second raises by name."""
    own = layer().own("uneven")
    for reduction in ("none", "mean"):
        weight = own.weight.detach().requires_grad_()
        loss = linear_kd_loss(
            own.hidden, weight, own.teacher, reduction=reduction, tp_group=dist.group.WORLD
        ).sum()
        (plain,) = torch.autograd.grad(loss, weight, retain_graph=True)
        (first,) = torch.autograd.grad(loss, weight, create_graph=True)
        torch.testing.assert_close(first, plain)
        with pytest.raises(RuntimeError, match="differentiated twice"):
            torch.autograd.grad(first.sum(), weight)


def _check_timeout() -> None:
    """A rank that raises leaves the others waiting, and they fail with the group's timeout."""
    group: Any = dist.new_group(timeout=timedelta(seconds=1))
    own = layer().own("uneven")
    bad = dist.get_rank() == 0
    options = {"temperature": -1.0 if bad else 1.0, "tp_group": group}
    with pytest.raises(ValueError if bad else RuntimeError):
        linear_kd_loss(own.hidden, own.weight, own.teacher, own.labels, **options)
    group = dist.new_group(timeout=timedelta(seconds=1))
    ids = own.labels.clamp(min=0)
    with pytest.raises(ValueError if bad else RuntimeError):
        linear_logprob(own.hidden, own.weight, ids, **{**options, "tp_group": group})
    dist.barrier()


def _options() -> Iterator[dict[str, Any]]:
    weights = torch.linspace(0.5, 2, 12, dtype=torch.float64).view(3, 4)
    yield {"temperature": 2.0, "hard_weight": 0.5, "token_weight": weights, **HEAD}
    yield {"reduction": "none", "hard_weight": 0.5}
    yield {"num_items_in_batch": 11, "loss_weight": torch.tensor(0.5)}


def _cases() -> Iterator[tuple[str, Callable[[], None]]]:
    for divergence in DIVERGENCES if dist.get_world_size() == 2 else ("kl", "jsd"):
        for form in ("logits", "linear", "topk") if divergence in DENSE else ("linear",):
            for dtype in TOLERANCES:
                for cut in ("uneven", "empty"):
                    given = next(_options())
                    check = functools.partial(_check, divergence, form, dtype, cut, given)
                    yield f"{divergence} {form} {dtype} {cut}", check
    for divergence, form in (("kl", "logits"), ("jsd", "linear"), ("reverse_kl", "topk")):
        for options in _options():
            check = functools.partial(_check, divergence, form, torch.float64, "uneven", options)
            yield f"{divergence} {form} {[*options]}", check
    for tail in TAILS:
        given = {"tail": tail, "temperature": 2.0}
        check = functools.partial(_check, "kl", "topk", torch.float64, "uneven", given)
        yield f"kl topk {tail}", check
    for dtype in TOLERANCES:
        for cut in ("uneven", "empty"):
            for k in (None, 1, 5):
                check = functools.partial(_check_logprob, dtype, cut, k)
                yield f"logprob {dtype} {cut} {k}", check
    yield "certain", _check_certain
    yield "module and frozen", _check_module_and_frozen
    yield "collectives", _check_collectives
    yield "memory", _check_memory
    yield "once", _check_differentiated_once
    yield "chunks", _check_chunks
    yield "mismatch", _check_mismatch
    if dist.get_world_size() == 2:
        yield "timeout", _check_timeout


@needs_processes
@pytest.mark.parametrize("world", (2, 4))
def test_output_layers_of_shards_of_classes(world: int) -> None:
    run_on_ranks(world, _cases)


@needs_processes
def test_a_group_of_one_rank_changes_nothing(tmp_path: Any) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/alone", rank=0, world_size=1)
    try:
        given, on = layer(), {"tp_group": dist.group.WORLD}
        tensors = given.hidden, given.weight, given.teacher, given.labels
        assert torch.equal(linear_kd_loss(*tensors, **on), linear_kd_loss(*tensors))
        ids = given.labels.clamp(min=0)
        found = linear_logprob(given.hidden, given.weight, ids, **on)
        assert torch.equal(found.logprob, linear_logprob(given.hidden, given.weight, ids).logprob)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("wrong", ["gloo", 0, object()], ids=lambda x: type(x).__name__)
def test_what_is_no_group_is_refused(wrong: Any) -> None:
    given = layer()
    said = r"^tp_group must be None or a torch.distributed.ProcessGroup of this process, got"
    with pytest.raises(TypeError, match=said):
        linear_kd_loss(given.hidden, given.weight, given.teacher, tp_group=wrong)
    with pytest.raises(TypeError, match=said):
        linear_logprob(given.hidden, given.weight, given.labels.clamp(min=0), tp_group=wrong)
    with pytest.raises(TypeError, match=said):
        FusedLinearKDLoss(tp_group=wrong)

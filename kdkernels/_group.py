"""The batch of all ranks of a process group: what is exchanged, and whose gradient it is.

Every rank evaluates the loss of the joined batch with its own rows as the only variables, so that
the backward pass exchanges nothing. DistributedDataParallel averages gradients over the W ranks,
where their sum is wanted: a rank's gradient is W times the derivative by its rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _checks
from ._dtensor import any_sharded
from ._dtypes import FLOATS, INTEGERS
from ._tracing import transformed

if TYPE_CHECKING or dist.is_available():
    from torch.distributed import ProcessGroup as ProcessGroup
else:
    ProcessGroup = Any

# Its name since torch 2.13, and before; neither exists without torch.distributed.
_all_gather: Any = getattr(dist, "all_gather_single", getattr(dist, "all_gather_into_tensor", None))
_KINDS = sorted(FLOATS | INTEGERS, key=str)
"""Dtypes, by which ranks tell each other theirs."""


def check(group: Any, name: str = "process_group") -> Any:
    """``process_group`` or ``tp_group``: None, or a group of this process."""
    if group is None:
        return None
    if not dist.is_available():
        raise _checks.fail(name, "None without torch.distributed", type(group).__name__)
    if not isinstance(group, ProcessGroup):  # nor what new_group gives those outside of it
        expected = "None or a torch.distributed.ProcessGroup of this process"
        raise _checks.fail_type(name, expected, type(group).__name__)
    if not dist.is_initialized():
        raise _checks.fail(name, "of an initialised torch.distributed", "another")
    return group


def check_call(group: Any, *tensors: Any, name: str = "process_group") -> None:
    """Likewise, and that the loss is of ordinary tensors, differentiated by the engine."""
    check(group, name)
    if any_sharded(*tensors):
        raise _checks.fail(name, "None where tensors are DTensors", "a group")
    if transformed():
        raise _checks.fail(name, "None in a transform of torch.func", "a group")


def total(count: Tensor, group: Any) -> Tensor:
    """The sum over the ranks of a tensor that is the caller's to give."""
    dist.all_reduce(count, group=group)
    return count


def stacked(own: Tensor, group: Any) -> Tensor:
    """A vector of every rank, (ranks, n); this rank's keeps its graph, the others are constants."""
    ranks, rank = group.size(), group.rank()
    flat = own.new_empty(ranks * len(own))
    _all_gather(flat, own.detach().contiguous(), group=group)
    rows = flat.view(ranks, len(own))
    return torch.cat([rows[:rank], own[None], rows[rank + 1 :]])


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return stacked(own.flatten(), group).view(group.size(), *own.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        return total(upstream.clone(), ctx.group)[ctx.group.rank()], None


class _Terms(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, group: Any) -> Tensor:
        return total(own.clone(), group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        return upstream, None


_gathered: Callable[..., Tensor] = _Gathered.apply
_terms: Callable[..., Tensor] = _Terms.apply


def gathered(own: Tensor, group: Any) -> Tensor:
    """A tensor of every rank, (ranks, ...), of which each rank makes a term of a sum: what a rank's
    tensor does to the others' terms comes back to it, in a collective of the backward pass."""
    return _gathered(own, group)


def summed_terms(own: Tensor, group: Any) -> Tensor:
    """The sum of all ranks' terms, of which each has the same derivatives as the sum."""
    return _terms(own, group)


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, ranks: int) -> Tensor:
        ctx.ranks = ranks
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        return upstream * ctx.ranks, None


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor) -> Tensor:
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        if torch.is_grad_enabled():  # create_graph
            raise RuntimeError("kdkernels losses over ranks cannot be differentiated twice")
        return upstream


_apply: Callable[..., Tensor] = _Summed.apply
_once: Callable[..., Tensor] = _Once.apply


def once(loss: Tensor) -> Tensor:
    """A loss whose gradient has no derivative: other ranks' numbers are constants in it, or come
    back to it from nodes that ``torch.autograd.grad`` does not visit."""
    return _once(loss)


def summed(loss: Tensor, group: Any) -> Tensor:
    """A loss that all ranks have alike, with W times its gradient, of which W are averaged."""
    return _apply(loss, group.size())


def of_all_rows(loss: Callable[..., Tensor], group: Any, **named: Tensor) -> Tensor:
    """The loss of the rows of all ranks, in their order, of matrices and vectors of as many rows.

    Two collectives: shapes first, which the host reads, then the bytes of all tensors side by side,
    padded to the most rows.
    """
    own = list(named.values())
    tables = [(x if x.dim() == 2 else x[:, None]).detach().resolve_neg() for x in own]
    shape = [len(own[0])]
    for x in tables:
        shape += [x.shape[1], _KINDS.index(x.dtype)]
    shapes = stacked(torch.tensor(shape, device=own[0].device), group).tolist()
    for i, name in enumerate(named, 1):
        kinds = {(x[2 * i - 1], _KINDS[x[2 * i]]) for x in shapes}
        if len(kinds) > 1:
            raise _checks.fail(name, "of one width and dtype on all ranks", sorted(kinds, key=str))
    counts = [x[0] for x in shapes]
    parts = [x.contiguous().view(torch.uint8) for x in tables]
    widths = [x.shape[1] for x in parts]
    padded = parts[0].new_zeros(max(counts), sum(widths))
    padded[: counts[group.rank()]] = torch.cat(parts, 1)
    flat = padded.new_empty(len(counts) * padded.numel())
    _all_gather(flat, padded.flatten(), group=group)
    ranks = flat.view(len(counts), *padded.shape)
    whole = torch.cat([x[:count] for x, count in zip(ranks, counts, strict=True)])
    begin = sum(counts[: group.rank()])
    joined = []
    for x, held in zip(own, whole.split(widths, 1), strict=True):
        # A copy also of one row, which would lie at any offset.
        rows = held.clone(memory_format=torch.contiguous_format).view(x.dtype)
        rows = rows.view(-1, *x.shape[1:])
        joined.append(torch.cat([rows[:begin], x, rows[begin + len(x) :]]))
    return summed(loss(*joined), group)

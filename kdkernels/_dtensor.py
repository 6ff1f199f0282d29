"""DTensors: rows that are sharded stay sharded for row losses, and so do classes for those that
take ``tp_group``; everything else is gathered.

The losses run on local tensors; a row loss of a shard of rows needs no other shard, and only the
count of a mean is summed over the mesh. Classes that one dimension of the mesh shards are those of
its group (``_sharded``). Losses that couple rows, and classes otherwise, are redistributed to every
rank first: right, but with the communication and memory of a gather.
Nothing here is imported before a subclass of Tensor is seen.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _checks
from ._checked import Checked, Result
from ._tracing import plain

_USUAL = frozenset({Tensor, torch.nn.Parameter, float, int, str, bool, type(None)})
"""What arguments are, so that a call looks no further."""
_NONE, _SUM = _checks.REDUCTIONS["none"], _checks.REDUCTIONS["sum"]


def any_sharded(*tensors: Any) -> bool:
    """Whether one of them is a DTensor."""
    others = [x for x in tensors if isinstance(x, Tensor) and not plain(x)]
    if not others or not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return any([isinstance(x, DTensor) for x in others])


def all_or_none_sharded(named: dict[str, Any]) -> None:
    """Check tensors that meet in operations: DTensors of one mesh, or plain ones."""
    if any_sharded(*named.values()):
        _mesh(named)


def none_sharded(of: str, named: dict[str, Any]) -> None:
    """Check what stands beside plain tensors: kernels see no values of a DTensor."""
    for name, x in named.items():
        if any_sharded(x):
            raise _checks.fail_type(name, f"a plain Tensor, as {of} is", "a DTensor")


def _mesh(tensors: dict[str, Any]) -> Any:
    """The mesh of all tensors, which must be DTensors of one."""
    from torch.distributed.tensor import DTensor

    mesh = None
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            continue
        if not isinstance(tensor, DTensor):
            raise _checks.fail_type(name, "a DTensor, as the others are", type(tensor).__name__)
        mesh = mesh or tensor.device_mesh
        if tensor.device_mesh != mesh:
            raise _checks.fail(name, f"on the mesh {mesh}", tensor.device_mesh)
    return mesh


def _local(tensor: Any, mesh: Any, placements: Any) -> Tensor:
    """The local part of a tensor redistributed; its gradient lies likewise."""
    return tensor.redistribute(mesh, placements).to_local(grad_placements=placements)


def _classes_over(student: Any, class_dim: int) -> int | None:
    """The dimension of the mesh whose ranks share the classes, in their order; None where there is
    none, or they are more."""
    from torch.distributed.tensor import Shard

    mesh, placements = student.device_mesh, student.placements
    found = [i for i, p in enumerate(placements) if p.is_shard() and p.dim == class_dim]
    if len(found) != 1 or type(placements[found[0]]) is not Shard or mesh.size(found[0]) == 1:
        return None
    ranks = mesh.mesh.movedim(found[0], 0)
    # A group's ranks are in ascending order, the shards in that of the mesh.
    return found[0] if bool((ranks[1:] > ranks[:-1]).all()) else None


def of_rows(local: Tensor, student: Any, class_dim: int, before: int = 0) -> Tensor:
    """What each rank has of its own rows, behind ``before`` dimensions, as a DTensor of all rows
    of the student's."""
    from torch.distributed.tensor import DTensor

    rows = student.shape[:class_dim] + student.shape[class_dim + 1 :]
    shape = local.shape[:before] + rows
    strides = torch.empty(shape, device="meta").stride()
    placements = _of_rows(student, class_dim, before)
    return DTensor.from_local(
        local, student.device_mesh, placements, run_check=False, shape=shape, stride=strides
    )


def _of_rows(student: Any, class_dim: int, before: int = 0) -> list[Any]:
    """Where numbers by row lie whose rows lie as the student's; each rank of others has all."""
    from torch.distributed.tensor import Replicate, Shard

    return [
        Shard(p.dim - (p.dim > class_dim) + before)
        if p.is_shard() and p.dim != class_dim
        else Replicate()
        for p in student.placements
    ]


def row_loss(run: Callable[[Checked, Any], Result], call: Checked, of_shards: bool) -> Result:
    """``run`` of the call's local tensors on each rank's rows, and of the group that shares the
    classes, None where each rank has all.

    ``of_shards`` says whether the loss can be evaluated on shards of its classes.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate

    names = ("target", "token_weight", "hard_token_weight", "row_temperature")
    by_row = {name: getattr(call, name) for name in names}
    by_row |= {name: x for name, x in call.named().items() if isinstance(x, Tensor)}
    rank_shared = {k for k, x in by_row.items() if x is not None and x.dim() == 0 and plain(x)}
    given_as = {"target": call.spec.target_name, "row_temperature": "temperature"}
    sharded = {given_as.get(k, k): x for k, x in by_row.items() if k not in rank_shared}
    mesh = _mesh({"student_logits": call.student, "teacher_logits": call.teacher, **sharded})
    given: Any = call.student
    over = _classes_over(given, call.class_dim) if of_shards else None
    group = None if over is None else mesh.get_group(over)
    row_placements = _of_rows(given, call.class_dim)
    placements = [
        p if of_row.is_shard() or i == over else Replicate()
        for i, (p, of_row) in enumerate(zip(given.placements, row_placements, strict=True))
    ]
    of_sums = [Partial() if p.is_shard() else p for p in row_placements]
    everywhere = [Replicate()] * mesh.ndim
    s, t = (_local(x, mesh, placements) for x in (call.student, call.teacher))
    local: dict[str, Any] = dict(by_row)
    for k, x in by_row.items():
        if x is None or k in rank_shared:
            continue
        if x.dim():
            local[k] = _local(x, mesh, row_placements)
        else:  # a number, to whose gradient each rank's rows add
            number: Any = x
            local[k] = number.redistribute(mesh, everywhere).to_local(grad_placements=of_sums)
    options = tuple(local.pop(name, x) for name, x in call.named().items())
    index = call.ignore_index
    if call.spec.counted is not None:
        local["target"], index = call.spec.counted(options, local["target"], index)
    code = _NONE if call.reduction == _NONE else _SUM
    loss, parts = run(
        call._replace(
            student=s, teacher=t, options=options, reduction=code, ignore_index=index, **local
        ),
        group,
    )
    if call.reduction not in (_NONE, _SUM):
        count: Any = max(call.rows().numel(), 1)
        y = local["target"]
        if y is not None:
            own = (y != index).sum()
            valid = DTensor.from_local(own, mesh, of_sums, run_check=False)
            count = valid.full_tensor().clamp(min=1)
        loss = loss / count
        parts = None if parts is None else torch.cat([parts[:2] / count, parts[2:]])
    if parts is not None:
        parts = of_rows(parts, given, call.class_dim, before=1)
    if code == _NONE:
        return of_rows(loss, given, call.class_dim), parts
    return DTensor.from_local(loss, mesh, of_sums, run_check=False), parts


def gathered(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A loss that couples its inputs: on DTensors every rank computes the whole."""

    @functools.wraps(function)
    def loss(*args: Any, **kwargs: Any) -> Tensor:
        for x in (*args, *kwargs.values()):
            if type(x) not in _USUAL and any_sharded(x):
                break
        else:
            return function(*args, **kwargs)
        from torch.distributed.tensor import DTensor, Replicate

        if kwargs.get("process_group") is not None:
            raise _checks.fail("process_group", "None where inputs are DTensors", "a group")
        named = {f"input {i}": x for i, x in enumerate(args)} | kwargs
        mesh = _mesh(named)
        everywhere = [Replicate()] * mesh.ndim

        def whole(x: Any) -> Any:
            return _local(x, mesh, everywhere) if isinstance(x, Tensor) else x

        value = function(*map(whole, args), **{k: whole(x) for k, x in kwargs.items()})
        return DTensor.from_local(value, mesh, everywhere, run_check=False)

    return loss

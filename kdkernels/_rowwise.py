"""The public path of the row losses (families ``divergence``, ``decoupled`` and ``binary``)."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor

from . import _checks, _dtensor, _ensemble, _group, _sharded, _soft_targets, _temperature
from ._checked import Checked, Result
from ._dtensor import any_sharded
from ._dtypes import working_dtype
from ._ensemble import TeacherLogits
from ._group import ProcessGroup
from ._rowrun import run
from ._shapes import ClassesAt
from ._tracing import keepable, plain
from .reference._rows import weighted
from .registry import LossSpec


class CommonOptions(TypedDict, total=False):
    """The keywords that every row loss has; ``row_loss`` has their defaults."""

    ignore_index: int | None
    reduction: str
    loss_weight: float | Tensor
    hard_weight: float
    token_weight: Tensor | None
    num_items_in_batch: float | Tensor | None
    return_parts: bool
    process_group: ProcessGroup | None
    tp_group: ProcessGroup | None
    backend: str | None


class TokenOptions(CommonOptions, total=False):
    """Likewise, of the losses of a pair of logits."""

    teacher_grad: bool


class RowOptions(TokenOptions, total=False):
    """Likewise, of the losses of classifiers."""

    standardize: bool
    class_dim: int | None


class SigmoidOptions(TypedDict, total=False):
    """Those of row losses without a softmax: no cross-entropy or entropy of one, and no shards."""

    ignore_index: int | None
    reduction: str
    loss_weight: float | Tensor
    token_weight: Tensor | None
    num_items_in_batch: float | Tensor | None
    teacher_grad: bool
    class_dim: int | None
    process_group: ProcessGroup | None
    backend: str | None


class LossParts(NamedTuple):
    """What ``return_parts=True`` gives beside the loss, the sum of the first two; detached."""

    distillation: Tensor
    """The divergence with its weights, reduced as the loss is."""
    hard: Tensor
    """The cross-entropy of the labels, likewise."""
    entropy: Tensor
    """Entropy in nats of the student's softened distribution of each row; 0 where it is ignored."""


def row_loss(
    spec: LossSpec,
    student: Tensor,
    teacher: TeacherLogits,
    target: Tensor | None,
    options: tuple[Any, ...],
    temperature: float | Tensor,
    *,
    ignore_index: int | None = -100,
    reduction: str = "mean",
    loss_weight: float | Tensor = 1.0,
    hard_weight: float = 0.0,
    token_weight: Tensor | None = None,
    num_items_in_batch: float | Tensor | None = None,
    return_parts: bool = False,
    teacher_grad: bool = False,
    standardize: bool = False,
    class_dim: int | None = None,
    process_group: ProcessGroup | None = None,
    tp_group: ProcessGroup | None = None,
    backend: str | None = None,
    **unknown: Any,
) -> Any:
    """Check the inputs, choose the backend and run it: the loss, or with it its ``LossParts``.

    ``options`` are the loss's own numbers, in the order of ``spec.options``.
    """
    if unknown:
        name = spec.function.__name__
        raise TypeError(f"{name}() got an unexpected keyword argument {next(iter(unknown))!r}")
    if not isinstance(teacher, Tensor):
        teacher = _ensemble.single(
            spec, teacher, student, temperature, class_dim, standardize, tp_group, teacher_grad
        )
    sharded = not (plain(student) and plain(teacher)) and any_sharded(student, teacher)
    numbers = (temperature, loss_weight, num_items_in_batch)
    if not sharded and any_sharded(target, token_weight, *numbers, *options):
        beside: dict[str, Any] = {spec.target_name: target, "token_weight": token_weight}
        beside |= {"temperature": temperature, "loss_weight": loss_weight}
        beside |= {"num_items_in_batch": num_items_in_batch}
        beside |= dict(zip(spec.options, options, strict=True))
        _dtensor.none_sharded("student_logits", beside)
    soft = _soft_targets.probabilities(spec, target, student)
    if class_dim is not None:
        _of_classifiers(spec, "class_dim")
        shape = ClassesAt(class_dim, student, teacher)
        if soft is not None:
            _soft_targets.check_form(soft, student, teacher)
        given = row_loss(
            spec, shape.logits(student), shape.logits(teacher),
            shape.of_rows(spec.target_name, target) if soft is None else shape.logits(soft),
            options,
            shape.of_rows("temperature", temperature),
            ignore_index=ignore_index, reduction=reduction, loss_weight=loss_weight,
            hard_weight=hard_weight, token_weight=shape.of_rows("token_weight", token_weight),
            num_items_in_batch=num_items_in_batch, return_parts=return_parts,
            teacher_grad=teacher_grad, standardize=standardize, process_group=process_group,
            tp_group=tp_group, backend=backend,
        )  # fmt: skip
        if isinstance(given, Tensor):
            return shape.back(given)
        return shape.back(given[0]), LossParts(*map(shape.back, given[1]))
    code = _checks.reduction(reduction)
    if process_group is not None:
        reduction = by_group(process_group, reduction, num_items_in_batch, student, teacher)
        code = _checks.REDUCTIONS[reduction]
    least = spec.least_classes
    if tp_group is not None:
        _group.check_call(tp_group, student, teacher, name="tp_group")
        least = 2 if tp_group.size() == 1 else 0
    if teacher_grad is not False:
        teacher_grad = _checks.flag("teacher_grad", teacher_grad)
    class_dim = _checks.logits(student, teacher, least, teacher_grad)
    heats: Tensor | None = None
    if isinstance(temperature, Tensor):
        temperature, heats = _temperature.split(temperature, student, class_dim)
    temperature = _checks.temperature(temperature)
    if spec.options:
        named = zip(spec.options.items(), options, strict=True)
        options = tuple([check(name, value) for (name, check), value in named])
        if spec.together is not None:
            spec.together(*options)
    if ignore_index is not None:
        ignore_index = _checks.integer("ignore_index", ignore_index)
    if standardize is not False:
        _of_classifiers(spec, "standardize")
        standardize = _checks.flag("standardize", standardize)
    if return_parts is not False:
        return_parts = _checks.flag("return_parts", return_parts)
    hard = _checks.number("hard_weight", hard_weight)
    reads_target = spec.needs_target or hard != 0.0
    index = _checks.NO_INDEX if ignore_index is None else ignore_index
    if soft is not None:
        _soft_targets.check(soft, student, teacher)
        _soft_targets.check_call(tp_group, teacher_grad and teacher.requires_grad)
        index = _checks.NO_INDEX
    elif target is not None:
        target, index = indices(spec, student, target, class_dim, ignore_index, not reads_target)
    elif reads_target:
        raise _checks.fail_type(spec.target_name, "a Tensor of class indices", "None")
    mask, ignored = target if soft is None else None, index
    if spec.counted is not None and not sharded:
        mask, ignored = spec.counted(options, mask, index)
    if token_weight is not None:
        _checks.token_weight(token_weight, student, class_dim)
        token_weight = keepable(token_weight)
    if isinstance(loss_weight, Tensor) and hard != 0.0 and loss_weight.requires_grad:
        common: dict[str, Any] = {
            "ignore_index": ignore_index,
            "reduction": reduction,
            "token_weight": token_weight,
            "num_items_in_batch": num_items_in_batch,
            "return_parts": return_parts,
            "teacher_grad": teacher_grad,
            "standardize": standardize,
            "tp_group": tp_group,
            "backend": backend,
        }
        given = temperature if heats is None else heats
        once = functools.partial(row_loss, spec, student, teacher, target, options, given, **common)
        both = joined(once(loss_weight=loss_weight), once(loss_weight=0.0, hard_weight=hard))
        return over_ranks(both, process_group, student, class_dim, mask, ignored)
    # Weights and counts that are tensors: nothing reads them on the host.
    factor = divisor = None
    hard_token_weight = token_weight if hard != 0.0 else None
    if isinstance(loss_weight, Tensor):
        _checks.weight(loss_weight)
        factor = _checks.on_device("loss_weight", loss_weight, student.device)
        loss_weight = 1.0
        if hard != 0.0:  # of the divergence alone
            token_weight = factor if token_weight is None else token_weight * factor
            factor = None
    scale = _checks.number("loss_weight", loss_weight)
    learned = heats is not None and _temperature.learned(spec, heats)
    if learned and tp_group is not None:
        raise _checks.fail("temperature", "a constant where tp_group is given", "another")
    if heats is not None:
        given_heats, heats = heats, keepable(heats.detach()).to(working_dtype(student, teacher))
        if spec.t_squared:
            squares = heats * heats
            token_weight = squares if token_weight is None else token_weight * squares
    elif spec.t_squared:  # here, for every loss
        scale = scale * temperature * temperature
    asked = spec
    spec, options, factor_there = spec.at(options)
    scale *= factor_there
    if num_items_in_batch is not None:
        items = _checks.items(num_items_in_batch, reduction)
        code = _checks.REDUCTIONS["sum"]
        if isinstance(items, Tensor):
            divisor = _checks.on_device("num_items_in_batch", items, student.device)
        else:
            scale, hard = scale / items, hard / items
    call = Checked(
        spec, backend, options, student, teacher, mask if soft is None else soft, token_weight,
        hard_token_weight, heats, temperature, scale, hard, standardize, return_parts, ignored,
        class_dim, code,
    )  # fmt: skip
    parts = None
    if soft is not None:
        loss, parts = _soft_targets.run(call)
    elif sharded:
        loss, parts = _of_dtensors(call, learned)
    elif tp_group is not None and tp_group.size() > 1:
        loss, parts = _sharded.run(tp_group, call)
    else:
        loss, parts = run(call)
        if learned:
            loss = _temperature.with_gradient(asked, loss, given_heats, call)
    result: Any = _weigh(loss, factor, divisor)
    if parts is not None:
        values = parts[:2]
        if code != 0:
            values = values.sum(tuple(range(1, parts.dim())))
        values = _weigh(values, None if factor is None else factor.detach(), divisor)
        result = result, LossParts(values[0], values[1], parts[2])
    return over_ranks(result, process_group, student, class_dim, mask, ignored)


def _of_dtensors(call: Checked, learned: bool) -> Result:
    """The loss of DTensors: of their local tensors, by ranks that have the rows or the classes."""
    if learned:
        raise _checks.fail("temperature", "a constant where logits are DTensors", "another")
    why = _sharded.why_not(call.spec, call.options, call.standardize, call.teacher)

    def local(call: Checked, group: Any) -> Result:
        return run(call) if group is None else _sharded.run(group, call)

    return _dtensor.row_loss(local, call, of_shards=why is None)


def _of_classifiers(spec: LossSpec, keyword: str) -> None:
    if spec.target_name == "labels" and spec.activation == "softmax":  # a loss of tokens
        raise TypeError(f"{spec.name}_loss() got an unexpected keyword argument {keyword!r}")


def by_group(group: Any, reduction: str, items: Any, *logits: Any) -> str:
    """Check what a mean over the rows of all ranks needs; gives the reduction it begins as."""
    _group.check_call(group, *logits)
    if _checks.reduction(reduction) != _checks.REDUCTIONS["mean"]:
        raise _checks.fail("reduction", "'mean' where process_group is given", repr(reduction))
    if items is not None:
        raise _checks.fail("num_items_in_batch", "None where process_group is given", items)
    return "sum"


def over_ranks(
    sums: Any, group: Any, student: Tensor, class_dim: int, target: Tensor | None, ignored: int
) -> Any:
    """This rank's share of the mean over the rows of all ranks: W times its sum over their number.

    Unchanged without a group. It comes last: whatever raises has done so before ranks wait.
    """
    if group is None:
        return sums
    if target is None:
        rows = student.shape[:class_dim] + student.shape[class_dim + 1 :]
        own = torch.full((), rows.numel(), device=student.device)
    else:
        own = (target if target.dtype == torch.bool else target.long() != ignored).sum()
    count = _group.total(own, group).clamp(min=1)
    if isinstance(sums, Tensor):
        return sums * (group.size() / count.to(sums.dtype))
    share = group.size() / count.to(sums[0].dtype)
    parts: LossParts = sums[1]
    given = parts.distillation * share, parts.hard * share, parts.entropy
    return sums[0] * share, LossParts(*given)


def _weigh(values: Tensor, factor: Tensor | None, divisor: Tensor | None) -> Tensor:
    if divisor is not None:
        values = values / divisor.to(values.dtype)
    return values if factor is None else weighted(values, factor.to(values.dtype))


def joined(one: Any, other: Any) -> Any:
    """The sum of two losses of the same logits, with their parts where they have them."""
    if isinstance(one, Tensor):
        return one + other
    (loss, parts), (added, others) = one, other
    sums = (parts.distillation + others.distillation, parts.hard + others.hard)
    return loss + added, LossParts(*sums, parts.entropy)


def indices(
    spec: LossSpec,
    student: Tensor,
    target: Any,
    class_dim: int,
    ignore_index: int | None,
    mask: bool,
) -> tuple[Tensor | None, int]:
    """The class indices as int64, whose comparisons with ``ignore_index`` do not wrap, checked;
    those that are but a mask may be bools, of which True counts."""
    _checks.target(target, student, class_dim, spec.target_name, mask)
    _checks.allocated(spec.target_name, target)
    if mask and target.dtype == torch.bool:
        return target.to(torch.int64) - 1, -1
    if ignore_index is None and mask:
        return None, _checks.NO_INDEX
    return target.to(torch.int64), _checks.NO_INDEX if ignore_index is None else ignore_index

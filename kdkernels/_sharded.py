"""A call of a row loss whose classes lie on the ranks of a process group.

Every rank has the same value, of which each differentiates by its own logits: the gradient is that
of one loss, as of Megatron's vocab_parallel_cross_entropy, and not W times that.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _checks, _reduce
from ._autograd import both_gradients, wants_gradient
from ._dispatch import choose
from ._dtypes import working_dtype
from ._rowrun import check_range
from ._shard_rows import BY_CHAIN, Rows
from ._shards import Shards, agree
from .registry import SPECS, LossSpec


def why_not(
    spec: LossSpec, options: tuple[Any, ...], standardize: bool, teacher: Tensor
) -> ValueError | None:
    """Why a loss is not evaluated on shards of its classes; None where it is."""
    if standardize:
        return _checks.fail("standardize", "False where tp_group is given", standardize)
    if spec.activation != "softmax":
        return _checks.fail("tp_group", f"None of {spec.name}", "a group")
    if wants_gradient(teacher) and spec.exchanged(*options) is None:
        expected = f"False of {spec.name} where tp_group is given"
        return _checks.fail("teacher_grad", expected, True)
    return None


def run(
    group: Any,
    spec: LossSpec,
    backend: str | None,
    options: tuple[Any, ...],
    temperature: float,
    scale: float,
    hard: float,
    standardize: bool,
    parts: bool,
    ignore_index: int,
    class_dim: int,
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    token_weight: Tensor | None,
    hard_token_weight: Tensor | None,
    row_temperature: Tensor | None,
    reduction: int,
    exchanged: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """As ``_rowrun.run``, of the classes of all ranks.

    ``exchanged`` says that the call is one of two, by the student and by the teacher, which ranks
    must agree on.
    """
    if (why := why_not(spec, options, standardize, teacher)) is not None:
        raise why
    if wants_gradient(teacher):
        of_rows = (target, token_weight, hard_token_weight, row_temperature, reduction, True)
        settings = (temperature, scale, hard, False, parts, ignore_index, class_dim)
        loss, separate = run(
            group, spec, backend, options, *settings, student, teacher.detach(), *of_rows
        )
        of, own_options = spec.exchanged(*options) or (spec.name, options)
        settings = (temperature, scale, 0.0, False, False, ignore_index, class_dim)
        other, _ = run(
            group, SPECS[of], backend, own_options, *settings, teacher, student.detach(), *of_rows
        )
        return both_gradients(loss, other), separate
    _checks.allocated("student_logits", student)
    _checks.allocated("teacher_logits", teacher)
    shape = student.shape[:class_dim] + student.shape[class_dim + 1 :]
    count, own, dtype = shape.numel(), student.shape[class_dim], working_dtype(student, teacher)
    numbers = [(x.dtype, x.shape) if isinstance(x, Tensor) else x for x in options]
    call = (temperature, scale, hard, parts, ignore_index, reduction, exchanged)
    needs = int(student.requires_grad and torch.is_grad_enabled())
    said = (spec.name, numbers, *call)
    shards = agree(group, said, count, own, dtype, needs, student.device)
    if target is not None:
        if spec.needs_target or hard != 0.0:
            check_range(target, shards.classes, ignore_index)
        target = target.reshape(-1).long()
    student, teacher = (
        x.movedim(class_dim, -1).reshape(count, own).contiguous() for x in (student, teacher)
    )

    def one_a_row(x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        return x.reshape(-1) if x.dim() else x.to(student.device).expand(count)

    soft, hard_values, spread, valid = evaluate(
        shards, spec, backend, options, temperature, student, teacher, target,
        one_a_row(row_temperature), ignore_index, hard != 0.0, parts,
    )  # fmt: skip
    soft = _reduce.weigh(soft, scale, one_a_row(token_weight), valid)
    if hard != 0.0:
        hard_values = _reduce.weigh(hard_values, hard, one_a_row(hard_token_weight), valid)
    if parts:
        spread = _reduce.weigh(spread, 1.0, None, valid)
    return _reduce.finish(soft, hard_values, spread, valid, shape, reduction, parts)


def evaluate(
    shards: Shards,
    spec: LossSpec,
    backend: str | None,
    options: tuple[Any, ...],
    temperature: float,
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    heats: Tensor | None,
    ignore_index: int,
    hard: bool,
    parts: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The values, cross-entropies and entropies of (rows, classes) and (rows,), and which count."""
    if spec.name not in BY_CHAIN:  # gradients of several calls are summed
        student = student.to(working_dtype(student, teacher))
    rows = Rows(shards, backend, temperature, ignore_index, student, teacher, target, heats)
    if spec.evaluate is not None:
        chosen = choose(SPECS["topk_kd"], student, backend)
        values, _, _, rows.valid = spec.evaluate(
            chosen, rows.student, target, temperature, rows.heats, ignore_index, False, False,
            rows, *options,
        )  # fmt: skip
    elif spec.steps is None:
        values = rows.divergence(spec, *options).to(rows.dtype)
    else:
        values = spec.steps(rows.step, *options).to(rows.dtype)
    hard_values = spread = torch.zeros_like(values)
    if hard:
        assert target is not None  # checked before
        hard_values = rows.cross_entropy(target).to(values.dtype)
    if parts:
        spread = rows.entropy().to(values.dtype)
    return values, hard_values, spread, rows.valid

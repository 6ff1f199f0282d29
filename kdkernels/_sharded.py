"""A call of a row loss whose classes lie on the ranks of a process group.

Every rank has the same value, of which each differentiates by its own logits: the gradient is that
of one loss, as of Megatron's vocab_parallel_cross_entropy, and not W times that.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _checks, _group, _reduce
from ._autograd import both_gradients, wants_gradient
from ._checked import Checked, Result
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


def run(group: Any, call: Checked, exchanged: bool = False) -> Result:
    """As ``_rowrun.run``, of the classes of all ranks.

    ``exchanged`` says that the call is one of two, by the student and by the teacher, which ranks
    must agree on.
    """
    spec, student, teacher, target = call.spec, call.student, call.teacher, call.target
    if (why := why_not(spec, call.options, call.standardize, teacher)) is not None:
        raise why
    if wants_gradient(teacher):
        loss, separate = run(group, call._replace(teacher=teacher.detach()), True)
        name, options = spec.exchanged(*call.options) or (spec.name, call.options)
        call = call._replace(
            spec=SPECS[name], options=options, student=teacher, teacher=student.detach(),
            hard=0.0, parts=False,
        )  # fmt: skip
        other, _ = run(group, call, True)
        return both_gradients(loss, other), separate
    _checks.allocated("student_logits", student)
    _checks.allocated("teacher_logits", teacher)
    count, own = call.rows().numel(), student.shape[call.class_dim]
    numbers = [(x.dtype, x.shape) if isinstance(x, Tensor) else x for x in call.options]
    needs = int(student.requires_grad and torch.is_grad_enabled())
    numbers += [call.temperature, call.scale, call.hard, call.parts, call.ignore_index]
    said = (spec.name, numbers, call.reduction, exchanged)
    dtype = working_dtype(student, teacher)
    shards = agree(group, said, count, own, dtype, needs, student.device)
    if target is not None:
        if spec.needs_target or call.hard != 0.0:
            check_range(target, shards.classes, call.ignore_index)
        target = target.reshape(-1).long()
    student, teacher = (
        x.movedim(call.class_dim, -1).reshape(count, own).contiguous() for x in (student, teacher)
    )
    heats = call.flat(call.row_temperature)
    rows = call._replace(student=student, teacher=teacher, target=target, row_temperature=heats)
    loss, separate = _reduce.weighed(call, *evaluate(shards, rows))
    return _group.once(loss), separate


def evaluate(shards: Shards, call: Checked) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The values, cross-entropies and entropies of (rows, classes) and (rows,), and which count."""
    spec, options = call.spec, call.options
    if spec.name not in BY_CHAIN:  # gradients of several calls are summed
        call = call._replace(student=call.student.to(working_dtype(call.student, call.teacher)))
    rows = Rows(shards, call)
    if spec.evaluate is not None:
        chosen = choose(SPECS["topk_kd"], call.student, call.backend)
        of_rows = call._replace(
            student=rows.student, row_temperature=rows.heats, hard=0.0, parts=False
        )
        values, _, _, rows.valid = spec.evaluate(of_rows, chosen, rows)
    elif spec.steps is None:
        values = rows.divergence(spec, *options).to(rows.dtype)
    else:
        values = spec.steps(rows.step, *options).to(rows.dtype)
    return values, *rows.beside(call, values), rows.valid

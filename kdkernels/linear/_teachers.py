"""The teachers that an output layer takes: checks, one vocabulary, the operator's tensors."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _checks, _topk
from .._dtensor import none_sharded
from .._dtypes import working_dtype
from ..losses.topk_kd import DENSE, MOST, buckets, check_pair, of_known, said
from ..teacher import LinearTeacher, TopKTeacher

Teacher = Tensor | LinearTeacher | TopKTeacher
VOCABULARIES = ("truncate",)


def check_teacher(teacher: Any, hidden: Tensor) -> None:
    """Check that a teacher is one, of the student's rows and on its device."""
    if isinstance(teacher, Tensor):
        _checks.tensor("teacher", teacher)
        _checks.dtype("teacher", teacher)
        _checks.constant("teacher", teacher)
        _checks.allocated("teacher", teacher)
        rows = teacher.shape[:-1] if teacher.dim() else None
    elif isinstance(teacher, (LinearTeacher, TopKTeacher)):
        rows = teacher.shape
    else:
        expected = "a Tensor of logits, a LinearTeacher or a TopKTeacher"
        raise _checks.fail_type("teacher", expected, type(teacher).__name__)
    if rows != hidden.shape[:-1]:
        expected = f"of the rows of student_hidden, {tuple(hidden.shape[:-1])}"
        raise _checks.fail("teacher", expected, None if rows is None else tuple(rows))
    held: dict[str, Any] = {"teacher": teacher}
    if not isinstance(teacher, Tensor):
        fields = dataclasses.fields(teacher)
        held = {f"teacher.{field.name}": getattr(teacher, field.name) for field in fields}
    none_sharded("student_hidden", held)
    if teacher.device != hidden.device:
        raise _checks.fail("teacher", f"on the student's device {hidden.device}", teacher.device)


def one_vocabulary(
    teacher: Teacher, weight: Tensor, bias: Tensor | None, vocab: str | None
) -> tuple[Teacher, Tensor, Tensor | None]:
    """Teacher and head of as many classes, cut to the common prefix where that is asked."""
    if vocab is not None:
        _checks.choice("vocab", vocab, VOCABULARIES)
    if isinstance(teacher, TopKTeacher):  # of which only the ids are known
        if vocab is not None:
            raise _checks.fail("vocab", "None where teacher is a TopKTeacher", repr(vocab))
        return teacher, weight, bias
    of_student = weight.shape[0]
    of_teacher = teacher.shape[-1] if isinstance(teacher, Tensor) else teacher.vocab_size
    if of_student == of_teacher:
        return teacher, weight, bias
    if vocab is None:
        expected = f"of the student's {of_student} classes (vocab='truncate' where one is padded)"
        raise _checks.fail("teacher", expected, of_teacher)
    common = min(of_student, of_teacher)
    weight, bias = weight[:common], None if bias is None else bias[:common]
    if isinstance(teacher, Tensor):
        return teacher[..., :common], weight, bias
    cut = None if teacher.bias is None else teacher.bias[:common]
    return dataclasses.replace(teacher, weight=teacher.weight[:common], bias=cut), weight, bias


class Sparse(NamedTuple):
    """What a sparse teacher is to the operator."""

    kind: str
    tensors: list[Tensor]
    says: Tensor
    """(rows,): of which rows the teacher knows anything."""
    added: Tensor | None
    """(rows,): what the divergence of each row has besides, a constant."""


def sparse(
    teacher: TopKTeacher, divergence: str, beta: float, tail: str, hidden: Tensor,
    classes: int | None,
) -> Sparse:  # fmt: skip
    """Checks and tensors of a sparse teacher; see ``losses.topk_kd``."""
    _checks.choice("divergence", divergence, tuple(DENSE))
    check_pair(divergence, beta, tail)
    if teacher.k > MOST:
        raise _checks.fail("teacher", f"of at most {MOST} ids a row", teacher.k)
    dtype = working_dtype(hidden, teacher.logprobs)
    given = teacher.ids, teacher.logprobs, teacher.log_rest
    marked, logits, mass = buckets(*given, tail, dtype, classes)
    says = said(teacher.logprobs, teacher.log_rest, tail).reshape(-1)
    kind = "topk_alone" if tail == "renormalize" else "topk"
    if tail != "drop":
        return Sparse(kind, [logits, marked], says, None)
    assert mass is not None
    return Sparse(kind, [logits, marked, mass], says, torch.special.xlogy(mass, mass))


def counted(
    known: Sparse, labels: Tensor | None, ignore_index: int, classes: int, look: bool
) -> tuple[Tensor, int]:
    """The labels, with the rows ignored of which the teacher says nothing; the ids, checked."""
    flat = None if labels is None else labels.reshape(-1)
    flat, ignore_index = of_known(known.says, flat, ignore_index)
    if look:
        _topk.check_ids(known.tensors[1], flat != ignore_index, classes)
    return flat, ignore_index


def tensors_of(teacher: Tensor | LinearTeacher) -> tuple[str, list[Tensor], list[float]]:
    """A teacher as the operator takes it: its kind, its tensors, its softcap and scale."""
    if isinstance(teacher, Tensor):
        return "logits", [teacher.detach()], [0.0, 1.0]
    tensors = [teacher.flatten().hidden, teacher.weight]
    if teacher.bias is not None:
        tensors.append(teacher.bias)
    return "linear", tensors, [teacher.softcap or 0.0, teacher.logit_scale]

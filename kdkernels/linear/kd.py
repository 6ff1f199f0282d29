"""Distillation through the output layer: the logits of all tokens never exist together."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from .. import _checks, _dispatch, _head
from .._dtensor import none_sharded
from .._dtypes import working_dtype
from .._group import ProcessGroup
from .._head import Head
from .._rowwise import LossParts, row_loss
from .._tracing import traced
from ..losses.kd import KD_OF_TOKENS
from ..losses.topk_kd import TAILS, of_known, said, topk_kd_loss
from ..registry import SPECS, LossSpec
from ..teacher import LinearTeacher, TopKTeacher
from ._inputs import as_linear_casts, chunk, label_indices, plain_rows, row_weights
from ._op import apply
from ._rows import LinearCall
from ._sharded import Split, check as check_shards, split
from ._teachers import (
    Sparse,
    Teacher,
    check_teacher,
    counted,
    one_vocabulary,
    sparse,
    tensors_of,
)

DIVERGENCES = {
    "kl": KD_OF_TOKENS,
    **{
        name: spec
        for name, spec in SPECS.items()
        if spec.family == "divergence" and spec.target_name == "labels" and spec.steps is None
    },
}
"""The losses of tokens that have a rule, by the names of the registry."""


def linear_kd_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher: Teacher,
    labels: Tensor | None = None,
    divergence: str = "kl",
    temperature: float = 1.0,
    *,
    student_bias: Tensor | None = None,
    beta: float | None = None,
    alpha: float | None = None,
    forward_weight: float | None = None,
    tail: str = "bucket",
    softcap: float | None = None,
    logit_scale: float = 1.0,
    vocab: str | None = None,
    chunk_tokens: int | None = None,
    ignore_index: int | None = -100,
    reduction: str = "mean",
    loss_weight: float | Tensor = 1.0,
    hard_weight: float = 0.0,
    token_weight: Tensor | None = None,
    num_items_in_batch: float | Tensor | None = None,
    return_parts: bool = False,
    tp_group: ProcessGroup | None = None,
    backend: str | None = None,
) -> Any:
    r"""A loss of tokens on ``hidden @ weight.T`` that never holds the logits of all tokens.

    .. math:: z = c \tanh\bigl(\tfrac{s}{c} (h W^\top + b)\bigr),\qquad
              L = \frac1N \sum_n D\bigl(\mathrm{softmax}(t_n / T), \mathrm{softmax}(z_n / T)\bigr)

    with D the loss that ``divergence`` names, s the ``logit_scale`` and c the ``softcap`` (none:
    z = s (h W^T + b)). **There is no T^2.** Tokens go through in chunks with the whole vocabulary:
    two buffers of ``chunk_tokens`` x V logits are reused, a chunk's gradient is written over the
    student's logits (with a softcap beside them), and its products with W and h are added up, that
    of the weight in float32. So the forward pass computes all gradients, and the backward pass
    multiplies them by a number. Memory: the weight's gradient and two chunks; in half
    precision on a CPU a third one, in float32. Matrix products: that
    of the logits, one for each gradient that is wanted, and the teacher's; a frozen weight costs
    none. Ignored tokens cost no product.

    ``reduction='none'`` recomputes the logits in the backward pass, which costs one product more.
    A row's value does not depend on its chunk but for the rounding of the matrix product, whose
    library may sum in another order for another number of rows; the sum over tokens in the weight's
    gradient is split at the chunks.

    A head under LoRA: pass ``weight + scaling * B @ A``, which autograd takes apart again. Tied
    weights: pass the embedding's. A weight that FSDP has sharded is no plain tensor: call this
    inside the module whose ``forward`` gathers it. Under autocast hidden states, weight and bias
    are cast as ``torch.nn.functional.linear`` casts them.

    With ``tp_group`` ranks first agree on the call (40 bytes a rank, which the host reads), then
    exchange numbers of each row of a chunk, as the loss on logits does, and last the N x H numbers
    of the hidden states' gradient, in their dtype. A chunk's logits have some copies then: of KL in
    their dtype, of the others in float64, by which ``chunk_tokens=None`` counts.

    Args:
        student_hidden: (..., H) hidden states after the final norm, at least two dimensions;
            float64, float32, float16 or bfloat16.
        student_weight: (V, H) weight of the output layer, of the same dtype and device; V >= 2.
        teacher: logits (..., V), any dtype and strides; or a
            :class:`kdkernels.teacher.LinearTeacher`, whose logits are made chunk by chunk; or a
            :class:`kdkernels.teacher.TopKTeacher`, K ids a row at the temperature of the loss, for
            ``'kl'``, ``'reverse_kl'``, ``'jsd'`` and ``'tv'``. A constant.
        labels: class indices of the shape of the rows, of which ``ignore_index`` is ignored; or
            bools, of which True counts, where ``hard_weight`` is 0.
        divergence: ``'kl'`` (p against q), ``'reverse_kl'``, ``'jsd'``, ``'mixed_kl'``,
            ``'skew_kl'``, ``'skew_reverse_kl'``, ``'tv'`` or ``'alpha_beta'``.
        temperature: T > 0.
        student_bias: (V,), or None.
        beta: of ``'jsd'`` and ``'alpha_beta'``; None: the default of the loss of that name.
        alpha: of the skew divergences and ``'alpha_beta'``, likewise.
        forward_weight: of ``'mixed_kl'``, likewise.
        tail: of a TopKTeacher, as in :func:`kdkernels.functional.topk_kd_loss`.
        softcap: bound of the student's logits, > 0, or None (Gemma 2's
            ``final_logit_softcapping``).
        logit_scale: multiplies the student's logits before the softcap.
        vocab: None: a teacher of another vocabulary size is an error. ``'truncate'``: both sides
            are compared on the common prefix of their vocabularies and normalised there. That is
            right where one is the other padded (Qwen's 151936 and 152064 rows), and nowhere else.
        chunk_tokens: tokens of a chunk; None: from 64 MiB of logits on a CPU, 1 GiB on a GPU.
        ignore_index, reduction, loss_weight, hard_weight, token_weight, num_items_in_batch,
            return_parts: as in :func:`kdkernels.functional.jsd_loss`; a tensor as ``loss_weight``
            is a constant.
        tp_group: the classes are those of all ranks of this torch.distributed group, as in
            :func:`kdkernels.functional.kd_loss`: ``student_weight`` (V_r, H) and ``student_bias``
            are the rank's rows, whose number may differ or be 0; hidden states, labels and weights
            of rows are every rank's. Of the teacher the rank has logits (..., V_r), a
            LinearTeacher with its rows of the weight, or a TopKTeacher whose ids are global. The
            loss is the same on every rank, and so is the gradient of ``student_hidden``: it is
            summed over the ranks here, as Megatron's ColumnParallelLinear sums it, so that nothing
            before this call may sum it again. Those of weight and bias are the rank's own.
        backend: of the rows' kernel. ``'reference'`` materialises the logits, and can be
            differentiated twice; with ``tp_group`` neither.

    Returns:
        float32 (float64 for float64 inputs); 0-d, or one value a row for ``'none'``; with
        ``return_parts`` also :class:`kdkernels.LossParts`.

    Raises:
        ValueError, TypeError: ``name must be <expected>, got <got>``.
    """
    names = ("student_hidden", "student_weight", "student_bias")
    hidden, weight, bias = as_linear_casts(student_hidden, student_weight, student_bias)
    plain_rows(names, (hidden, weight, bias))
    beside = {"labels": labels, "token_weight": token_weight, "loss_weight": loss_weight}
    none_sharded(names[0], {**beside, "num_items_in_batch": num_items_in_batch})
    sharded = check_shards(tp_group, hidden, weight, bias)
    least = 0 if sharded else 2
    softcap, logit_scale = _head.check(hidden, weight, bias, softcap, logit_scale, names, least)
    spec, options = divergence_of(divergence, beta=beta, alpha=alpha, forward_weight=forward_weight)
    tokens = chunk(chunk_tokens)
    code = _checks.reduction(reduction)
    temperature = _checks.temperature(temperature)
    hard = _checks.number("hard_weight", hard_weight)
    return_parts = _checks.flag("return_parts", return_parts)
    if ignore_index is not None:
        ignore_index = _checks.integer("ignore_index", ignore_index)
    _checks.choice("tail", tail, TAILS)
    check_teacher(teacher, hidden)
    if sharded and vocab is not None:
        raise _checks.fail("vocab", "None where tp_group is given", repr(vocab))
    teacher, weight, bias = one_vocabulary(teacher, weight, bias, vocab)
    chosen = _dispatch.choose_beside_cuda(spec, hidden, backend)
    rows = hidden.shape[:-1]
    flat = hidden.reshape(-1, hidden.shape[-1])
    classes = None if sharded else weight.shape[0]
    labels, index = label_indices(spec, labels, hidden, classes, ignore_index, hard != 0.0)
    if chosen == "reference" and not sharded:
        labels = None if labels is None else labels.reshape(-1)
        if isinstance(teacher, TopKTeacher):
            teacher = teacher.flatten()
            known = said(teacher.logprobs, teacher.log_rest, tail)
            labels, index = of_known(known, labels, index)
        if labels is not None:  # a row that is not used may hold NaN, which a product would spread
            flat = torch.where((labels != index).unsqueeze(-1), flat, 0.0)
        if token_weight is not None:
            _checks.token_weight(token_weight, hidden, hidden.dim() - 1)
            token_weight = token_weight.reshape(-1) if token_weight.dim() else token_weight
        common: Any = {
            "ignore_index": index,
            "reduction": reduction,
            "loss_weight": loss_weight,
            "hard_weight": hard,
            "token_weight": token_weight,
            "num_items_in_batch": num_items_in_batch,
            "return_parts": return_parts,
            "backend": "reference",
        }
        logits = Head(weight, bias, softcap, logit_scale).logits(flat)
        if isinstance(teacher, TopKTeacher):
            common |= {"divergence": divergence, "tail": tail, "log_rest": teacher.log_rest}
            common |= dict(zip(spec.options, options, strict=True))
            sparse_teacher = teacher.ids, teacher.logprobs
            given = topk_kd_loss(logits, *sparse_teacher, labels, temperature, **common)
        else:
            dense = teacher.logits() if isinstance(teacher, LinearTeacher) else teacher
            dense = dense.reshape(logits.shape)
            given = row_loss(spec, logits, dense, labels, options, temperature, **common)
        return _in_shape(given, rows)
    of_ids: Sparse | None = None
    if isinstance(teacher, TopKTeacher):
        of_jsd = options[0] if divergence == "jsd" else 0.5
        of_ids = sparse(teacher, divergence, of_jsd, tail, hidden, classes)
        look = chosen != "native" and hidden.is_cpu and not traced(hidden) and not sharded
        labels, index = counted(of_ids, labels, index, weight.shape[0], look)
        labels = labels.reshape(rows)
        kind, of_teacher, caps = of_ids.kind, of_ids.tensors, [0.0, 1.0]
    else:
        kind, of_teacher, caps = tensors_of(teacher)
    work = working_dtype(hidden, of_teacher[0])
    scale, *weights = row_weights(loss_weight, token_weight, hidden, work, hard)
    divisor = _divisor(num_items_in_batch, reduction, labels, index, hidden)
    spec, options, factor = spec.at(options)
    numbers = [temperature, scale * factor, hard, *spec.numbers_of_rule(options)]
    call = LinearCall(
        chosen, kind, spec.rule, numbers, None,
        [softcap or 0.0, logit_scale, *caps], index, tokens, return_parts,
    )  # fmt: skip
    shards: Split | None = None
    if sharded:
        items = None if isinstance(num_items_in_batch, Tensor) else num_items_in_batch
        shards, call = split(
            tp_group, spec, options, backend, call, (tail, reduction, items),
            (hidden, weight, bias), labels, of_teacher,
        )  # fmt: skip
    of_rows = [None if x is None else x.reshape(-1) for x in (labels, *weights)]
    loss, parts = apply(call, code == 0, shards, flat, weight, bias, *of_rows, of_teacher)
    added: Any = 0.0
    if of_ids is not None and of_ids.added is not None:
        assert of_rows[0] is not None
        added = scale * factor * of_ids.added
        added = added if of_rows[1] is None else added * of_rows[1]
        added = torch.where(of_rows[0].ne(index), added, 0.0)
        added = added if code == 0 else added.sum()
    loss = loss + added
    if isinstance(divisor, Tensor):
        divisor = divisor.to(loss.dtype)
    loss = loss.reshape(rows) if code == 0 else loss / divisor
    if not return_parts:
        return loss
    soft, hard_part = parts[:2] if code == 0 else parts[:2].sum(1)
    soft = soft + added
    if code == 0:
        return loss, LossParts(soft.reshape(rows), hard_part.reshape(rows), parts[2].reshape(rows))
    return loss, LossParts(soft / divisor, hard_part / divisor, parts[2].reshape(rows))


def _in_shape(given: Any, rows: torch.Size) -> Any:
    """A loss of flat rows, and its parts, of which those by row get their shape."""
    if isinstance(given, Tensor):
        return given.reshape(rows) if given.dim() else given
    loss, parts = given
    return _in_shape(loss, rows), LossParts(*(_in_shape(x, rows) for x in parts))


def _divisor(
    items: Any, reduction: str, labels: Tensor | None, ignore_index: int, hidden: Tensor
) -> float | Tensor:
    """What the rows' sum is divided by."""
    if items is not None:
        items = _checks.items(items, reduction)
        if isinstance(items, Tensor):
            return _checks.on_device("num_items_in_batch", items, hidden.device)
        return float(items)
    if _checks.REDUCTIONS[reduction] != 1:
        return 1.0
    if labels is None:
        return max(hidden.shape[:-1].numel(), 1)
    return (labels != ignore_index).sum().clamp(min=1)


def divergence_of(name: str, /, **numbers: float | None) -> tuple[LossSpec, tuple[Any, ...]]:
    """The loss of a name and its own numbers: those given, else its defaults."""
    spec = DIVERGENCES[_checks.choice("divergence", name, tuple(DIVERGENCES))]
    defaults = inspect.signature(spec.function).parameters
    for option, value in numbers.items():
        if value is not None and option not in spec.options:
            raise _checks.fail_type(option, f"None where divergence is {name!r}", value)
    given = {option: numbers.get(option) for option in spec.options}
    chosen = {k: defaults[k].default if v is None else v for k, v in given.items()}
    checked = tuple([spec.options[k](k, value) for k, value in chosen.items()])
    if spec.together is not None:
        spec.together(*checked)
    return spec, checked

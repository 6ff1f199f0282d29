"""Divergences from a sparse teacher: K ids a row with their log-probabilities."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Generator, Tensor

from .. import _checks, _topk
from .._calls import NO_ID, RowCall, TopKCall, TopKLossCall
from .._checked import Checked, Result
from .._dtensor import any_sharded, of_rows
from .._dtypes import INTEGERS, working_dtype
from .._rowrun import run
from .._rowwise import CommonOptions, row_loss
from .._tracing import readable
from ..reference.topk import rows as reference
from ..registry import LossSpec, register
from ._base import SparseLoss, row_function
from .jsd import JSD
from .kd import KD_OF_TOKENS
from .reverse_kl import REVERSE_KL
from .tv import TV

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .._shard_rows import Rows

DENSE = {"kl": KD_OF_TOKENS, "reverse_kl": REVERSE_KL, "jsd": JSD, "tv": TV}
TAILS = ("bucket", "renormalize", "teacher", "drop")
MOST = 1024


class TopKMass(NamedTuple):
    """What ``return_mass=True`` gives: probabilities of a row's ids together, detached; 0 where the
    row is ignored."""

    student: Tensor
    """Of the student's softened distribution."""
    teacher: Tensor
    """As it was given."""


@row_function(CommonOptions)
def topk_kd_loss(
    student_logits: Tensor,
    teacher_ids: Tensor,
    teacher_logprobs: Tensor,
    labels: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    *,
    divergence: str = "kl",
    beta: float = 0.5,
    tail: str = "bucket",
    log_rest: Tensor | None = None,
    return_mass: bool = False,
    **common: Unpack[CommonOptions],
) -> Any:
    r"""Divergence from a teacher of whom K ids a row are known, such as a top-k cache.

    .. math:: L = \frac1N \sum_n D(\tilde p_n, \tilde q_n),\qquad
              \tilde q_n = (q_{n,i_1}, \dots, q_{n,i_K}, 1 - \sum_k q_{n,i_k})

    with q the softmax of the student over T, and D that of the dense losses. What is left beside
    the ids is summed from the other classes' exponentials, so that it keeps its digits where the
    student is certain. ``tail`` says what becomes of the rest:

    - ``'bucket'``: one class more on both sides. A lower bound of the dense divergence, and equal
      to it where K = V.
    - ``'renormalize'``: none. Both sides are normalised over the K ids.
    - ``'teacher'``: the teacher is normalised over its ids, the student over the vocabulary.
      Reverse KL would be infinite.
    - ``'drop'``: :math:`\sum_k p_k \log(p_k / q_k)` of the probabilities as they are, of KL alone.
      It may be negative.

    **There is no T^2**, and the teacher's log-probabilities are those at the loss's own
    temperature: ``log_softmax(teacher / T)``. A row whose entries are all absent, and of whose rest
    nothing is known or nothing is used, is an ignored row. On a GPU, ids that are out of range or
    twice in a row make the row NaN; on the CPU they raise. With ``tp_group`` the ids are global and
    the same on every rank: K + W numbers of each row are summed over W ranks in float64.

    Args:
        teacher_ids: (..., K), of the shape of the rows and K of 1 to 1024, any integer dtype; in
            any order, none twice in a row.
        teacher_logprobs: of the same shape, any floating dtype; a constant. -inf marks an absent
            entry, whose id means nothing.
        divergence: ``'kl'``, ``'reverse_kl'``, ``'jsd'`` or ``'tv'``.
        beta: of ``'jsd'``, as in :func:`jsd_loss`; of the others unused.
        tail: ``'bucket'``, ``'renormalize'``, ``'teacher'`` or ``'drop'``.
        log_rest: of ``'bucket'``: log of the probability of all other ids, one number a row. None
            takes 1 less the sum of the ids' probabilities, of which half precision leaves little
            where that is near 1.
        return_mass: gives ``mass`` too, last: ``mass.student`` and ``mass.teacher``, the
            probabilities of a row's ids together, before any normalisation; detached.
    """
    _checks.tensor("student_logits", student_logits)
    least = 2 if common.get("tp_group") is None else 0
    class_dim = _checks.logits(student_logits, student_logits.detach(), least)
    _checks.allocated("student_logits", student_logits)
    _check_teacher(student_logits, class_dim, teacher_ids, teacher_logprobs, log_rest)
    tail = _tail("tail", tail)
    divergence = _divergence("divergence", divergence)
    if divergence != "jsd" and torch.compiler.is_compiling():
        beta = 0.5  # a number that is held and not used would be compiled anew for every value
    beta = _checks.fraction("beta", beta)
    check_pair(divergence, beta, tail)
    masses: list[TopKMass] | None = [] if _checks.flag("return_mass", return_mass) else None
    options = (divergence, beta, tail, teacher_ids, teacher_logprobs, log_rest, masses)
    constant = student_logits.detach()
    given = row_loss(TOPK_KD, student_logits, constant, labels, options, temperature, **common)
    if masses is None:
        return given
    mass = masses[-1]
    if any_sharded(student_logits):
        mass = TopKMass(*(of_rows(x, student_logits, class_dim) for x in mass))
    return (*given, mass) if isinstance(given, tuple) else (given, mass)


def _check_teacher(
    student: Tensor, class_dim: int, ids: Tensor, logprobs: Tensor, log_rest: Tensor | None
) -> None:
    rows = student.shape[:class_dim] + student.shape[class_dim + 1 :]
    _checks.tensor("teacher_ids", ids)
    _checks.tensor("teacher_logprobs", logprobs)
    if ids.dtype not in INTEGERS:
        raise _checks.fail_type("teacher_ids", "of an integer dtype", ids.dtype)
    if ids.shape[:-1] != rows or ids.dim() != len(rows) + 1 or not 1 <= ids.shape[-1] <= MOST:
        expected = f"of shape {(*rows, 'K')}, K from 1 to {MOST}".replace("'K'", "K")
        raise _checks.fail("teacher_ids", expected, tuple(ids.shape))
    _checks.dtype("teacher_logprobs", logprobs)
    if logprobs.shape != ids.shape:
        expected = f"of the shape of teacher_ids {tuple(ids.shape)}"
        raise _checks.fail("teacher_logprobs", expected, tuple(logprobs.shape))
    for name, value in (("teacher_ids", ids), ("teacher_logprobs", logprobs)):
        if value.device != student.device:
            raise _checks.fail(name, f"on the student's device {student.device}", value.device)
        _checks.allocated(name, value)
    _checks.constant("teacher_logprobs", logprobs)
    if log_rest is not None:
        _checks.token_weight(log_rest, student, class_dim, "log_rest")


def check_pair(divergence: str, beta: float, tail: str) -> None:
    if tail == "drop" and divergence != "kl":
        raise _checks.fail("divergence", "'kl' where tail is 'drop'", repr(divergence))
    if tail == "teacher" and (divergence == "reverse_kl" or (divergence == "jsd" and beta == 1.0)):
        expected = "'bucket' or 'renormalize' where divergence is reverse KL, else infinite"
        raise _checks.fail("tail", expected, repr(tail))


def buckets(
    ids: Tensor, logprobs: Tensor, log_rest: Tensor | None, tail: str, dtype: torch.dtype,
    classes: int | None, with_mass: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """The teacher's side: its ids (rows, K), ``NO_ID`` where absent; the logits of its K + 1
    buckets; the mass of its ids, where ``tail`` or the caller asks for it. ``classes``: of the
    student; None where they are not known."""
    k = ids.shape[-1]
    ids, logprobs = ids.reshape(-1, k), logprobs.reshape(-1, k)
    marked = _topk.marked(ids, logprobs == -torch.inf)
    logprobs = logprobs.to(dtype)
    total = None
    if with_mass or tail == "drop" or (tail == "bucket" and log_rest is None):
        total = logprobs.double().exp().sum(-1)
    if tail != "bucket":
        rest = torch.full_like(logprobs[:, :1], -torch.inf)
    elif log_rest is not None:
        rest = log_rest.reshape(-1, 1).to(dtype)
    else:
        assert total is not None
        rest = torch.log1p(-total.clamp(max=1.0)).to(dtype)
        if classes is not None and k >= classes:  # beside all of them the student has exactly none
            rest = rest.masked_fill((marked != NO_ID).sum(-1) >= classes, -torch.inf)
        rest = rest.unsqueeze(-1)
    mass = None if total is None else total.to(dtype)
    return marked, torch.cat([logprobs, rest], -1), mass


def said(logprobs: Tensor, log_rest: Tensor | None, tail: str) -> Tensor:
    """The rows of which the teacher says something."""
    known = (logprobs != -torch.inf).any(-1)
    return known if tail != "bucket" or log_rest is None else known | (log_rest != -torch.inf)


def _counted(
    options: tuple[Any, ...], target: Tensor | None, ignore_index: int
) -> tuple[Tensor, int]:
    _, _, tail, _, logprobs, log_rest, _ = options
    return of_known(said(logprobs, log_rest, tail), target, ignore_index)


def of_known(known: Tensor, target: Tensor | None, ignore_index: int) -> tuple[Tensor, int]:
    """The target that ignores rows of which the teacher says nothing, and what it ignores."""
    if target is None:
        return torch.where(known, 0, _checks.NO_INDEX), _checks.NO_INDEX
    return torch.where(known, target, ignore_index), ignore_index


def _evaluate(
    given: Checked, backend: str, shards: Rows | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The rows' divergences, cross-entropies, entropies, and which of them count; of shards of the
    classes neither of the second and third, which are not the ids' affair."""
    divergence, beta, tail, ids, logprobs, log_rest, masses = given.options
    student, hard = given.student, given.hard != 0.0
    dtype = working_dtype(student, logprobs)
    classes = student.shape[1] if shards is None else shards.shards.classes
    marked, p, mass = buckets(ids, logprobs, log_rest, tail, dtype, classes, masses is not None)
    target, ignore_index = given.target, given.ignore_index
    assert target is not None  # of ``_counted``
    valid = target != ignore_index
    if (backend != "native" or shards is not None) and readable(student, ids):
        _topk.check_ids(marked, valid, classes)
        if hard:
            _checks.target_range(target, student.shape[1], ignore_index)
    call = TopKCall(
        [given.temperature], None, dtype == torch.float64,
        tail != "renormalize" or masses is not None, hard, given.parts, ignore_index,
    )  # fmt: skip
    heats = given.row_temperature
    heats = None if heats is None else heats.to(dtype).contiguous()
    if shards is None:
        small, numbers = _topk.differentiable(backend, student, marked, target, heats, call)
    else:
        small = shards.small(marked, target, call, heats)
        numbers = small.new_zeros(_topk.NUMBERS, small.shape[0])
    if masses is not None:
        assert mass is not None
        own = small.detach().softmax(-1)[:, :-1].sum(-1)
        both = (torch.where(valid, x, 0.0).reshape(ids.shape[:-1]) for x in (own, mass))
        masses.append(TopKMass(*both))
    if tail == "renormalize":
        last = torch.full_like(small[:, :1], -torch.inf)
        small = torch.cat([small[:, :-1], last], -1)
    values = _dense(backend, divergence, beta, small, p, target, ignore_index)
    if tail == "drop":
        assert mass is not None
        values = mass * values + torch.special.xlogy(mass, mass)
    hard_values = numbers[_topk.HARD] if hard else torch.zeros_like(values)
    return values, hard_values, numbers[_topk.ENTROPY].detach(), valid


def _at_once(given: Checked) -> Result | None:
    """The reduced loss, by kernels that compute the gradient in the forward pass."""
    divergence, beta, tail, ids, logprobs, log_rest, masses = given.options
    student, hard, parts, reduction = given.student, given.hard, given.parts, given.reduction
    if tail == "drop" or masses is not None or not _topk.at_once(student, ids, reduction):
        return None
    dtype = working_dtype(student, logprobs)
    marked, p, _ = buckets(ids, logprobs, log_rest, tail, dtype, student.shape[1])
    spec, numbers, _ = DENSE[divergence].at((beta,) if divergence == "jsd" else ())
    numbers = spec.numbers_of_rule(numbers)
    rows = TopKCall(
        [given.temperature], None, dtype == torch.float64, tail != "renormalize", hard != 0.0,
        parts, given.ignore_index,
    )  # fmt: skip
    dense = RowCall(
        spec.rule, [1.0, given.scale, hard, *numbers], None, False, parts, given.ignore_index, 1,
        reduction,
    )  # fmt: skip
    by_row = given.target, given.token_weight, given.hard_token_weight, given.row_temperature
    return _topk.loss_at_once(student, marked, p, by_row, TopKLossCall(rows, dense, reduction))


def _dense(
    backend: str,
    divergence: str,
    beta: float,
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    ignore_index: int,
) -> Tensor:
    """The rows' values of the dense loss."""
    spec = DENSE[divergence]
    spec, numbers, _ = spec.at((beta,) if spec is JSD else ())
    call = Checked(spec, backend, numbers, student, teacher, target, ignore_index=ignore_index)
    return run(call)[0]


class TopKKDLoss(SparseLoss):
    """Module form of :func:`kdkernels.functional.topk_kd_loss`; see there.

    ``TopKKDLoss(tail="bucket")(student_logits, teacher_ids, teacher_logprobs, labels)``;
    ``labels`` is a mask and may be left out, ``log_rest`` a keyword.
    """


def _divergence(name: str, value: Any) -> Any:
    return _checks.choice(name, value, tuple(DENSE))


def _tail(name: str, value: Any) -> Any:
    return _checks.choice(name, value, TAILS)


def _any(name: str, value: Any) -> Any:
    """Checked where the logits are known, or before."""
    return value


def _inputs(generator: Generator, dtype: torch.dtype) -> tuple[Tensor, ...]:
    student = torch.randn(6, 9, generator=generator).to(dtype)
    teacher = (2 * torch.randn(6, 9, generator=generator)).log_softmax(-1)
    logprobs, ids = teacher.topk(4)
    mask = torch.randint(3, (6,), generator=generator)
    return student, ids, logprobs.to(dtype), mask


TOPK_KD = register(
    LossSpec(
        name="topk_kd",
        title="Top-k KD",
        paper="Anshumann et al., 2025 (2503.16870)",
        function=topk_kd_loss,
        module=TopKKDLoss,
        reference=reference,
        family="sparse",
        formula="mean D(p̃, q̃): K ids and the rest",
        temperature="T² out",
        reduction="mean over rows",
        eps="none needed",
        takes_target=True,
        target_name="labels",
        t_squared=False,
        rule="topk",
        evaluate=_evaluate,
        counted=_counted,
        at_once=_at_once,
        options={
            "divergence": _divergence,
            "beta": _checks.fraction,
            "tail": _tail,
            "teacher_ids": _any,
            "teacher_logprobs": _any,
            "log_rest": _any,
            "masses": _any,
        },
        samples=(
            {},
            {"divergence": "reverse_kl", "temperature": 2.0},
            {"divergence": "jsd", "beta": 0.1, "loss_weight": 0.25},
            {"divergence": "tv", "tail": "renormalize"},
            {"tail": "teacher"},
            {"tail": "drop", "temperature": 0.5},
        ),
        perturb={
            "divergence": "tv",
            "beta": {"divergence": "jsd", "beta": 0.2},
            "tail": "renormalize",
        },
        inputs=_inputs,
    )
)

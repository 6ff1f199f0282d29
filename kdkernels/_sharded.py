"""Row losses whose classes lie on the ranks of a process group (vocabulary-parallel logits).

A loss is a sum over the classes of a function F of p and q. A rank sees its own classes and one
more, the classes of all other ranks together, whose logits are logsumexps. With K the kernel's
value of that row, K2 its value of the two buckets [own classes, others], and M its value of the
ranks' buckets, the sum of F is M + sum over the ranks (K - K2): any rule is so evaluated by its own
kernels. Where F is a divergence no bucket exceeds its classes, so that nothing cancels. A loss with
a target has the target's logit as one more class, on every rank, and not among its own classes.
Float64 holds the others, of which a power is no divergence (``alpha_beta``).

KL needs less, by its chain rule: K - K2 is the divergence of a rank's own, renormalised classes
times a mass of the rank, and its gradient needs no other rank.

Every rank has the same value, of which each differentiates by its own logits: the gradient is that
of one loss, as of Megatron's vocab_parallel_cross_entropy, and not W times that.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _checks, _group, _reduce, _topk
from ._calls import NO_ID, TopKCall
from ._dispatch import choose
from ._dtypes import working_dtype
from ._rowrun import check_range, run as run_alone
from .reference._rows import masked_log_softmax, weighted
from .reference.hard import cross_entropy, entropy
from .registry import SPECS, LossSpec

_SETTINGS = (1.0, 1.0, 0.0, False, False, _checks.NO_INDEX, 1)
"""Of rows that are softened and counted already: as ``_rowrun.run`` takes them."""
_FIELDS = ("rows", "classes", "working dtype (bytes)", "gradient", "loss and options")


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
) -> tuple[Tensor, Tensor | None]:
    """As ``_rowrun.run``, of the classes of all ranks."""
    if standardize:
        raise _checks.fail("standardize", "False where tp_group is given", standardize)
    if spec.evaluate is not None:
        raise _checks.fail("tp_group", f"None of {spec.name}", "a group")
    shape = student.shape[:class_dim] + student.shape[class_dim + 1 :]
    numbers = [x for x in options if not isinstance(x, Tensor)]
    said = repr((spec.name, numbers, temperature, scale, hard, parts, ignore_index, reduction))
    rows = _Rows(group, backend, said, temperature, ignore_index)
    rows.take(student, teacher, target, row_temperature, class_dim)
    if target is not None and (spec.needs_target or hard != 0.0):
        check_range(target, rows.classes, ignore_index)

    def one_a_row(x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        return x.reshape(-1) if x.dim() else x.to(student.device).expand(rows.count)

    if spec.steps is None:
        values = rows.divergence(spec, *options)
    else:
        values = spec.steps(rows.step, *options)
    dtype = working_dtype(student, teacher)
    soft = _reduce.weigh(values.to(dtype), scale, one_a_row(token_weight), rows.valid)
    hard_values = spread = torch.zeros_like(soft)
    if hard != 0.0:
        assert target is not None  # checked before
        hard_values = rows.cross_entropy(target.reshape(-1).long()).to(dtype)
        hard_values = _reduce.weigh(hard_values, hard, one_a_row(hard_token_weight), rows.valid)
    if parts:
        spread = _reduce.weigh(rows.entropy().to(dtype), 1.0, None, rows.valid)
    return _reduce.finish(soft, hard_values, spread, rows.valid, shape, reduction, parts)


class _Rows:
    """The rows of one call: this rank's classes, and what the ranks tell each other of theirs."""

    def __init__(
        self, group: Any, backend: str | None, said: str, temperature: float, ignored: int
    ) -> None:
        self.group, self.backend = group, backend
        self.code = zlib.crc32(said.encode())
        self.temperature, self.ignored = temperature, ignored
        self.rank = group.rank()
        self.heats: Tensor | None = None
        self.target: Tensor | None = None
        self.valid: Tensor | None = None

    def take(
        self, student: Tensor, teacher: Tensor, target: Tensor | None, heats: Tensor | None,
        class_dim: int,
    ) -> None:  # fmt: skip
        _checks.allocated("student_logits", student)
        _checks.allocated("teacher_logits", teacher)
        self.dtype = working_dtype(student, teacher)
        self.count = (student.shape[:class_dim] + student.shape[class_dim + 1 :]).numel()
        own = student.shape[class_dim]
        needs = student.requires_grad and torch.is_grad_enabled()
        mine = [self.count, own, self.dtype.itemsize, int(needs), self.code]
        given = _group.stacked(torch.tensor(mine, device=student.device), self.group).tolist()
        for i, name in enumerate(_FIELDS):
            there = [x[i] for x in given]
            if name != "classes" and len(set(there)) > 1:
                raise _checks.fail("tp_group", f"given the same {name} on all ranks", there)
        self.sizes = [x[1] for x in given]
        self.classes, self.begin = sum(self.sizes), sum(self.sizes[: self.rank])
        if self.classes < 2:
            raise _checks.fail("student_logits", _checks.TWO_CLASSES, f"{self.sizes} on the ranks")
        self.student, self.teacher = (
            x.movedim(class_dim, -1).reshape(self.count, own).contiguous()
            for x in (student, teacher)
        )
        if not own:  # a class that both exclude, because the kernels want one
            none = student.new_full((self.count, 1), -torch.inf)
            self.student = torch.cat([self.student, none], -1)
            self.teacher = torch.cat([self.teacher, none.to(teacher.dtype)], -1)
        if heats is not None:
            heats = heats.to(student.device)
            self.heats = heats.reshape(-1) if heats.dim() else heats.expand(self.count)
            self.heats = self.heats.to(torch.float64).contiguous()
        if target is not None:
            self.target = target.reshape(-1).long()
            self.valid = self.target != self.ignored

    def mask(self, valid: Tensor | None) -> tuple[Tensor | None, int]:
        """Class indices that are but a mask."""
        if valid is None:
            return None, _checks.NO_INDEX
        return torch.where(valid, 0, -1), -1

    def owner(self, index: Tensor) -> Tensor:
        """The rank that has a class, (rows,)."""
        ends = torch.tensor(self.sizes, device=index.device).cumsum(0)
        return torch.searchsorted(ends, index.contiguous(), right=True).clamp(max=len(ends) - 1)

    def own(
        self, logits: Tensor, index: Tensor | None, soft: bool, spread: bool = False,
        wide: bool = True,
    ) -> Any:  # fmt: skip
        """(rows, 2): a class's logit, -inf where it is not this rank's, and the logsumexp of all
        others; in float64, because differences of rounded logsumexps are all that is left where
        masses nearly agree. And entropies. Not ``wide``: made in the working dtype, of which KL's
        chain rule leaves what the kernels of whole rows have."""
        valid = self.valid
        if index is None:
            ids = torch.full((self.count, 1), NO_ID, device=logits.device)
        else:
            local = index - self.begin
            absent = (local < 0) | (local >= self.sizes[self.rank])
            ids = _topk.marked(local, absent).unsqueeze(-1)
        target, ignored = self.mask(valid)
        heat = self.temperature if soft and self.heats is None else 1.0
        call = TopKCall([heat], None, wide, True, False, spread, ignored)
        backend = choose(SPECS["topk_kd"], logits, self.backend)
        heats = self.heats if soft else None
        if heats is not None and not wide:
            heats = heats.to(self.dtype)
        small, numbers = _topk.differentiable(backend, logits, ids, target, heats, call)
        largest = numbers[0].detach() / (heat if heats is None else heats)
        return small.double() + largest.double().unsqueeze(-1), numbers[_topk.ENTROPY].detach()

    def tell(self, own: Tensor) -> Tensor:
        """(ranks, ...) of every rank, of which this rank's keeps its graph."""
        flat = _group.stacked(own.flatten(), self.group)
        return flat.view(-1, *own.shape)

    def run(
        self, spec: LossSpec, options: tuple[Any, ...], student: Tensor, teacher: Tensor,
        target: int,
    ) -> Tensor:  # fmt: skip
        index = None
        if spec.needs_target:
            index = torch.full((self.count,), target, device=student.device)
        if self.valid is not None:
            index = torch.where(self.valid, 0 if index is None else index, _checks.NO_INDEX)
        tensors = student, teacher, index, None, None, None
        return run_alone(spec, self.backend, options, *_SETTINGS, *tensors, 0)[0]

    def divergence(self, spec: LossSpec, *options: Any) -> Tensor:
        if spec.name in _BY_CHAIN:
            return self.by_chain(spec, options)
        return self.by_buckets(spec, options)

    def by_chain(self, spec: LossSpec, options: tuple[Any, ...]) -> Tensor:
        """KL of the ranks' masses, and of each rank's own classes times its mass."""
        wide = self.dtype == torch.float64
        (a, _), (b, _) = (self.own(x, None, True, wide=wide) for x in (self.student, self.teacher))
        both = torch.stack([a[:, 1], b[:, 1].detach()])
        alive = (both.detach() != -torch.inf).all(0)
        alive = alive if self.valid is None else alive & self.valid
        target, ignored = self.mask(alive)
        heat = self.temperature if self.heats is None else 1.0
        heats = None if self.heats is None else self.heats.to(self.dtype)
        settings = heat, 1.0, 0.0, False, False, ignored, 1
        tensors = self.student, self.teacher, target, None, None, heats
        own = run_alone(spec, self.backend, options, *settings, *tensors, 0)[0].double()
        told = self.tell(torch.cat([both, own[None]]))
        student, teacher, inner = (told[:, i].T.contiguous() for i in range(3))
        teacher = teacher.detach()
        masses = (teacher if _BY_CHAIN[spec.name] == "teacher" else student).softmax(-1)
        total = self.run(spec, options, student, teacher, 0)
        return total + weighted(inner, masses).sum(-1)

    def by_buckets(self, spec: LossSpec, options: tuple[Any, ...], apart: bool = False) -> Tensor:
        """M + sum of K - K2. ``apart``: what is 0 where p or q is, of which the others' classes are
        two, one for each side, so that a sum which no bucket bounds has no bucket."""
        index = self.target if spec.needs_target else None
        sides = []
        for logits in (self.student, self.teacher):
            own, _ = self.own(logits, index, True)
            given = _group.gathered(own if index is not None else own[:, 1:], self.group)
            sides.append((own, given))
        mine = torch.arange(len(self.sizes), device=self.student.device) == self.rank
        rows: list[Tensor] = []
        buckets: list[Tensor] = []
        masses: list[Tensor] = []
        for (own, given), logits in zip(sides, (self.student, self.teacher), strict=True):
            rests = given[..., -1].T
            _, others = masked_log_softmax(rests, mine.expand(rests.shape))
            columns = [others]
            held = torch.where(mine[:, None, None], own[:, -given.shape[-1] :], given.detach())
            heat: Any = self.temperature if self.heats is None else self.heats.unsqueeze(-1)
            soft = logits.double() / heat
            first = [held[..., -1].T]
            if index is not None:
                at = self.owner(index)[None]
                columns.insert(0, given[..., 0].gather(0, at)[0])
                first.append(held[..., 0].gather(0, at).T)
                taken = torch.arange(logits.shape[-1], device=logits.device)
                soft = soft.masked_fill(taken == (index - self.begin).unsqueeze(-1), -torch.inf)
            elif apart:
                columns.insert(len(rows), torch.full_like(others, -torch.inf))
            more = torch.stack(columns, -1)
            rows.append(torch.cat([soft, more], -1))
            buckets.append(torch.cat([given[self.rank, :, -1:], more], -1))
            masses.append(torch.cat(first, -1))
        (s, t), width = rows, self.student.shape[-1]
        whole = self.run(spec, options, s, t.detach(), width)
        if apart:
            return _group.summed_terms(whole, self.group)
        coarse = self.run(spec, options, buckets[0], buckets[1].detach(), 1)
        terms = _difference(whole, coarse)
        top = self.run(spec, options, masses[0], masses[1].detach(), len(self.sizes))
        return top + _group.summed_terms(terms, self.group)

    def cross_entropy(self, index: Tensor) -> Tensor:
        if self.valid is not None:
            index = torch.where(self.valid, index, 0)
        own, _ = self.own(self.student, index, False)
        told = self.tell(own)
        logit = told[..., 0].gather(0, self.owner(index)[None]).T
        small = torch.cat([told[..., 1].T, logit], -1)
        return cross_entropy(small, torch.full_like(index, len(self.sizes)))

    def entropy(self) -> Tensor:
        own, spread = self.own(self.student.detach(), None, True, True)
        told = self.tell(torch.stack([own[:, 1], spread], -1))
        masses = told[..., 0].T
        q = masses.softmax(-1)
        inner = torch.where(q == 0, 0.0, q * told[..., 1].T).sum(-1)
        return entropy(masses, 1.0, False) + inner

    def step(
        self, of: LossSpec, *numbers: float, scale: float = 1.0, hard: float = 0.0,
        constant: bool = False, index: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """A call of ``LossSpec.steps``: rows of another loss, or a cross-entropy."""
        if scale == 0.0:
            assert index is not None
            index = index.reshape(-1).long()
            check_range(index if self.valid is None else index[self.valid], self.classes, NO_ID)
            return hard * self.cross_entropy(index).to(self.dtype)
        if numbers and of.name == "tv":  # the overlap, whose bucket is more than its classes
            values = self.by_buckets(of, numbers, apart=True)
        else:
            values = self.divergence(of, *numbers)
        return values.detach() if constant else values


class _Difference(torch.autograd.Function):
    """K - K2, whose value is 0 where K2 is infinite: M is infinite then, and gradients stay."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, coarse: Tensor) -> Tensor:
        return torch.where(coarse.isinf(), 0.0, whole - coarse)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor]:
        return upstream, -upstream


_difference: Callable[..., Tensor] = _Difference.apply


_BY_CHAIN = {"kd": "teacher", "reverse_kl": "student"}
"""Losses that are KL, and whose mass of a rank its own classes' divergence is multiplied with."""

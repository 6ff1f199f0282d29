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
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _checks, _group, _topk
from ._calls import NO_ID, TopKCall
from ._checked import Checked
from ._dispatch import choose
from ._dtypes import working_dtype
from ._rowrun import check_range, run as run_alone
from ._shards import Shards
from .reference._rows import masked_log_softmax, top, weighted
from .reference.acceptance import LEAST
from .reference.hard import cross_entropy, entropy
from .registry import SPECS, LossSpec


class Rows:
    """The rows of one call: this rank's classes, and what the ranks tell each other of theirs."""

    def __init__(self, shards: Shards, call: Checked) -> None:
        self.shards, self.backend, self.temperature = shards, call.backend, call.temperature
        student, teacher, self.target = call.student, call.teacher, call.target
        self.dtype, self.count = working_dtype(student, teacher), student.shape[0]
        self.student, self.teacher = student, teacher
        if not student.shape[1]:  # a class that both exclude, because the kernels want one
            none = student.new_full((self.count, 1), -torch.inf)
            self.student = torch.cat([student, none], -1)
            self.teacher = torch.cat([teacher, none.to(teacher.dtype)], -1)
        heats = call.row_temperature
        self.heats = None if heats is None else heats.to(student.device, torch.float64).contiguous()
        self.valid = None if self.target is None else self.target != call.ignore_index

    def mask(self, valid: Tensor | None) -> tuple[Tensor | None, int]:
        """Class indices that are but a mask."""
        if valid is None:
            return None, _checks.NO_INDEX
        return torch.where(valid, 0, -1), -1

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
            ids = self.shards.own(index).unsqueeze(-1)
        target, ignored = self.mask(valid)
        heat = self.temperature if soft and self.heats is None else 1.0
        call = TopKCall([heat], None, wide, True, False, spread, ignored)
        backend = choose(SPECS["topk_kd"], logits, self.backend)
        heats = self.heats if soft else None
        if heats is not None and not wide:
            heats = heats.to(self.dtype)
        small, numbers = _topk.differentiable(backend, logits, ids, target, heats, call)
        # In float64, because every rank's rounding of a common offset would be another.
        largest = numbers[0].detach().double()
        largest = largest / (self.heats if soft and self.heats is not None else heat)
        return small.double() + largest.unsqueeze(-1), numbers[_topk.ENTROPY].detach()

    def run(
        self, spec: LossSpec, options: tuple[Any, ...], student: Tensor, teacher: Tensor,
        target: int,
    ) -> Tensor:  # fmt: skip
        index = None
        if spec.needs_target:
            index = torch.full((self.count,), target, device=student.device)
        if self.valid is not None:
            index = torch.where(self.valid, 0 if index is None else index, _checks.NO_INDEX)
        return run_alone(Checked(spec, self.backend, options, student, teacher, index))[0]

    def divergence(self, spec: LossSpec, *options: Any) -> Tensor:
        if spec.name in BY_CHAIN:
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
        call = Checked(
            spec, self.backend, options, self.student, self.teacher, target, temperature=heat,
            row_temperature=heats, ignore_index=ignored,
        )  # fmt: skip
        own = run_alone(call)[0].double()
        told = self.shards.tell(torch.cat([both, own[None]]))
        student, teacher, inner = (told[:, i].T.contiguous() for i in range(3))
        teacher = teacher.detach()
        masses = (teacher if BY_CHAIN[spec.name] == "teacher" else student).softmax(-1)
        total = self.run(spec, options, student, teacher, 0)
        return total + weighted(inner, masses).sum(-1)

    def overlap(self) -> Tensor:
        """The sum of min(p, q), down to what a rate of the working dtype may be. No bucket bounds
        it, and its gradient is no difference of buckets': divided by a small rate, that would be
        one of rounding errors."""
        heat: Any = self.temperature if self.heats is None else self.heats.unsqueeze(-1)
        logs = []
        for logits in (self.student, self.teacher.detach()):
            x = logits.double() / heat
            if self.valid is not None:  # an ignored row may hold NaN
                x = x.masked_fill(~self.valid.unsqueeze(-1), 0.0)
            none = torch.zeros((), dtype=torch.bool, device=x.device)
            _, own = masked_log_softmax(x, none)
            _, whole = masked_log_softmax(_group.gathered(own, self.shards.group).T, none)
            logs.append(x - whole.unsqueeze(-1))
        terms = torch.minimum(*logs).exp().sum(-1)
        least = torch.finfo(self.dtype).tiny * LEAST
        return _group.summed_terms(terms, self.shards.group).clamp(min=least)

    def by_buckets(self, spec: LossSpec, options: tuple[Any, ...]) -> Tensor:
        """M + sum of K - K2."""
        index = self.target if spec.needs_target else None
        sides = []
        for logits in (self.student, self.teacher):
            own, _ = self.own(logits, index, True)
            given = _group.gathered(own if index is not None else own[:, 1:], self.shards.group)
            sides.append((own, given))
        ranks, rank, group = len(self.shards.sizes), self.shards.rank, self.shards.group
        mine = torch.arange(ranks, device=self.student.device) == rank
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
                at = self.shards.owner(index)[None]
                columns.insert(0, given[..., 0].gather(0, at)[0])
                first.append(held[..., 0].gather(0, at).T)
                taken = torch.arange(logits.shape[-1], device=logits.device)
                local = (index - self.shards.begin).unsqueeze(-1)
                soft = soft.masked_fill(taken == local, -torch.inf)
            more = torch.stack(columns, -1)
            rows.append(torch.cat([soft, more], -1))
            buckets.append(torch.cat([given[rank, :, -1:], more], -1))
            masses.append(torch.cat(first, -1))
        (s, t), width = rows, self.student.shape[-1]
        whole = self.run(spec, options, s, t.detach(), width)
        coarse = self.run(spec, options, buckets[0], buckets[1].detach(), 1)
        terms = _difference(whole, coarse)
        coarsest = self.run(spec, options, masses[0], masses[1].detach(), ranks)
        return coarsest + _group.summed_terms(terms, group)

    def small(
        self, ids: Tensor, target: Tensor | None, call: TopKCall, heats: Tensor | None
    ) -> Tensor:
        """The small logits of global ids (``reference/topk.py``), from the row's largest of them.

        One sum over the ranks: of each id's logit, which one rank has, and of the rests, each in
        its rank's column. It has the same derivatives on every rank, so that each has its own.
        """
        k, device = ids.shape[1], ids.device
        local = self.shards.own(ids)
        backend = choose(SPECS["topk_kd"], self.student, self.backend)
        mine, numbers = _topk.differentiable(backend, self.student, local, target, heats, call)
        heat = call.numbers[0] if heats is None else heats.double()
        wide = mine.double() + (numbers[0].detach().double() / heat).unsqueeze(-1)
        columns = torch.where(local == NO_ID, 0.0, wide[:, :k])
        packed = torch.cat([columns, self.shards.among(wide[:, k])], -1)
        told = _group.summed_terms(packed, self.shards.group)
        columns = told[:, :k].masked_fill(ids == NO_ID, -torch.inf)
        columns = columns.masked_fill(self.shards.unknown(ids), torch.nan)
        none = torch.zeros((), dtype=torch.bool, device=device)
        _, rest = masked_log_softmax(told[:, k:], none)
        whole = torch.cat([columns, rest.unsqueeze(-1)], -1)
        return (whole - top(whole)).to(mine.dtype)

    def cross_entropy(self, index: Tensor) -> Tensor:
        if self.valid is not None:
            index = torch.where(self.valid, index, 0)
        own, _ = self.own(self.student, index, False)
        told = self.shards.tell(own)
        logit = told[..., 0].gather(0, self.shards.owner(index)[None]).T
        small = torch.cat([told[..., 1].T, logit], -1)
        return cross_entropy(small, torch.full_like(index, len(self.shards.sizes)))

    def entropy(self) -> Tensor:
        own, spread = self.own(self.student.detach(), None, True, True)
        told = self.shards.tell(torch.stack([own[:, 1], spread], -1))
        masses = told[..., 0].T
        q = masses.softmax(-1)
        inner = torch.where(q == 0, 0.0, q * told[..., 1].T).sum(-1)
        return entropy(masses, 1.0, False) + inner

    def beside(self, call: Checked, values: Tensor) -> tuple[Tensor, Tensor]:
        """The rows' cross-entropies and entropies like ``values``; 0 where the call wants none."""
        hard_values = spread = torch.zeros_like(values)
        if call.hard != 0.0:
            assert call.target is not None  # checked before
            hard_values = self.cross_entropy(call.target).to(values.dtype)
        if call.parts:
            spread = self.entropy().to(values.dtype)
        return hard_values, spread

    def step(
        self, of: LossSpec, *numbers: float, scale: float = 1.0, hard: float = 0.0,
        constant: bool = False, index: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """A call of ``LossSpec.steps``: rows of another loss, or a cross-entropy. The overlap has
        its gradient here, asked or not."""
        if scale == 0.0:
            assert index is not None
            index = index.reshape(-1).long()
            counted = index if self.valid is None else index[self.valid]
            check_range(counted, self.shards.classes, NO_ID)
            return hard * self.cross_entropy(index).to(self.dtype)
        if numbers and of.name == "tv":
            return self.overlap()
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


BY_CHAIN = {"kd": "teacher", "reverse_kl": "student"}
"""Losses that are KL, and whose mass of a rank its own classes' divergence is multiplied with."""

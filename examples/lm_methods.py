"""How each method teaches a student: cross-entropy plus a divergence of token distributions.

A new method is one entry in ``METHODS``: the library's loss, the same loss as eager PyTorch writes
it (only to be timed beside), and its options.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from arguments import assignment
from lm_data import IGNORED
from torch import Tensor

from kdkernels.functional import (
    jsd_loss,
    kd_loss,
    linear_kd_loss,
    reverse_kl_loss,
    skew_kl_loss,
    topk_kd_loss,
)
from kdkernels.teacher import LinearTeacher, TopKTeacher

TRAINING = {"ce": 1.0, "weight": 3.0, "temperature": 1.0}
"""What every method has: the weights of cross-entropy and of the divergence, the temperature."""


@dataclass(frozen=True)
class Entry:
    """A divergence; ``loss`` and ``eager`` take (student, teacher, labels, options)."""

    name: str
    """Of the loss in the library."""
    loss: Callable[..., Tensor]
    eager: Callable[[Tensor, Tensor, Mapping[str, float]], Tensor]
    """A value a row, of the log-probabilities of student and teacher."""
    options: Mapping[str, float] = field(default_factory=dict)


def _divergence(mine: Tensor, other: Tensor) -> Tensor:
    """KL(other || mine) of log-probabilities, a value a row: in the order of ``F.kl_div``."""
    return F.kl_div(mine, other, reduction="none", log_target=True).sum(-1)


def _mixture(a: Tensor, b: Tensor, share: float) -> Tensor:
    """Logarithm of share · exp(a) + (1 - share) · exp(b)."""
    return torch.logsumexp(torch.stack([a + math.log(share), b + math.log1p(-share)]), 0)


def _eager_jsd(student: Tensor, teacher: Tensor, options: Mapping[str, float]) -> Tensor:
    beta = options["beta"]
    mixture = _mixture(teacher, student, beta)
    first, second = _divergence(mixture, teacher), _divergence(mixture, student)
    return beta * first + (1 - beta) * second


def _eager_skew_kl(student: Tensor, teacher: Tensor, options: Mapping[str, float]) -> Tensor:
    return _divergence(_mixture(teacher, student, options["alpha"]), teacher)


# The weights are the better ones of 1 and 3, and of 1, 3 and 10 for JSD, whose gradient is the
# smallest. They were chosen on held-out training text, with other seeds than those reported.
METHODS: dict[str, Entry | None] = {
    "ce": None,
    "kl": Entry("kd", kd_loss, lambda s, t, o: _divergence(s, t)),
    "reverse_kl": Entry("reverse_kl", reverse_kl_loss, lambda s, t, o: _divergence(t, s)),
    "jsd": Entry("jsd", jsd_loss, _eager_jsd, {"weight": 10.0, "beta": 0.5}),
    "skew_kl": Entry("skew_kl", skew_kl_loss, _eager_skew_kl, {"alpha": 0.1}),
}


@dataclass(frozen=True)
class Method:
    """An entry as a run asks for it: ``NAME[:OPTION=VALUE,...]``."""

    label: str
    """What it is called in tables and files."""
    entry: Entry | None
    options: Mapping[str, float]

    @staticmethod
    def parse(text: str) -> Method:
        name, colon, rest = text.partition(":")
        if name not in METHODS:
            raise ValueError(
                f"METHOD must be NAME[:OPTION=VALUE,...] with a name among "
                f"{', '.join(METHODS)}, got {text}"
            )
        entry = METHODS[name]
        options = {**TRAINING, **entry.options} if entry else {"ce": TRAINING["ce"]}
        changes = (assignment(item, name, options) for item in rest.split(",") if colon)
        method = Method(text, entry, {**options, **dict(changes)})
        # The library says what is wrong with a number, before anything is trained.
        logits = torch.zeros(1, 2)
        total(method, logits, logits, torch.zeros(1, dtype=torch.long))
        return method

    @property
    def divergence(self) -> str:
        """What the losses of sparse teachers and of heads call it."""
        assert self.entry is not None
        return "kl" if self.entry.name == "kd" else self.entry.name

    def own(self) -> dict[str, float]:
        """The options that go to the loss by name."""
        return {key: value for key, value in self.options.items() if key not in TRAINING}


def _buckets(known: Tensor) -> Tensor:
    """Log-probabilities of K tokens, and as TRL has it that of all others: 1 less their sum."""
    mass = known.float().logsumexp(-1, keepdim=True).clamp(max=-1e-7)
    return torch.cat([known.float(), torch.log(-torch.expm1(mass))], -1)


def _hard(method: Method, student: Tensor, labels: Tensor, items: Tensor | None) -> Tensor:
    how: dict[str, Any] = {"ignore_index": IGNORED, "reduction": "mean" if items is None else "sum"}
    loss = F.cross_entropy(student.flatten(0, -2), labels.flatten(), **how)
    return method.options["ce"] * (loss if items is None else loss / items)


def total(
    method: Method,
    student: Any,
    teacher: Tensor | TopKTeacher | LinearTeacher | None,
    labels: Tensor,
    backend: str | None = None,
    items: Tensor | None = None,
) -> Tensor:
    """What a step minimises: here the library is called.

    The student is logits (sequences, tokens, vocabulary), read as they are, or beside a teacher's
    head the hidden states and the weight of its own. Labels are those of cross-entropy, and the
    divergence leaves out the same tokens. No divergence has T² in: KL of the library has, and it is
    divided out. ``items`` is what the sum over tokens is divided by, instead of their number.
    """
    o = method.options
    if method.entry is None or teacher is None:
        return _hard(method, student, labels, items)
    keywords: dict[str, Any] = {
        "temperature": o["temperature"],
        "loss_weight": o["weight"],
        "hard_weight": o["ce"],  # cross-entropy in the same pass
        "num_items_in_batch": items,
        "backend": backend,
        **method.own(),
    }
    if isinstance(teacher, LinearTeacher):
        hidden, weight = student
        keywords["divergence"] = method.divergence
        return linear_kd_loss(hidden, weight, teacher, labels, **keywords)
    if isinstance(teacher, TopKTeacher):
        keywords |= {"divergence": method.divergence, "log_rest": teacher.log_rest}
        return topk_kd_loss(student, teacher.ids, teacher.logprobs, labels, **keywords)
    if method.entry.name == "kd" and o["temperature"]:  # of 0 the loss says what is wrong
        keywords["loss_weight"] /= o["temperature"] ** 2
    return method.entry.loss(student, teacher, labels=labels, **keywords)


def eager(
    method: Method,
    student: Any,
    teacher: Tensor | TopKTeacher | LinearTeacher | None,
    labels: Tensor,
    backend: str | None = None,
    items: Tensor | None = None,
) -> Tensor:
    """The same number from PyTorch's operations, as most trainers write it."""
    if isinstance(teacher, LinearTeacher):
        student, teacher = F.linear(*student), teacher.logits()
    o, loss = method.options, _hard(method, student, labels, items)
    if method.entry is None or teacher is None:
        return loss
    mine = F.log_softmax(student / o["temperature"], -1)
    if isinstance(teacher, TopKTeacher):
        mine, other = _buckets(mine.gather(-1, teacher.ids.long())), _buckets(teacher.logprobs)
    else:
        other = F.log_softmax(teacher / o["temperature"], -1)
    counted = labels != IGNORED
    rows = method.entry.eager(mine, other, o)
    return loss + o["weight"] * (rows * counted).sum() / (counted.sum() if items is None else items)

"""What a call of each family of kernels consists of, once; the operators' schemas are made of it.

A call is some tensors and one of the tuples below. ``numbers`` are the floats of a call in one
list, so that they can travel as one tensor under a compiler (``_tracing.symbolic_numbers``), which
then is ``symbolic`` and counts instead of them. csrc/calls.h has the same fields for C++.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, get_type_hints

from torch import Tensor

from ._tracing import symbolic_numbers


class RowCall(NamedTuple):
    """A loss with one value a row (families ``divergence`` and ``decoupled``)."""

    rule: str
    numbers: Sequence[float]
    """temperature, scale, weight of the cross-entropy, then the rule's own options; ``scale``
    multiplies the divergence."""
    symbolic: Tensor | None
    standardize: bool
    parts: bool
    """Whether the rows' divergences, cross-entropies and entropies are given: (3, rows...)."""
    ignore_index: int
    class_dim: int
    reduction: int


class CorrelationCall(NamedTuple):
    """A loss of the correlations of rows and of columns."""

    rule: str
    numbers: Sequence[float]
    """inter, intra (the two terms' weights), tau, eps."""
    symbolic: Tensor | None
    class_dim: int
    reduction: int


class FactorCall(NamedTuple):
    """IE-KD: two student factors and the teacher's."""

    numbers: Sequence[float]
    """inheritance_weight, exploration_weight."""
    symbolic: Tensor | None
    cosine: bool
    reduction: int


class TupleCall(NamedTuple):
    """REFILLED's tuples, on matrices of distances."""

    numbers: Sequence[float]
    """margin, temperature, scale."""
    symbolic: Tensor | None
    reduction: int


class TopKCall(NamedTuple):
    """What a divergence needs of rows of logits against K ids each (``reference/topk.py``)."""

    numbers: Sequence[float]
    """temperature."""
    symbolic: Tensor | None
    wide: bool
    """Whether to compute in float64, were the logits narrower."""
    rest: bool
    """Which numbers of a row are wanted: the logsumexp of the classes that are no ids, the
    cross-entropy of the target, the entropy of the softened distribution."""
    hard: bool
    entropy: bool
    ignore_index: int


class TopKLossCall(NamedTuple):
    """The loss of a sparse teacher at once, eagerly: it has no operator."""

    rows: TopKCall
    dense: RowCall
    """Of the dense loss on the rows' small logits, with the weights and the reduction."""
    reduction: int


class ComposedCall(NamedTuple):
    """A loss of torch operations with a written gradient; it has no operator."""

    evaluate: Callable[..., tuple[Tensor, Tensor | None]]
    scale: float
    reduction: int


_TYPES: dict[Any, str] = {
    str: "str",
    bool: "bool",
    int: "int",
    Sequence[float]: "float[]",
    Tensor | None: "Tensor?",
}


@dataclass(frozen=True)
class Family:
    """The kernels that share a schema.

    ``students`` are the tensors that get gradients, ``constants`` the others, by name; a constant
    whose name ends in ``?`` may be None. ``outputs`` are tensors without gradient that the forward
    operator returns too. ``recomputes`` says that a second operator computes the gradients from the
    inputs in the backward pass.
    """

    name: str
    students: tuple[str, ...]
    constants: tuple[str, ...]
    call: Any
    """One of the classes above."""
    outputs: tuple[str, ...] = ()
    recomputes: bool = True

    @property
    def tensors(self) -> int:
        return len(self.students) + len(self.constants)

    @property
    def needs(self) -> tuple[str, ...]:
        """The flags that say for which student a gradient is wanted."""
        if len(self.students) == 1:
            return ("need_gradient",)
        return tuple(f"need_{name}" for name in self.students)

    def arguments(self) -> str:
        """The schema's arguments that forward and backward share."""
        names = (*self.students, *self.constants)
        tensors = [f"Tensor{'?' * name.endswith('?')} {name.rstrip('?')}" for name in names]
        fields = get_type_hints(self.call).items()
        return ", ".join([*tensors, *(f"{_TYPES[kind]} {name}" for name, kind in fields)])

    def forward_schema(self) -> str:
        """The loss, and a gradient for each student: an empty tensor where none is wanted."""
        needs = "".join(f", bool {name}" for name in self.needs)
        gradients = "".join(f", Tensor {name.removeprefix('need_')}" for name in self.needs)
        others = "".join(f", Tensor {name}" for name in self.outputs)
        return f"({self.arguments()}{needs}) -> (Tensor loss{gradients}{others})"

    def backward_schema(self) -> str:
        """The gradients, recomputed; for which students, is asked only where there are several."""
        if len(self.students) == 1:
            return f"(Tensor upstream, {self.arguments()}) -> Tensor"
        needs = "".join(f", bool {name}" for name in self.needs)
        result = ", ".join("Tensor" for _ in self.students)
        return f"(Tensor upstream, {self.arguments()}{needs}) -> ({result})"


ROW = Family(
    "row",
    ("student",),
    ("teacher", "target?", "token_weight?", "hard_token_weight?", "row_temperature?"),
    RowCall,
    outputs=("parts",),
)
"""``token_weight`` multiplies a row's divergence, ``hard_token_weight`` its cross-entropy;
``row_temperature`` counts instead of the number."""
CORRELATION = Family("correlation", ("student",), ("teacher", "counted?"), CorrelationCall)
"""``counted`` says of each row, in one dimension, whether it takes part in anything."""
FACTORS = Family("iekd", ("inheritance", "exploration"), ("teacher",), FactorCall)
TUPLES = Family("tuple_matching", ("student",), ("teacher", "target"), TupleCall, recomputes=False)
TOPK = Family("topk", ("student",), ("ids", "target?", "row_temperature?"), TopKCall)
"""It has operators of its own (``_ops_topk``): what it gives are two tensors with gradients."""
TOPK_LOSS = "topk_loss"
"""The compiled kernels that compute a sparse teacher's loss at once."""
NO_ID = -(2**63)
"""The id of an absent entry."""
FAMILIES = {family.name: family for family in (ROW, CORRELATION, FACTORS, TUPLES)}


def traceable(call: Any) -> Any:
    """A call as an operator takes it: with its numbers in one tensor where a compiler holds one of
    them as a symbol."""
    symbolic = symbolic_numbers(call.numbers)
    return call if symbolic is None else call._replace(numbers=[], symbolic=symbolic)


def numbers_of(call: Any) -> list[float]:
    """The numbers that count in a call that an operator received."""
    return list(call.numbers) if call.symbolic is None else call.symbolic.tolist()

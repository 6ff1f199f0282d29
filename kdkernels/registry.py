"""The table of losses. One row a loss drives dispatch, tests, benchmarks and the README's table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Generator, Tensor, dtype
from torch.nn.modules.loss import _Loss

from . import _checks


class End(NamedTuple):
    """What a loss is where its option has a value at which the rule does not hold."""

    spec: LossSpec
    options: tuple[float, ...] = ()
    factor: float = 1.0


@dataclass(frozen=True, eq=False)
class LossSpec:
    """All that the project knows about one loss.

    ``family`` names the traversal that runs it: ``divergence``, ``decoupled`` and ``binary`` are
    row losses (one value a row; in the last each class is a distribution of its own), ``sampled``
    those whose teacher is a sampled token a row, ``sparse`` those whose teacher is a few ids a row,
    ``correlation`` couples the rows, ``embedding`` takes features or embeddings of a batch.
    ``inputs`` makes small tensors for a loss that does not take a pair of logits, in the order of
    its arguments. ``activation`` makes probabilities of the logits: a ``softmax`` needs two
    classes.
    ``samples`` are the option sets that the tests exercise, ``laws`` the names of the laws of
    ``tests/test_laws.py`` that it obeys.
    ``takes_target`` says that the loss accepts class indices, ``needs_target`` that it reads them;
    ``target_name`` is that argument's name. ``t_squared`` says that T^2 is in the loss,
    ``needs_teacher_mass`` that a class which only the teacher excludes makes it infinite, without a
    gradient; ``smooth`` that the gradient has no jumps, and the value no term of first order near
    equality. ``options`` are the row losses' own options, each with the function that checks it, of
    which ``domains`` are the least and the largest values where they are not merely >= 0;
    ``together`` checks them beside each other;
    ``checks`` are of what the Module of another loss holds;
    ``ends`` are values of the first one at which the loss is another (pairs: the compiler compares
    a number that it holds, and looks none up). ``rule`` is the kernels' rule, where that is not
    called as the loss is, and ``rule_numbers`` makes the rule's numbers of the options.
    ``steps`` makes each row's value of those of other losses, which its first argument evaluates,
    where no rule alone gives it; ``evaluate`` gives the values, cross-entropies, entropies and the
    mask of rows (``_checked.Checked``) on a backend, where the teacher is no logits, of shards of
    the classes too, and ``at_once`` the reduced loss by compiled kernels that compute the gradient
    in the forward pass, or None where they cannot; ``counted`` makes, of the options, the target
    and its ``ignore_index``, those that also ignore the rows of which the options say nothing.
    ``by_temperature`` gives each row's derivative
    by its temperature, for those who learn it. ``exchanged`` gives, of the options, the name and
    options of the loss that this is with teacher and student in exchanged roles: its kernels make
    the teacher's gradient, which is autograd's of the reference where there is none.
    ``constant_weight`` names the option that, at 0, switches off a weight which is computed from
    the student and counts as a constant, so that the gradient is not the derivative of the value
    (empty: there is none); ``perturb`` how ``tests/test_arguments.py`` changes the options that are
    not numbers, and options together where one counts only beside others. ``composed`` is the
    loss's function in ``kdkernels.composed``, where it has no kernels and its reference is slow.
    """

    name: str
    title: str
    paper: str
    function: Callable[..., Tensor]
    module: type[_Loss]
    reference: Callable[..., Any]
    family: str
    formula: str
    temperature: str
    reduction: str
    eps: str
    activation: str = "softmax"
    needs_target: bool = False
    takes_target: bool = False
    target_name: str = "target"
    t_squared: bool = True
    needs_teacher_mass: bool = False
    smooth: bool = True
    options: Mapping[str, Callable[[str, Any], float]] = field(default_factory=dict)
    together: Callable[..., None] | None = None
    checks: Mapping[str, Callable[[str, Any], Any]] = field(default_factory=dict)
    ends: tuple[tuple[float, End], ...] = ()
    rule: str = ""
    rule_numbers: Callable[..., tuple[float, ...]] | None = None
    steps: Callable[..., Tensor] | None = None
    evaluate: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor | None]] | None = None
    at_once: Callable[..., tuple[Tensor, Tensor | None] | None] | None = None
    counted: Callable[..., tuple[Tensor, int]] | None = None
    by_temperature: Callable[..., Tensor] | None = None
    exchanged: Callable[..., tuple[str, tuple[Any, ...]] | None] = lambda *_: None
    constant_weight: str = ""
    backends: tuple[str, ...] = ("native", "triton", "reference")
    samples: tuple[Mapping[str, Any], ...] = ({},)
    laws: tuple[str, ...] = ()
    note: str = ""
    perturb: Mapping[str, Any] = field(default_factory=dict)
    inputs: Callable[[Generator, dtype], tuple[Tensor, ...]] | None = None
    composed: Callable[..., tuple[Tensor, Tensor | None]] | None = None

    def __post_init__(self) -> None:
        if not self.rule:
            object.__setattr__(self, "rule", self.name)

    @property
    def domains(self) -> dict[str, tuple[float, float]]:
        unit = _checks.fraction
        return {name: (0.0, 1.0) for name, check in self.options.items() if check is unit}

    def at(self, options: tuple[Any, ...]) -> tuple[LossSpec, tuple[Any, ...], float]:
        """The loss that this is with some options, its options, and what multiplies it."""
        for value, end in self.ends:
            if options[0] == value:
                return end.spec, end.options, end.factor
        return self, options, 1.0

    def numbers_of_rule(self, options: tuple[Any, ...]) -> tuple[Any, ...]:
        return options if self.rule_numbers is None else self.rule_numbers(*options)

    @property
    def rule_family(self) -> str:
        """The family of the kernels' rule: a sampled token's is a cross-entropy."""
        return "divergence" if self.family == "sampled" else self.family

    @property
    def by_row(self) -> bool:
        """Whether the loss is a sum over rows, so that ``reduction='none'`` exists."""
        return self.family in ("divergence", "decoupled", "binary", "sampled", "sparse")

    @property
    def least_classes(self) -> int:
        return 2 if self.activation == "softmax" else 1


SPECS: dict[str, LossSpec] = {}


def _no_script(*_: Any) -> Any:
    raise RuntimeError(
        "torch.jit.script cannot compile kdkernels losses: use torch.compile, or torch.jit.trace"
    )


def register(spec: LossSpec) -> LossSpec:
    """Add a loss to the table; called once, at the end of its file in ``kdkernels/losses``."""
    if spec.name in SPECS:
        raise ValueError(f"name must be unused, got {spec.name!r}")
    for scripted in (spec.function, spec.module):  # torch.jit.script asks both for it
        scripted.__prepare_scriptable__ = _no_script  # type: ignore[union-attr]
    if hasattr(spec.module, "bind"):  # its constructor is what its function takes
        spec.module.bind(spec.function, {**spec.checks, **spec.options})
    SPECS[spec.name] = spec
    return spec

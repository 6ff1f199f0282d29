"""What a Triton rule of the row losses gives, and what ``row_kernel`` may rely on.

The twin of ``csrc/rules/contract.h``, in which the words are explained::

    FAMILY = "divergence"
    CENTRED = False

    @triton.jit
    def rule(p, q, d, first, second, third, fourth):
        return value, slope

``rule`` is elementwise on blocks of float32 or float64: p the teacher's probabilities, q the
student's, d = log p - log q, then the loss's options by position, 0 where it has fewer. The loss of
a row is the sum of the values, and slope = d value / d log q.

- Everywhere: value >= 0.
- p = q, d = 0: value 0; near it value and slope keep their relative accuracy.
- p = 0: d is -inf, or any number where p underflows, or NaN where q = 0 too.
- q = 0: d is +inf, or any number where q underflows. The slope is finite; value and slope are 0
  where p = 0 too.
- NaN in p and q gives NaN.

``CENTRED``: whether the slopes of a row sum to 0 by construction.

A rule of the family ``decoupled`` has ``CENTRED`` and ``rule`` for the classes other than the
target, and::

    @triton.jit
    def explicit(
        log_p_target, log_p_rest, log_q_target, log_q_rest, first, second, third, fourth
    ):
        return value, slope, weight

the explicit term, its derivative by the student's log-odds of the target, and the weight of the
other term.

A rule of the family ``binary`` takes each class as a distribution of its own, from the log-odds s
of the student and t of the teacher, and gap = t - s, which is better near 0 and NaN where both are
the same infinity; slope = d value / d s::

    @triton.jit
    def rule(s, t, gap, first, second, third, fourth):
        return value, slope

``numerics`` has functions that keep their accuracy near 0.
"""

from __future__ import annotations

import inspect
from types import ModuleType

RULE = ("p", "q", "d")
BINARY = ("s", "t", "gap")
EXPLICIT = ("log_p_target", "log_p_rest", "log_q_target", "log_q_rest")
OPTIONS = 4


def check(module: ModuleType) -> None:
    """Raise if a rule of the row losses breaks the contract in form."""
    name = module.__name__
    binary = module.FAMILY == "binary"
    if not binary and not isinstance(getattr(module, "CENTRED", None), bool):
        raise TypeError(f"{name}.CENTRED must be a bool")
    functions: dict[str, tuple[str, ...]] = {"rule": BINARY if binary else RULE}
    if module.FAMILY == "decoupled":
        functions["explicit"] = EXPLICIT
    for function, leading in functions.items():
        given = tuple(inspect.signature(getattr(module, function).fn).parameters)
        if given[: len(leading)] != leading or len(given) != len(leading) + OPTIONS:
            raise TypeError(
                f"{name}.{function} must take {', '.join(leading)} and {OPTIONS} options, got "
                + ", ".join(given)
            )

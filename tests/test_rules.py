"""What all rules of rows share, tested once.

Elementary functions, the contract of a rule at its edges, and each traversal of each backend with
the toy rules, which are not centred and use every option.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import cuda_emulator
import pytest
import rule_library
import torch
import toy
from inputs import make
from layouts import LAYOUTS
from torch import Tensor

from kdkernels._calls import RowCall
from kdkernels.registry import SPECS
from kdkernels.triton import _rule_modules, contract, rowwise

pytestmark = pytest.mark.skipif(
    cuda_emulator.compiler() is None, reason="the rules are compiled by a C++ compiler"
)

ISAS = tuple(rule_library._setup().instruction_sets())
vectors = pytest.mark.parametrize("vector", [True, False], ids=["vector", "scalar"])
isas = pytest.mark.parametrize("isa", ISAS)


def skip_unless_here(isa: str) -> None:
    if isa not in rule_library.instruction_sets():
        pytest.skip(f"this machine has no {isa}")


# Elementary functions.

NEAR_ZERO = torch.cat([sign * torch.logspace(-37, 0, 20001) for sign in (1, -1)])
FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
    "exp": (torch.exp, torch.linspace(-110, 90, 100001)),
    "expm1": (torch.expm1, torch.cat([torch.linspace(-30, 90, 50001), NEAR_ZERO])),
    "log": (torch.log, torch.cat([torch.logspace(-44.8, 38.5, 50001), 1 + NEAR_ZERO[::2] / 4])),
    "log1p": (
        torch.log1p,
        torch.cat([torch.linspace(-0.9999, 9, 50001), NEAR_ZERO, 1e9 * NEAR_ZERO.abs()]),
    ),
}


@isas
@vectors
@pytest.mark.parametrize("name", FUNCTIONS)
def test_elementary_functions(isa: str, name: str, vector: bool) -> None:
    """Two units in the last place everywhere, subnormal numbers included."""
    skip_unless_here(isa)
    function, x = FUNCTIONS[name]
    for dtype in torch.float32, torch.float64:
        given = x.to(dtype)
        expected = function(given.double())
        inside = expected.abs() < torch.finfo(dtype).max
        error = (rule_library.function(isa, name, given, vector).double() - expected).abs()
        kind = torch.finfo(dtype)
        unit = (expected.abs() * kind.eps).clamp(min=kind.smallest_normal * kind.eps)
        assert (error <= 2 * unit)[inside].all(), (error / unit)[inside].max()
        special = torch.tensor(
            [0.0, 1.0, torch.inf, -torch.inf, torch.nan, -1.0, -2.0], dtype=dtype
        )
        torch.testing.assert_close(
            rule_library.function(isa, name, special, vector), function(special), equal_nan=True
        )


# The contract. A case is p, q and d = log p - log q.

INF, NAN = torch.inf, torch.nan
TINY = 1e-99  # stands for a subnormal number of the dtype
EDGES = {
    "padding": (0.0, 0.0, NAN),
    "both_underflow": (0.0, 0.0, 3.0),
    "both_underflow_far": (0.0, 0.0, -90.0),
    "teacher_excludes": (0.0, 0.25, -INF),
    "teacher_underflows": (0.0, 0.25, -200.0),
    "student_excludes": (0.25, 0.0, INF),
    "student_underflows": (0.25, 0.0, 200.0),
    "equal": (0.25, 0.25, 0.0),
    "one": (1.0, 1.0, 0.0),
    "subnormal": (TINY, 2 * TINY, -0.6931472),
    "teacher_nearly_underflows": (TINY, 0.25, -INF),
    "student_nearly_underflows": (0.25, TINY, INF),
    "bad_student": (0.25, NAN, NAN),
    "bad_teacher": (NAN, 0.25, NAN),
}
RULES = (*rule_library.ROW_RULES, *cuda_emulator.TOYS)


def numbers_of(rule: str) -> list[list[float]]:
    """The numbers that its losses give a rule: usual ones, and fractions near both ends."""
    made = []
    for spec in SPECS.values():
        if spec.rule == rule and spec.rule_numbers is not None and spec.domains:
            made += [[*spec.rule_numbers(x)] for x in (0.5, 0.1, 0.9, 1e-3, 0.999)]
        if spec.rule == rule and not spec.options:
            made.append([0.0] * len(toy.OPTIONS))
    return made or [toy.OPTIONS]


def triton_pointwise(
    rule: str, numbers: list[float], p: Tensor, q: Tensor, d: Tensor
) -> tuple[Tensor, Tensor]:
    """The Triton rule on a block of numbers, by way of the interpreter."""
    from rule_block import block

    value, slope = torch.empty_like(p), torch.empty_like(p)
    module = {**_rule_modules(), **toy.MODULES}[rule]
    block[(1,)](p, q, d, value, slope, *numbers, RULE=module.rule, SIZE=p.numel())
    return value, slope


def runs(
    rule: str, numbers: list[float] = toy.OPTIONS
) -> Iterator[tuple[str, Callable[..., tuple[Tensor, Tensor]]]]:
    for isa in rule_library.instruction_sets():
        for vector in True, False:
            call = functools.partial(rule_library.pointwise, isa, rule, numbers, vector=vector)
            yield f"{isa}, vector {vector}", call
    if torch.cuda.is_available():
        return
    if rule in {**_rule_modules(), **toy.MODULES}:
        yield "triton", functools.partial(triton_pointwise, rule, numbers)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_edges_of_the_contract(rule: str, dtype: torch.dtype) -> None:
    names = [*EDGES] + ["equal"] * (16 - len(EDGES))
    p, q, d = torch.tensor([EDGES[name] for name in names], dtype=torch.float64).unbind(1)
    tiny = 8 * torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    p, q = (torch.where((x > 0) & (x < 1e-9), x / TINY * tiny, x) for x in (p, q))
    d = torch.where(d.isinf() & (p > 0) & (q > 0), p.log() - q.log(), d)
    p, q, d = (x.to(dtype) for x in (p, q, d))
    every = [(f"{how}, {x}", call) for x in numbers_of(rule) for how, call in runs(rule, x)]
    for how, call in every:
        value, slope = call(p.contiguous(), q.contiguous(), d.contiguous())
        for i, name in enumerate(EDGES):
            v, s, what = value[i].item(), slope[i].item(), f"{name} ({how}): {value[i]}, {slope[i]}"
            if name.startswith("bad"):
                assert v != v and s != s, what
                continue
            assert v >= 0 and v == v, what
            if p[i] == q[i]:
                assert v == 0 and s == 0, what
            if q[i] == 0:
                assert abs(s) < INF, what
            if "underflow" in name or name == "subnormal":
                assert v < INF and abs(s) < INF, what


@pytest.mark.parametrize(
    ("rule", "numbers"), [(rule, x) for rule in RULES for x in numbers_of(rule)], ids=str
)
def test_rules_keep_their_digits(rule: str, numbers: list[float]) -> None:
    """Value and slope as d vanishes, which p - q does not, and far from there; values are >= 0."""
    smooth = all(spec.smooth for spec in SPECS.values() if spec.rule == rule)
    least = -6 if smooth else -5  # from where on a sign is not that of a rounding error
    d = torch.cat([sign * torch.logspace(least, 1, 64, dtype=torch.float64) for sign in (1, -1)])
    q = torch.linspace(0.01, 0.4, 128, dtype=torch.float64) * torch.exp(-d.clamp(min=0))
    # Float32 numbers whose d is known better than they are.
    wide = (q * d.exp(), q, d)
    for how, call in runs(rule, numbers):
        truth = [x.double() for x in call(*wide)]
        narrow = call(*(x.float() for x in wide))
        assert (narrow[0] >= 0).all(), how
        for actual, expected in zip(narrow, truth, strict=True):
            torch.testing.assert_close(actual.double(), expected, rtol=2e-5, atol=1e-12, msg=how)


def test_triton_rules_keep_the_form() -> None:
    rows = ("divergence", "decoupled", "binary")
    modules = [m for m in (*_rule_modules().values(), *toy.MODULES.values()) if m.FAMILY in rows]
    assert len(modules) >= 5
    for module in modules:
        contract.check(module)
    for broken, text in (
        ({"CENTRED": 1}, "CENTRED must be a bool"),
        ({"rule": toy.explicit}, "must take p, q, d and 4 options"),
    ):
        module = type(
            "M", (), {"FAMILY": "divergence", "CENTRED": True, "rule": toy.rule, **broken}
        )
        with pytest.raises(TypeError, match=text):
            contract.check(module)  # type: ignore[arg-type]
    module = type("M", (), {"FAMILY": "binary", "rule": toy.rule})
    with pytest.raises(TypeError, match="must take s, t, gap and 4 options"):
        contract.check(module)  # type: ignore[arg-type]


# The traversals.

Run = Callable[..., tuple[Tensor, Any]]


def reference(
    rule: str, student: Tensor, teacher: Tensor, target: Tensor, standardize: bool, class_dim: int
) -> tuple[Tensor, Tensor]:
    """Values by row and gradient of their sum with weights, in float64; row 1 is ignored."""
    wide = student.double().requires_grad_()
    rows = [x.movedim(class_dim, -1).flatten(0, -2) for x in (wide, teacher.double())]
    arguments = (target.clamp(min=0),) if rule == "toy_decoupled" else ()
    losses = getattr(toy, rule)(*rows, *arguments, toy.OPTIONS, 2.0, standardize)
    losses = torch.where(target == -100, 0.0, losses) * 3.0
    weights = torch.linspace(-1, 2, len(losses), dtype=torch.float64)
    (gradient,) = torch.autograd.grad((losses * weights).sum(), wide)
    return losses.detach(), gradient


def check(
    run: Run,
    rule: str,
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    standardize: bool = False,
    class_dim: int = -1,
) -> None:
    """Values, gradient with an upstream number a row, and the mean with all its reductions."""
    class_dim %= student.dim()
    expected, slope = reference(rule, student, teacher, target, standardize, class_dim)
    student, teacher = student.clone(), teacher.clone()
    ignored = target == -100
    for x in student, teacher:
        rows = x.movedim(class_dim, -1)
        rows[ignored.view(rows.shape[:-1])] = torch.nan
    shared = {"temperature": 2.0, "scale": 3.0, "class_dim": class_dim, "standardize": standardize}
    weights = torch.linspace(-1, 2, len(target), dtype=expected.dtype)
    working = torch.float64 if torch.float64 in (student.dtype, teacher.dtype) else torch.float32
    loss, gradient = run(
        rule,
        student,
        teacher,
        target,
        toy.OPTIONS,
        reduction=0,
        upstream=weights.to(working),
        **shared,
    )
    digits = 1e-11 if working == torch.float64 else 4e-6
    scale = expected.abs().max()
    torch.testing.assert_close(loss.double().flatten(), expected, rtol=digits, atol=digits * scale)
    rounding = 0.0 if gradient.dtype == working else torch.finfo(gradient.dtype).eps
    rows, right = (x.double().movedim(class_dim, -1).flatten(0, -2) for x in (gradient, slope))
    bound = (10 * digits + rounding) * right.abs().amax(-1, keepdim=True) + 1e-7 * rounding
    assert ((rows - right).abs() <= bound).all(), ((rows - right).abs() / bound).max()
    assert not rows[ignored].any()
    loss, _ = run(rule, student, teacher, target, toy.OPTIONS, reduction=1, **shared)
    mean = expected.sum() / (~ignored).sum()
    torch.testing.assert_close(loss.double(), mean, rtol=2 * digits, atol=digits)
    nothing = run(rule, student, teacher, target, toy.OPTIONS, need_gradient=False, **shared)[0]
    torch.testing.assert_close(nothing.double(), mean, rtol=2 * digits, atol=digits)


def toy_inputs(
    rows: int, classes: int, dtype: torch.dtype, teacher_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    student, teacher, target = make(
        "gaussian", rows, classes, dtype=dtype, teacher_dtype=teacher_dtype
    )
    if rows > 2:
        target[1] = -100
    return student, teacher, target


def native(isa: str) -> Run:
    return functools.partial(rule_library.row_loss, isa)


def emulated(traversal: str | None) -> Run:
    def run(*args: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        loss, gradient, ran = cuda_emulator.row_loss(*args, traversal=traversal, **options)
        assert traversal in (None, ran)
        return loss, gradient

    return run


def interpreted(
    rule: str, student: Tensor, teacher: Tensor, target: Tensor, options: list[float], **named: Any
) -> tuple[Tensor, Tensor]:
    """The Triton rule; arguments as those of ``cuda_emulator.row_loss``."""
    reduction, upstream = named.get("reduction", 1), named.get("upstream")
    numbers = [named["temperature"], named["scale"], 0.0, *options]
    flags = (named["standardize"], False)
    call = RowCall(rule, numbers, None, *flags, -100, named["class_dim"], reduction)
    shared = (target, named.get("token_weight"), None, None, call)
    with toy.among_triton_rules():
        loss, gradient, _ = rowwise.forward(
            student, teacher, *shared, named.get("need_gradient", True) and upstream is None
        )
        if upstream is not None:
            gradient = rowwise.backward(upstream, student, teacher, *shared)
    return loss, gradient


TYPES = {
    "float32": (torch.float32, None),
    "float64": (torch.float64, None),
    "float16": (torch.float16, None),
    "bfloat16": (torch.bfloat16, None),
    "bfloat16-float32": (torch.bfloat16, torch.float32),
}
toys = pytest.mark.parametrize("rule", cuda_emulator.TOYS)
types = pytest.mark.parametrize("types", TYPES.values(), ids=TYPES)


@isas
@toys
@types
def test_native(isa: str, rule: str, types: Any) -> None:
    """Rows abreast (to 512 classes), rows one by one, lanes of rows (NCHW); standardised rows."""
    skip_unless_here(isa)
    for size in (1, 2), (5, 7), (9, 67), (3, 1000), (2, 5001):
        check(native(isa), rule, *toy_inputs(*size, *types))
    check(native(isa), rule, *toy_inputs(5, 67, *types), standardize=True)
    student, teacher, target = toy_inputs(2 * 5 * 7, 19, *types)
    student, teacher = (
        x.view(2, 5, 7, 19).permute(0, 3, 1, 2).contiguous() for x in (student, teacher)
    )
    check(native(isa), rule, student, teacher, target, class_dim=1)
    for layout in "transposed", "expanded_rows":
        student, teacher, target = toy_inputs(6, 67, *types)
        student, teacher = LAYOUTS.get(layout, lambda x: x)(student), teacher
        check(native(isa), rule, student, teacher, target)


EMULATED = {
    "lanes": ((5, 8), (3, 320)),
    "block": ((3, 24), (2, 2056)),
    "cluster": ((3, 40), (5, 20008)),
    "stream": ((3, 37), (2, 9001)),
    "split": ((2, 37), (2, 20009)),
    "general": ((3, 40), (2, 4104)),
}


@pytest.mark.parametrize(
    ("traversal", "size"), [(t, size) for t, sizes in EMULATED.items() for size in sizes], ids=str
)
@toys
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_emulated(rule: str, traversal: str, size: tuple[int, int], dtype: torch.dtype) -> None:
    check(emulated(traversal), rule, *toy_inputs(*size, dtype))


@toys
def test_emulated_general_rows(rule: str) -> None:
    """Other dtypes, other strides and standardisation."""
    for types in (torch.float64,), (torch.bfloat16, torch.float32):
        check(emulated("general"), rule, *toy_inputs(3, 40, *types))
        check(emulated("general"), rule, *toy_inputs(3, 40, *types), standardize=True)
    student, teacher, target = toy_inputs(6, 19, torch.float32)
    student, teacher = (
        x.view(2, 3, 1, 19).permute(0, 3, 1, 2).contiguous() for x in (student, teacher)
    )
    check(emulated(None), rule, student, teacher, target, class_dim=1)


@toys
@pytest.mark.parametrize("resident", [True, False], ids=["resident", "streamed"])
def test_interpreted(rule: str, resident: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from kdkernels.triton import launch

    if not resident:
        monkeypatch.setattr(launch, "LIMITS", launch.Limits(resident=4, streamed=8, tile=16))
    others = ((torch.bfloat16, torch.float32), (torch.float64,)) if resident else ()
    for types in (torch.float32,), *others:
        check(interpreted, rule, *toy_inputs(4, 21, *types))
    check(interpreted, rule, *toy_inputs(3, 11, torch.float32), standardize=True)


# Certain rows, where the projection of a rule that is not centred cancels.


def everywhere() -> Iterator[tuple[str, Run]]:
    for isa in rule_library.instruction_sets():
        yield isa, native(isa)
    for traversal in EMULATED:
        yield traversal, emulated(traversal)
    yield "triton", interpreted


@pytest.mark.parametrize("family", ["peaked", "disagreeing"])
@toys
def test_gradients_of_certain_rows(rule: str, family: str) -> None:
    """Relative to the row's largest gradient; without a pivot this is 1 % off."""
    options = [1.0, 0.0, 0.1, 0.0]  # no KL(p || q), whose slopes are centred and large
    for rows, classes in ((2, 40), (2, 1000)):
        student, teacher, target = make(family, rows, classes)
        wide = student.double().requires_grad_()
        arguments = ((target + 2) % classes,) if rule == "toy_decoupled" else ()
        loss = getattr(toy, rule)(wide, teacher.double(), *arguments, options, 1.0)
        (slope,) = torch.autograd.grad(loss.sum(), wide)
        index = arguments[0] if arguments else None
        for name, run in everywhere():
            if name == "triton" and classes > 100:
                continue
            gradient = run(
                rule, student, teacher, index, options,
                temperature=1.0, scale=1.0, reduction=2, class_dim=1, standardize=False,
            )[1]  # fmt: skip
            error = (gradient.double() - slope).abs().amax(-1) / slope.abs().amax(-1)
            assert (error < 1e-5).all(), f"{name}: {error.max():.1e}"

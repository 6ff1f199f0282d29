"""Under ``torch.compile``: one graph, eager numbers, no recompilation; operators pass opcheck."""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from cases import (
    LOSS_IDS,
    LOSSES,
    ONE_A_FAMILY,
    Case,
    alone_if_interpreted,
    each,
    reductions,
    value_and_grad,
)
from inputs import make
from layouts import LAYOUTS, class_dim, target_for
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from kdkernels import _ops
from kdkernels._dispatch import choose
from kdkernels._dtypes import working_dtype


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _assert_same(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@each(
    reduction=("mean", "sum", "none"),
    keep=lambda case, reduction: (
        reduction in reductions(case.spec)
        and (case.backend == "native" or case.spec in ONE_A_FAMILY)
        and (case.backend != "reference" or reduction == "mean")
    ),
    shared=("reduction",),
)
def test_fullgraph(case: Case, reduction: str) -> None:
    """Forward and backward; without grad for a loss of each family."""
    args = make("gaussian", *case.pick((5, 33), (3, 9)), device=case.device)
    options = {"reduction": reduction}
    compiled = torch.compile(case, fullgraph=True, backend="aot_eager")
    expected = value_and_grad(case, *args, **options)
    _assert_same(value_and_grad(compiled, *args, **options), expected)
    if case.spec in ONE_A_FAMILY:
        with torch.no_grad():
            torch.testing.assert_close(compiled(*args, **options), expected[0])


@each(
    kernels=True,
    layout=("transposed", "tokens_shifted", "image_channels_last"),
    shared=("layout",),
)
def test_fullgraph_of_layouts(case: Case, layout: str) -> None:
    """Inside a larger graph, with an operation before and after the loss."""
    student, teacher, target = make("gaussian", 12, 7, device=case.device)
    student, teacher = LAYOUTS[layout](student), LAYOUTS[layout](teacher)
    target = target_for(student, target)

    def step(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return 3 * case(2 * s, t, y) + s.mean()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    args = (student, teacher, target)
    _assert_same(value_and_grad(compiled, *args), value_and_grad(step, *args))


@each(kernels=True)
def test_float16_and_modules(case: Case) -> None:
    """float16 takes another path (its gradient is not stored); modules are how losses are used."""
    student, teacher, target = make("gaussian", 4, 9, dtype=torch.float16, device=case.device)
    module = case.spec.module(backend=case.backend)
    args = (student, teacher, *((target,) if case.spec.needs_target else ()))
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    loss, gradient = value_and_grad(compiled, *args)
    expected = value_and_grad(module, *args)
    torch.testing.assert_close(loss, expected[0])
    torch.testing.assert_close(gradient, expected[1])


@each(kernels=True, keep=alone_if_interpreted)
def test_batch_sizes_do_not_recompile(case: Case) -> None:
    """Ten batch sizes, one of them 1: a static graph, a dynamic one, and one for the 1."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(case, fullgraph=True, backend=counter)
    for rows in (4, 5, 6, 7, 8, 3, 2, 9, 11, 10):
        inputs = make("gaussian", rows, 9, device=case.device)
        _assert_same(value_and_grad(compiled, *inputs), value_and_grad(case, *inputs))
    assert counter.frame_count <= 2, f"compiled {counter.frame_count} times for 10 batch sizes"


@pytest.mark.parametrize("spec", LOSSES, ids=LOSS_IDS)
def test_inductor(spec: Any) -> None:
    """The default compiler, whose buffers are reused: nothing may read a freed one."""
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("torch.compile on the CPU needs a C++ compiler")
    device = "cpu"
    case = Case(spec, choose(spec, torch.empty(0), None), device)
    if case.interpreted:
        case = Case(spec, "reference", device)
    linear = torch.nn.Linear(6, 9)
    _, teacher, target = make("gaussian", 5, 9)
    features = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))

    def step(x: Tensor) -> Tensor:
        return case(linear(x), teacher, target)

    expected = value_and_grad(step, features)
    _assert_same(value_and_grad(torch.compile(step, fullgraph=True), features), expected)


FLOATS = (torch.float32, torch.float32)


def _operators(
    case: Case, layout: str = "contiguous", dtypes: tuple[torch.dtype, torch.dtype] = FLOATS
) -> list[tuple[Any, Any]]:
    """Forward and backward operator of the case's family, with the arguments of calls."""
    student, teacher, target = make(
        "gaussian", 12, 5, dtype=dtypes[0], teacher_dtype=dtypes[1], device=case.device
    )
    student, teacher = LAYOUTS[layout](student), LAYOUTS[layout](teacher)
    student = student.detach().requires_grad_()
    dim = class_dim(student)
    counted = torch.arange(12, device=case.device) % 3 > 0
    rest: list[Any] = [counted, case.spec.rule, [4.0, 8.0, 2.0, 1e-8], None, dim]
    family = "correlation"
    if case.spec.by_row:
        target[1] = -100
        index = target_for(student, target)
        hard = 0.5 if case.spec.needs_target else 0.0
        numbers = [2.0, 4.0, hard, *_rule_options(case)]
        heats = torch.full(
            index.shape, 2.0, device=case.device, dtype=working_dtype(student, teacher)
        )
        of_rows = [index, None, None, heats]
        rest = [*of_rows, case.spec.rule, numbers, None, False, hard > 0, -100, dim]
        family = "row"
    name = _ops.operator_name(case.backend, family)
    forward = getattr(torch.ops.kdkernels, name).default
    backward = getattr(torch.ops.kdkernels, f"{name}_backward").default
    upstream = torch.tensor(1.5, device=case.device, dtype=working_dtype(student, teacher))
    calls: list[tuple[Any, Any]] = []
    for reduction in (0, 1, 2) if case.spec.by_row else (1, 2):
        given = upstream.expand(target_for(student, target).shape) if reduction == 0 else upstream
        for gradient in (False, True) if reduction else (False,):
            calls.append((forward, (student, teacher, *rest, reduction, gradient)))
        calls.append((backward, (given, student.detach(), teacher, *rest, reduction)))
    return calls


def _rule_options(case: Case) -> list[float]:
    """The loss's own numbers in the order of its rule: the floats of its signature."""
    shared = ("temperature", "loss_weight", "hard_weight")
    parameters = inspect.signature(case.spec.function).parameters.values()
    return [p.default for p in parameters if isinstance(p.default, float) and p.name not in shared]


@each(ONE_A_FAMILY, kernels=True)
def test_opcheck(case: Case) -> None:
    for operator, args in _operators(case):
        torch.library.opcheck(operator, args)


@each(ONE_A_FAMILY, kernels=True)
def test_operators_refuse_what_they_cannot_see(case: Case) -> None:
    """A direct call has no reference to turn to: a lost tangent would be a derivative of 0."""
    for operator, args in _operators(case):
        first = int("backward" in str(operator))
        for name, place in (("student", first), ("teacher", first + 1)):
            plain = args[place].detach()

            def given(x: Tensor, place: int = place, args: Any = args) -> list[Any]:
                constants = [a.detach() if isinstance(a, Tensor) else a for a in args]
                return [*constants[:place], x, *constants[place + 1 :]]

            with forward_ad.dual_level():
                dual = forward_ad.make_dual(plain, torch.ones_like(plain))
                with pytest.raises(ValueError, match=f"{name} must be without a forward-mode tan"):
                    operator(*given(dual))
                operator(*given(plain))
            with pytest.raises(TypeError, match=f"{name} must be a dense Tensor .*sparse_coo"):
                operator(*given(plain.to_sparse()))


@each(kernels=True, keep=alone_if_interpreted)
def test_who_looks_on_sees_the_operator(case: Case) -> None:
    """A graph that is recorded computes the loss, and fake tensors have no address to hand over."""
    student, teacher, target = make("gaussian", 5, 9, device=case.device)
    expected = value_and_grad(case, student, teacher, target)

    def step(s: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        s = s.detach().requires_grad_()
        loss = case(s, t, y)
        return loss.detach(), torch.autograd.grad(loss, s)[0]

    recorded = make_fx(step)(student, teacher, target)
    names = {str(node.target) for node in recorded.graph.nodes}
    assert any(name.startswith("kdkernels.") for name in names), names
    other = student + 1 - torch.arange(9.0, device=case.device)
    _assert_same(recorded(other, teacher, target), value_and_grad(case, other, teacher, target))

    with FakeTensorMode() as mode:
        fakes = (mode.from_tensor(x) for x in (student, teacher, target))
        loss, gradient = step(*fakes)
    for fake, real in zip((loss, gradient), expected, strict=True):
        assert (fake.shape, fake.dtype) == (real.shape, real.dtype)


@each(
    ONE_A_FAMILY,
    kernels=True,
    layout=("transposed", "tokens", "image_channels_last", "expanded_rows"),
)
def test_fake_kernels_know_strides_and_dtypes(case: Case, layout: str) -> None:
    """What the compiler believes is what the kernel returns, however the inputs lie."""
    for dtypes in ((torch.float32, torch.float64), (torch.bfloat16, torch.float16)):
        for operator, args in _operators(case, layout, dtypes):
            torch.library.opcheck(operator, args, test_utils="test_faketensor")

"""``hard_weight`` and ``return_parts`` of all row losses: cross-entropy in the same pass.

What they must be is written here with ``torch.nn.functional`` and softmaxes of float64.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import SOFTMAX_ROWS, Case, at_temperature, call, each, row_weights
from inputs import make
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from kdkernels import _dispatch
from kdkernels.functional import kd_loss, mixed_kl_loss
from kdkernels.registry import SPECS, LossSpec

row_losses = pytest.mark.parametrize("spec", SOFTMAX_ROWS, ids=lambda spec: spec.name)
WEIGHT = 0.75


def _inputs(case: Case, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    student, teacher, target = make("gaussian", 7, 19, dtype=dtype, device=case.device)
    target = target.clamp(min=1)
    target[2] = target[5] = -100
    return student, teacher, target


def _loss_and_grad(loss: Any, leaf: Tensor) -> tuple[Tensor, Tensor]:
    loss = loss[0] if isinstance(loss, tuple) else loss
    (gradient,) = torch.autograd.grad(loss, leaf, row_weights(loss))
    return loss.detach(), gradient


def _beside(case: Case, student: Tensor, teacher: Tensor, hard: float, **options: Any) -> Tensor:
    """The loss, and ``F.cross_entropy`` of the same rows beside it, on the reference in float64."""
    target, reduction = options["target"], options.get("reduction", "mean")
    options = {k: v.double() if _floats(v) else v for k, v in options.items()}
    soft = call(case.spec, student, teacher, target, backend="reference", **options)
    class_dim = 2 if student.dim() == 3 else 1
    entropies = F.cross_entropy(student.movedim(class_dim, 1), target, reduction="none")
    entropies = entropies * options.get("token_weight", 1.0)
    count = {"mean": (target != -100).sum(), "sum": 1, "none": 1}[reduction]
    return soft + hard * (entropies if reduction == "none" else entropies.sum()) / count


def _floats(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def _check(case: Case, student: Tensor, teacher: Tensor, close: float, **options: Any) -> None:
    leaf, wide = student.clone().requires_grad_(), student.double().requires_grad_()
    ours = _loss_and_grad(case(leaf, teacher, hard_weight=WEIGHT, **options), leaf)
    expected = _loss_and_grad(_beside(case, wide, teacher.double(), WEIGHT, **options), wide)
    size = expected[1].abs().max().item()
    rounding = {torch.float16: 1e-3, torch.bfloat16: 1e-2}.get(student.dtype, close)
    torch.testing.assert_close(ours[0].double(), expected[0], rtol=close, atol=close)
    torch.testing.assert_close(ours[1].double(), expected[1], rtol=rounding, atol=close * size)
    ignored = options["target"] == -100
    rows = ours[1].movedim(2 if student.dim() == 3 else 1, -1)
    assert not rows[ignored].any()


@each([SPECS["kd"], SPECS["dkd"], SPECS["jsd"]], gap=(9.0, 12.0, 13.0, 20.0))
def test_a_certain_label_keeps_its_digits(case: Case, gap: float) -> None:
    """log(1 + e) in float64, where neither e less half its square nor 1 + e is exact enough."""
    student = torch.tensor([[gap, 0.0]], dtype=torch.float64, device=case.device)
    target = torch.zeros(1, dtype=torch.int64, device=case.device)
    loss = case(student, student, target, target=target, hard_weight=1.0)
    torch.testing.assert_close(loss.item(), math.log1p(math.exp(-gap)), rtol=1e-14, atol=0.0)


@each(
    SOFTMAX_ROWS,
    reduction=("mean", "sum", "none"),
    dtype={"f64": torch.float64, "f32": torch.float32},
    shared=("dtype",),
)
def test_adds_the_cross_entropy_of_the_labels(case: Case, reduction: str, dtype: Any) -> None:
    """Value and gradient, with the rows' weights, and not with the loss's."""
    student, teacher, target = _inputs(case, dtype)
    student[2] = float("nan")
    weight = torch.linspace(0.5, 2, 7).to(student)
    options: dict[str, Any] = {"target": target, "reduction": reduction, "token_weight": weight}
    close = 1e-12 if dtype == torch.float64 else 1e-5
    safe = student.nan_to_num()
    _check(case, safe, teacher, close, loss_weight=0.3, **options)
    ours = case(student, teacher, hard_weight=WEIGHT, **options)
    # Both without a gradient, with which a compiler may contract other products.
    assert torch.equal(ours, case(safe.detach(), teacher, hard_weight=WEIGHT, **options))


@each(
    SOFTMAX_ROWS,
    layout=("dense", "tokens", "strided", "half", "bfloat16", "long"),
    temperature=(1.0, 2.0, 3.0, 4.0),
    # Of 15000 probabilities two are equal but for a rounding, where a gradient may jump.
    keep=lambda case, layout, temperature: (
        layout != "long" or (case.spec.smooth and not case.interpreted)
    ),
    shared=("layout", "temperature"),
)
def test_in_every_traversal_at_every_temperature(
    case: Case, layout: str, temperature: float
) -> None:
    """The exponentials at temperature 1 are powers of the loss's own at 1, 2 and 4."""
    options = at_temperature(case.spec, temperature)
    student, teacher, target = _inputs(case, torch.float32)
    if layout == "dense":
        student, teacher = (x.t().contiguous()[None, :, :, None] for x in (student, teacher))
        target = target[None, :, None]
    elif layout == "tokens":
        student, teacher, target = student[:, None], teacher[:, None], target[:, None]
    elif layout == "strided":
        student, teacher = (x.repeat_interleave(2, 1)[:, ::2] for x in (student, teacher))
    elif layout == "long":
        student, teacher, target = make("gaussian", 3, 5000, device=case.device)
    else:
        student = student.to(torch.float16 if layout == "half" else torch.bfloat16)
    _check(case, student, teacher, 2e-5, target=target, **options)


@each(
    [spec for spec in SOFTMAX_ROWS if "standardize" in inspect.signature(spec.function).parameters]
)
def test_the_logits_of_the_cross_entropy_are_not_standardised(case: Case) -> None:
    student, teacher, target = _inputs(case)
    _check(case, student, teacher, 1e-11, target=target, standardize=True)


@each(SOFTMAX_ROWS)
def test_a_certain_student_keeps_its_digits(case: Case) -> None:
    """1 - probability would be 0 in float32; the loss and its gradient are exp(-60) here."""
    student = torch.zeros(2, 5, device=case.device)
    student[:, 1] = 60.0
    target = torch.tensor([1, 1], device=case.device)
    leaf = student.requires_grad_()
    # Of equal logits the divergence is 0.
    loss, gradient = _loss_and_grad(
        case(leaf, leaf.detach().clone(), target=target, hard_weight=1.0, loss_weight=0.0), leaf
    )
    small = torch.tensor(-60.0, dtype=torch.float64).exp().item()
    assert loss.item() == pytest.approx(4 * small, rel=1e-5, abs=0)
    rest = [-4 * small if i == 1 else small for i in range(5)]
    assert gradient.double().sum(0).tolist() == pytest.approx(rest, rel=1e-5, abs=0)


@each(SOFTMAX_ROWS)
def test_impossible_labels_and_dead_rows(case: Case) -> None:
    """A label of probability 0 costs infinitely, with a finite gradient; NaN stays in its row."""
    student, teacher, target = make("gaussian", 4, 9, dtype=torch.float64, device=case.device)
    student[0, target[0]] = teacher[0, target[0]] = -torch.inf
    student[1, 3] = torch.nan
    student[2, target[2]] = torch.inf
    leaf = student.requires_grad_()
    loss, gradient = _loss_and_grad(
        case(leaf, teacher, target=target, hard_weight=1.0, loss_weight=0.0, reduction="none"), leaf
    )
    assert loss[0].isposinf() and loss[1:3].isnan().all() and loss[3].isfinite()
    if case.spec.family != "decoupled":  # there the loss itself has no digits at such a target
        expected = student.detach()[0].softmax(-1) - F.one_hot(target[0], 9)
        weights = row_weights(loss)
        torch.testing.assert_close(gradient[0], expected * weights[0])
    assert gradient[1:3].isnan().any(-1).all() and gradient[3].isfinite().all()


@each(SOFTMAX_ROWS)
def test_weights_and_counts_that_are_tensors(case: Case) -> None:
    student, teacher, target = _inputs(case)
    weight = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    leaf = student.requires_grad_()
    options: dict[str, Any] = {"target": target, "num_items_in_batch": torch.tensor(4)}
    loss = case(leaf, teacher, loss_weight=weight, hard_weight=WEIGHT, **options)
    by_logits, by_weight = torch.autograd.grad(loss, (leaf, weight))
    numbers = options | {"num_items_in_batch": 4.0}
    expected = case(leaf, teacher, loss_weight=0.3, hard_weight=WEIGHT, **numbers)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(by_logits, torch.autograd.grad(expected, leaf)[0])
    torch.testing.assert_close(by_weight, case(leaf, teacher, **numbers).detach())
    # A constant is folded into the weights of the rows, so that one gradient is rounded.
    options["token_weight"] = torch.linspace(0.5, 2, 7).to(student)
    constant = case(leaf, teacher, loss_weight=weight.detach(), hard_weight=WEIGHT, **options)
    number = case(leaf, teacher, loss_weight=0.3, hard_weight=WEIGHT, **options)
    slopes = [torch.autograd.grad(x, leaf)[0] for x in (constant, number)]
    torch.testing.assert_close(constant, number)
    torch.testing.assert_close(*slopes)


@each(
    SOFTMAX_ROWS,
    reduction=("mean", "sum", "none"),
    temperature=(1.0, 2.5),
    shared=("reduction", "temperature"),
)
def test_parts(case: Case, reduction: str, temperature: float) -> None:
    """Distillation and cross-entropy add up to the loss; the entropy is the softened student's."""
    student, teacher, target = _inputs(case)
    student[0, 4] = teacher[0, 4] = -torch.inf
    target[0] = 1
    options = {"target": target, "reduction": reduction, **at_temperature(case.spec, temperature)}
    leaf = student.requires_grad_()
    loss, parts = case(leaf, teacher, hard_weight=WEIGHT, return_parts=True, **options)
    soft = case(leaf, teacher, **options)
    both = case(leaf, teacher, hard_weight=WEIGHT, **options)
    assert torch.equal(loss, both)
    assert torch.equal(
        torch.autograd.grad(loss.sum(), leaf)[0], torch.autograd.grad(both.sum(), leaf)[0]
    )
    torch.testing.assert_close(parts.distillation, soft.detach(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(parts.hard, (both - soft).detach(), rtol=1e-9, atol=1e-12)
    q = (student.detach() / temperature).softmax(-1)
    entropy = -torch.where(q == 0, 0.0, q * q.log()).sum(-1)
    entropy[target == -100] = 0.0
    torch.testing.assert_close(parts.entropy, entropy, rtol=1e-12, atol=1e-14)
    assert not any(part.requires_grad for part in parts)
    with torch.no_grad():
        loss, again = case(student, teacher, return_parts=True, **options)
    torch.testing.assert_close(loss, soft.detach(), rtol=1e-14, atol=0)
    torch.testing.assert_close(again.entropy, parts.entropy, rtol=1e-14, atol=0)
    assert not again.hard.any()


@each(SOFTMAX_ROWS)
def test_parts_of_weights_and_counts(case: Case) -> None:
    student, teacher, target = _inputs(case)
    options: dict[str, Any] = {"target": target, "hard_weight": WEIGHT, "return_parts": True}
    _, whole = case(student, teacher, **options)
    options |= {"loss_weight": torch.tensor(3.0), "num_items_in_batch": torch.tensor(10)}
    loss, parts = case(student, teacher, **options)
    torch.testing.assert_close(parts.distillation, whole.distillation * 3 * 5 / 10)
    torch.testing.assert_close(parts.hard, whole.hard * 5 / 10)
    torch.testing.assert_close(parts.entropy, whole.entropy)
    torch.testing.assert_close(loss, parts.distillation + parts.hard)


@row_losses
def test_in_modules(spec: LossSpec) -> None:
    student, teacher, target = _inputs(Case(spec, "reference", "cpu"))
    expected = call(spec, student, teacher, target=target, hard_weight=0.5, return_parts=True)
    module = spec.module(hard_weight=0.5, return_parts=True)
    given = module(student, teacher, target)
    torch.testing.assert_close(given, expected)
    assert "hard_weight=0.5" in repr(module)


@row_losses
@pytest.mark.parametrize("backend", ("native", "reference"))
def test_it_needs_class_indices(spec: LossSpec, backend: str) -> None:
    case = Case(spec, backend, "cpu")
    student, teacher, target = _inputs(case)
    name = spec.target_name
    with pytest.raises(TypeError, match=rf"^{name} must be a Tensor of class indices, got None$"):
        case(student, teacher, hard_weight=1.0)
    with pytest.raises(TypeError, match=rf"^{name} must be integer class indices, got torch.bool$"):
        case(student, teacher, target=target != -100, hard_weight=1.0)
    for bad in (19, -1):
        target[0] = bad
        with pytest.raises(ValueError, match=rf"^class indices must be in \[0, 19\).* got {bad}$"):
            case(student, teacher, target=target, hard_weight=1.0)
    for bad, text in ((float("nan"), "finite, got nan"), ("1", "a number, got str")):
        with pytest.raises((ValueError, TypeError), match=f"^hard_weight must be {text}$"):
            case(student, teacher, target=target, hard_weight=bad)
    with pytest.raises(TypeError, match=r"^return_parts must be a bool, got int$"):
        case(student, teacher, target=target.clamp(0, 5), return_parts=1)


def test_weights_of_directions_by_token() -> None:
    """Mixed KL with a weight a token is two evaluations; the cross-entropy is in it once."""
    student, teacher, target = _inputs(Case(SPECS["kd"], "native", "cpu"))
    weight = torch.linspace(0, 1, 7, dtype=torch.float64)
    options: dict[str, Any] = {"labels": target, "forward_weight": weight, "token_weight": weight}
    plain = mixed_kl_loss(student, teacher, **options)
    loss, parts = mixed_kl_loss(student, teacher, hard_weight=0.5, return_parts=True, **options)
    hard = 0.5 * (F.cross_entropy(student, target, reduction="none") * weight).sum() / 5
    torch.testing.assert_close(loss, plain + hard)
    torch.testing.assert_close(parts.hard, hard)
    torch.testing.assert_close(parts.distillation, plain)


@pytest.mark.parametrize("name", ("kd", "dkd", "jsd"))
def test_under_a_compiler_in_one_graph(name: str) -> None:
    """Weights that change compile twice, and parts are outputs of the same graph."""
    spec = SPECS[name]
    student, teacher, target = _inputs(Case(spec, "native", "cpu"))
    counter = CompileCounter()

    def step(s: Tensor, weight: float) -> Any:
        return call(spec, s, teacher, target=target, hard_weight=weight, return_parts=True)

    compiled = torch.compile(step, backend=counter, fullgraph=True)
    for weight in (0.5, 0.25, 0.125, 2.0, 3.0):
        leaf = student.clone().requires_grad_()
        loss, parts = compiled(leaf, weight)
        expected, others = step(leaf, weight)
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(tuple(parts), tuple(others), rtol=1e-12, atol=1e-15)
        slopes = [torch.autograd.grad(x, leaf)[0] for x in (loss, expected)]
        torch.testing.assert_close(*slopes, rtol=1e-12, atol=1e-15)
    assert counter.frame_count <= 2


def test_float16_gradients_do_not_underflow() -> None:
    """A loss scale multiplies the cross-entropy's part too before it is rounded."""
    student, teacher, target = make("gaussian", 64, 100)
    half = student.half().requires_grad_()
    wide = half.detach().double().requires_grad_()
    (kd_loss(half, teacher, target=target, hard_weight=1.0) * 2.0**14).backward()
    (kd_loss(wide, teacher, target=target, hard_weight=1.0) * 2.0**14).backward()
    torch.testing.assert_close(half.grad.double(), wide.grad, rtol=1e-3, atol=1e-4)


@row_losses
def test_compiled_cuda_kernels_leave_it_to_others(spec: LossSpec) -> None:
    """Where they would be chosen; asked for by name they raise, as nothing falls back."""
    other = torch.empty(0, device="meta")  # no CPU tensor, and Triton does not run it
    assert _dispatch.beside_cuda(spec, other, None) == "reference"
    with pytest.raises(ValueError, match=r"got 'native': compiled CUDA kernels give neither"):
        _dispatch.beside_cuda(spec, other, "native")


def test_a_learned_temperature_is_a_parameter_of_its_module() -> None:
    """CTKD: an optimiser finds it, and it moves against its gradient."""
    # In float64: near the best temperature a step gains less than float32 shows.
    student, teacher = torch.randn(2, 16, 10, dtype=torch.float64)
    heat = torch.nn.Parameter(torch.tensor(4.0, dtype=torch.float64))
    module = SPECS["kd"].module(temperature=heat)
    (parameter,) = module.parameters()
    before = module(student, teacher)
    before.backward()
    with torch.no_grad():
        parameter -= 0.1 * parameter.grad
    assert module(student, teacher) < before

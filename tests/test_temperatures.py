"""Temperatures that are tensors: constants of any row loss, learned ones of KD (CTKD)."""

from __future__ import annotations

from inspect import signature
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import ROW_LOSSES, Case, call, each_emulated as each, value_and_grad
from inputs import make
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from kdkernels.functional import kd_loss
from kdkernels.registry import SPECS, LossSpec

row_losses = pytest.mark.parametrize("spec", ROW_LOSSES, ids=lambda spec: spec.name)


def _inputs(case: Case, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    student, teacher, target = make("gaussian", 7, 19, dtype=dtype, device=case.device)
    target = target.clamp(min=1)
    target[2] = target[5] = -100
    return student, teacher, target


@row_losses
def test_the_annotation_says_so(spec: LossSpec) -> None:
    """A type checker refuses no call that runs."""
    (annotation,) = (p.annotation for n, p in signature(spec.function).parameters.items()
                     if n == "temperature")  # fmt: skip
    assert annotation == "float | Tensor"
    assert signature(spec.module).parameters["temperature"].annotation == annotation


def _heats(like: Tensor) -> Tensor:
    """Of an ignored row the temperature is not used."""
    return torch.tensor([1.0, 2.5, 0.0, 4.0, 0.5, float("nan"), 8.0]).to(like)


@each(
    ROW_LOSSES,
    layout=("rows", "dense", "half", "float32"),
    reduction=("mean", "none"),
    shared=("layout",),
)
def test_each_row_has_its_own(case: Case, layout: str, reduction: str) -> None:
    """As if the rows had been given one by one; T^2 of each is in it where T^2 is."""
    dtype = {"half": torch.float16, "float32": torch.float32}.get(layout, torch.float64)
    student, teacher, target = _inputs(case, dtype)
    heats = _heats(student).nan_to_num(1.0)
    heats[2] = 3.0
    weight = torch.linspace(0.5, 2, 7, device=case.device)
    rows = []
    for i in range(7):
        given = (x[i : i + 1].double() for x in (student, teacher))
        one = {"target": target[i : i + 1], "temperature": float(heats[i])}
        loss, slope = value_and_grad(case.spec.function, *given, **_named(case.spec, one))
        rows.append((loss * weight[i], slope * weight[i]))
    values, slopes = (torch.stack(x) for x in zip(*rows, strict=True))
    slopes = slopes[:, 0]
    options = {"target": target, "temperature": heats, "token_weight": weight}
    if layout == "dense":
        student, teacher = (x.t().contiguous()[None, :, :, None] for x in (student, teacher))
        options = {k: x[None, :, None] for k, x in options.items()}
    upstream = torch.ones_like(options["target"], dtype=torch.float64)
    upstream = upstream if reduction == "none" else None
    ours = value_and_grad(case, student, teacher, upstream=upstream, reduction=reduction, **options)
    close = 1e-12 if dtype == torch.float64 else 2e-5
    expected = values if reduction == "none" else values.sum() / 5
    slopes = slopes if reduction == "none" else slopes / 5
    torch.testing.assert_close(
        ours[0].flatten().double(), expected.flatten(), rtol=close, atol=close
    )
    gradient = ours[1][0, :, :, 0].t() if layout == "dense" else ours[1]
    close = 1e-3 if dtype == torch.float16 else close
    torch.testing.assert_close(gradient.double(), slopes, rtol=close, atol=close)


def _named(spec: LossSpec, options: dict[str, Any]) -> dict[str, Any]:
    return {(spec.target_name if k == "target" else k): v for k, v in options.items()}


@each(ROW_LOSSES)
def test_one_for_all_rows(case: Case) -> None:
    """A 0-d tensor is that number: of the CPU, and of the device, which nothing reads."""
    student, teacher, target = _inputs(case)
    expected = value_and_grad(case, student, teacher, target=target, temperature=2.5)
    for heat in (torch.tensor(2.5), torch.tensor(2.5, dtype=torch.float64, device=case.device)):
        actual = value_and_grad(case, student, teacher, target=target, temperature=heat)
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("backend", ("native", "reference"))
@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
@pytest.mark.parametrize("standardize", (False, True))
@pytest.mark.parametrize("by_row", (False, True))
def test_a_learned_one_has_its_gradient(
    backend: str, reduction: str, standardize: bool, by_row: bool
) -> None:
    """Against autograd through the eager loss; the student's gradient stays."""
    student, teacher, target = _inputs(Case(SPECS["kd"], backend, "cpu"))
    teacher[0, 3] = -9.0 if standardize else -900.0  # p = 0
    heats = torch.linspace(0.5, 4, 7, dtype=torch.float64) if by_row else torch.tensor(3.0)
    heats = heats.double().requires_grad_()
    weight = torch.linspace(0.5, 2, 7, dtype=torch.float64)
    leaf = student.requires_grad_()
    options: dict[str, Any] = {"token_weight": weight, "reduction": reduction, "backend": backend}
    ours = kd_loss(
        leaf, teacher, heats, labels=target, hard_weight=0.5, loss_weight=torch.tensor(0.25),
        standardize=standardize, **options,
    )  # fmt: skip

    def scaled(x: Tensor) -> Tensor:
        if standardize:
            x = (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-7)
        return (x / heats.reshape(-1, 1)).log_softmax(-1)

    log_p, log_q = scaled(teacher), scaled(leaf)
    p = log_p.exp()
    terms = p * (torch.where(p == 0, 0.0, log_p) - log_q)
    values = 0.25 * torch.where(p == 0, 0.0, terms).sum(-1) * heats * heats
    values = values + 0.5 * F.cross_entropy(leaf, target, reduction="none")
    values = torch.where(target == -100, 0.0, values * weight)
    expected = {"mean": values.sum() / 5, "sum": values.sum(), "none": values}[reduction]
    upstream = torch.rand(expected.shape, dtype=torch.float64) + 0.5
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(
        torch.autograd.grad(ours, (heats, leaf), upstream),
        torch.autograd.grad(expected, (heats, leaf), upstream),
    )


def test_only_the_temperature_learns() -> None:
    """CTKD's temperature module alone, on float32 rows, and the loss differentiated twice."""
    student, teacher = torch.randn(2, 5, 11)
    heat = torch.tensor(4.0, requires_grad=True)
    (slope,) = torch.autograd.grad(kd_loss(student, teacher, heat), heat, create_graph=True)
    low, high = (kd_loss(student.double(), teacher.double(), 4.0 + x) for x in (-1e-4, 1e-4))
    assert slope.item() == pytest.approx(((high - low) / 2e-4).item(), rel=1e-3)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        slope.backward()


@row_losses
def test_a_temperature_that_a_loss_cannot_learn(spec: LossSpec) -> None:
    student, teacher, target = _inputs(Case(spec, "native", "cpu"))
    heat = torch.tensor(2.0, requires_grad=True)
    if spec.by_temperature is None:
        with pytest.raises(ValueError, match=rf"^temperature must be a constant \({spec.name} has"):
            call(spec, student, teacher, target=target, temperature=heat)
    with torch.no_grad():
        call(spec, student, teacher, target=target, temperature=heat)

    def of(value: Tensor) -> Tensor:
        return call(spec, student, teacher, target=target, temperature=value)

    with pytest.raises(ValueError, match=r"^temperature must be a constant under torch.func"):
        torch.func.grad(of)(torch.tensor(2.0))
    with pytest.raises(ValueError, match=r"^temperature must be a constant under torch.func"):
        torch.func.jvp(of, (torch.tensor(2.0),), (torch.tensor(1.0),))


@row_losses
@pytest.mark.parametrize(
    ("bad", "text"),
    [
        (torch.ones(6), r"of shape \(7,\), got \(6,\)"),
        (torch.ones(7, dtype=torch.int64), "float64, float32, .* got torch.int64"),
        (torch.zeros(7), r"in \[1e-06, 1e\+06\], got 0.0"),
        (torch.full((7,), float("nan")), r"in \[1e-06, 1e\+06\], got nan"),
        (torch.tensor(-1.0), "> 0, got -1.0"),
        (torch.ones((), device="meta"), "on the student's device cpu, got meta"),
    ],
)
def test_bad_values(spec: LossSpec, bad: Tensor, text: str) -> None:
    student, teacher, target = _inputs(Case(spec, "native", "cpu"))
    with pytest.raises((ValueError, TypeError), match=f"^temperature must be {text}$"):
        call(spec, student, teacher, target=target, temperature=bad)


@pytest.mark.parametrize("kind", ("number", "0-d", "rows"))
def test_a_schedule_of_fifty_compiles_twice_at_most(kind: str) -> None:
    student, teacher, target = _inputs(Case(SPECS["kd"], "native", "cpu"))
    counter = CompileCounter()
    compiled = torch.compile(kd_loss, backend=counter, fullgraph=True)
    for i in range(50):
        value = 1.0 + i / 10
        heat: Any = value if kind == "number" else torch.tensor(value, dtype=torch.float64)
        heat = heat.expand(7).contiguous() if kind == "rows" else heat
        loss = compiled(student, teacher, heat, target=target)
        expected = kd_loss(student, teacher, value, target=target)
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("kind", (torch.uint8, torch.int32))
@pytest.mark.parametrize("ignored", (None, -100))
def test_a_learned_one_beside_narrow_labels(kind: torch.dtype, ignored: int | None) -> None:
    """Which hold neither every class nor what is ignored."""
    student, teacher, _ = make("gaussian", 4, 200)
    labels = torch.tensor([0, 156, 3, 156])
    heat = torch.tensor(2.0, requires_grad=True)
    options: dict[str, Any] = {"ignore_index": ignored, "hard_weight": 0.5}
    given = [
        torch.autograd.grad(kd_loss(student, teacher, heat, labels=y, **options), heat)
        for y in (labels, labels.to(kind))
    ]
    torch.testing.assert_close(given[1], given[0])


def test_a_learned_one_under_a_compiler() -> None:
    student, teacher, target = _inputs(Case(SPECS["kd"], "native", "cpu"))
    compiled = torch.compile(kd_loss, backend="aot_eager", fullgraph=True)
    heat = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    leaf = student.requires_grad_()
    losses = [f(leaf, teacher, heat, target=target) for f in (compiled, kd_loss)]
    slopes = [torch.autograd.grad(loss, (heat, leaf)) for loss in losses]
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(slopes[0], slopes[1])

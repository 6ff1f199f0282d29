"""``teacher_grad=True`` among infinite rows, compilers, transforms, ranks and other keywords."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import LOSS_IDS, LOSSES, Case
from plain_losses import gradients, kl, pair
from ranks import needs_processes, run_on_ranks

from kdkernels import functional
from kdkernels.registry import SPECS, LossSpec
from kdkernels.teacher import EnsembleTeacher

losses = pytest.mark.parametrize("spec", LOSSES, ids=LOSS_IDS)
ON = {"teacher_grad": True}


def test_an_infinite_row_leaves_the_others() -> None:
    """KL is infinite where the student excludes a class; the value off again would be NaN."""
    student, teacher, _ = pair()
    with torch.no_grad():
        student[2, 3] = -torch.inf
    for backend in ("native", "reference"):
        case = Case(SPECS["kd"], backend, "cpu")
        loss = case(student, teacher, **ON)
        assert loss.item() == torch.inf
        given = gradients(loss, student, teacher)
        rows = torch.tensor([0, 1, 3, 4, 5])
        rest = gradients(case(student[rows], teacher[rows], reduction="sum", **ON) / 6,
                          student, teacher)  # fmt: skip
        for actual, wanted in zip(given, rest, strict=True):
            torch.testing.assert_close(actual[rows], wanted[rows])
        assert given[0].isfinite().all() and not given[1][2].isfinite().all()


@losses
@pytest.mark.parametrize("backend", [None, "reference"])
def test_second_derivatives_are_right_or_refused(spec: LossSpec, backend: str | None) -> None:
    """Mixed ones too, of which a gradient with the other side held constant has none."""
    student, teacher, target = pair(3, 5)
    options: dict[str, Any] = {spec.target_name: target} if spec.needs_target else {}
    options |= {spec.constant_weight: 0.0} if spec.constant_weight else {}
    loss = lambda s, t: spec.function(s, t, backend=backend, **options, **ON)  # noqa: E731
    for which in range(2):
        gradient = torch.autograd.grad(loss(student, teacher), (student, teacher),
                                       create_graph=True)[which]  # fmt: skip
        if backend is None:
            with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
                gradient.square().sum().backward()
    if backend == "reference":
        assert torch.autograd.gradgradcheck(loss, (student, teacher))


@losses
def test_transforms_see_both(spec: LossSpec) -> None:
    """``torch.func`` takes the reference, as ever."""
    student, teacher, target = pair()
    index = {spec.target_name: target} if spec.needs_target else {}
    loss = lambda s, t: spec.function(s, t, **index, **ON)  # noqa: E731
    expected = gradients(loss(student, teacher), student, teacher)
    held = student.detach(), teacher.detach()
    for actual, wanted in zip(torch.func.grad(loss, (0, 1))(*held), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-8, atol=1e-11)
    tangents = torch.randn_like(held[0]), torch.randn_like(held[1])
    _, along = torch.func.jvp(loss, held, tangents)
    slope = sum((g * v).sum() for g, v in zip(expected, tangents, strict=True))
    torch.testing.assert_close(along, slope, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("name", ["kd", "jsd", "mixed_kl", "dist", "dkd", "aekt", "acceptance"])
def test_under_a_compiler_in_one_graph(name: str) -> None:
    spec = SPECS[name]
    student, teacher, target = pair()
    index = {spec.target_name: target} if spec.needs_target else {}
    module = spec.module(**ON)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    eager, loss = (f(student, teacher, **index) for f in (module, compiled))
    torch.testing.assert_close(loss, eager)
    pairs = zip(gradients(loss, student, teacher), gradients(eager, student, teacher), strict=True)
    for actual, wanted in pairs:
        torch.testing.assert_close(actual, wanted, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("name", ["tv", "alpha_beta"])
def test_a_loss_that_names_no_exchanged_roles_takes_the_reference(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that is added later may: the teacher's gradient is autograd's, once."""
    student, teacher, _ = pair()
    case = Case(SPECS[name], "native", "cpu")
    expected = gradients(case(student, teacher, **ON), student, teacher)
    monkeypatch.setitem(SPECS[name].__dict__, "exchanged", lambda *options: None)
    given = torch.autograd.grad(case(student, teacher, **ON), (student, teacher), create_graph=True)
    for actual, wanted in zip(given, expected, strict=True):
        torch.testing.assert_close(actual.detach(), wanted, rtol=1e-9, atol=1e-12)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        given[1].square().sum().backward()


def test_a_learned_temperature_beside_it() -> None:
    student, teacher, _ = pair()
    heat = torch.tensor(2.5, dtype=torch.float64, requires_grad=True)
    loss = functional.kd_loss(student, teacher, heat, **ON)
    q, p = (student / heat).softmax(-1), (teacher / heat).softmax(-1)
    expected = heat**2 * kl(p, q).mean()
    leaves = student, teacher, heat
    pairs = zip(gradients(loss, *leaves), gradients(expected, *leaves), strict=True)
    for actual, wanted in pairs:
        torch.testing.assert_close(actual, wanted)


def test_weights_of_tokens_in_both_directions() -> None:
    student, teacher, _ = pair()
    weight = torch.linspace(0, 1, 6, dtype=torch.float64)
    loss = functional.mixed_kl_loss(student, teacher, forward_weight=weight, **ON)
    p, q = teacher.softmax(-1), student.softmax(-1)
    expected = (weight * kl(p, q) + (1 - weight) * kl(q, p)).mean()
    pairs = zip(gradients(loss, student, teacher), gradients(expected, student, teacher),
                strict=True)  # fmt: skip
    for actual, wanted in pairs:
        torch.testing.assert_close(actual, wanted)


@losses
def test_what_has_no_meaning_raises(spec: LossSpec) -> None:
    student, teacher, target = pair()
    index = {spec.target_name: target} if spec.needs_target else {}
    with pytest.raises(ValueError, match=r"^teacher_logits must be a constant .*teacher_grad=True"):
        spec.function(student, teacher, **index)
    for several in ([teacher, teacher], EnsembleTeacher([teacher], [1.0])):
        with pytest.raises(ValueError, match=r"^teacher_grad must be False where there"):
            spec.function(student, several, **index, **ON)
    for wrong in (1, None, "yes", torch.tensor(True)):
        with pytest.raises(TypeError, match=r"^teacher_grad must be a bool, got"):
            spec.function(student, teacher, **index, teacher_grad=wrong)
        with pytest.raises(TypeError, match=r"^teacher_grad must be a bool, got"):
            spec.module(teacher_grad=wrong)


@pytest.mark.parametrize("spec", [s for s in SPECS.values() if s not in LOSSES], ids=LOSS_IDS)
def test_no_other_loss_takes_it(spec: LossSpec) -> None:
    assert "teacher_grad" not in inspect.signature(spec.function).parameters
    with pytest.raises(TypeError, match="teacher_grad"):
        spec.module(**ON)


def _check_group(spec: LossSpec) -> None:
    """Each rank's gradients are W times those by its rows, of the teacher's too."""
    world, rank, group = dist.get_world_size(), dist.get_rank(), dist.group.WORLD
    student, teacher, target = pair(7, 5)
    target[4] = -100
    whole = {spec.target_name: target}
    expected = gradients(
        spec.function(student, teacher, **whole, **ON, backend="reference"), student, teacher
    )
    own = slice(0, 3) if rank == 0 else slice(3, 7)
    s, t = (x.detach()[own].clone().requires_grad_() for x in (student, teacher))
    options = {spec.target_name: target[own], **ON}
    loss = spec.function(s, t, **options, process_group=group)
    for actual, wanted in zip(gradients(loss, s, t), expected, strict=True):
        torch.testing.assert_close(actual, world * wanted[own], rtol=1e-9, atol=1e-12)
    if spec.family == "decoupled":  # the others' is tested in test_sharded_classes.py
        said = rf"^teacher_grad must be False of {spec.name} where tp_group is given, got True"
        with pytest.raises(ValueError, match=said):
            spec.function(s, t, **options, tp_group=group)


def _check_sharded(spec: LossSpec) -> None:
    """DTensors: rows that are sharded, or classes."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = dist.init_device_mesh("cpu", (2,))
    student, teacher, target = pair(7, 5)
    whole = {spec.target_name: target} if spec.needs_target else {}
    expected = gradients(spec.function(student, teacher, **whole, **ON), student, teacher)
    for dim in (0, 1):
        s, t = (
            distribute_tensor(x.detach(), mesh, [Shard(dim)]).requires_grad_()
            for x in (student, teacher)
        )
        of_rows = [Shard(0) if dim == 0 else Replicate()]
        placed = {k: distribute_tensor(x, mesh, of_rows) for k, x in whole.items()}
        loss: Any = spec.function(s, t, **placed, **ON)
        loss.backward()
        for leaf, wanted in zip((s, t), expected, strict=True):
            given: Any = leaf.grad
            torch.testing.assert_close(given.full_tensor(), wanted, rtol=1e-9, atol=1e-12)


def _on_ranks() -> Iterator[tuple[str, Callable[[], None]]]:
    for name in ("kd", "dkd", "jsd", "dist"):
        yield f"{name}, a group", lambda name=name: _check_group(SPECS[name])
        yield f"{name}, DTensors", lambda name=name: _check_sharded(SPECS[name])


@needs_processes
def test_on_two_ranks() -> None:
    run_on_ranks(2, _on_ranks)

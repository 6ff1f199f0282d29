"""``teacher_grad=True``: the gradient by the teacher, beside that by the student.

It must equal autograd's in float64 of the losses written plainly, which live here; of a loss whose
roles are exchanged, the student's; and finite differences.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import LOSS_IDS, LOSSES, ROW_LOSSES, Case, each, each_sample, row_weights, same_bits
from inputs import FAMILIES, make
from ranks import needs_processes, run_on_ranks
from torch import Tensor

from kdkernels import functional
from kdkernels.registry import SPECS, LossSpec
from kdkernels.teacher import EnsembleTeacher

losses = pytest.mark.parametrize("spec", LOSSES, ids=LOSS_IDS)
ON = {"teacher_grad": True}


# The losses of (rows, classes), one value a row or, of DIST, one for all.


def _kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum(-1)


def _decoupled(p: Tensor, q: Tensor, y: Tensor, alpha: float, beta: float, weight: Any) -> Tensor:
    def parts(x: Tensor) -> tuple[Tensor, Tensor]:
        target = x.gather(1, y[:, None])
        kept = torch.ones_like(x).scatter(1, y[:, None], 0.0)
        others = x * kept / (1 - target)
        return torch.cat([target, 1 - target], 1), others + (1 - kept)

    (pair_p, others_p), (pair_q, others_q) = parts(p), parts(q)
    factor = weight((pair_p / pair_q)[:, 0].detach())
    return alpha * factor * _kl(pair_p, pair_q) + beta * _kl(others_p, others_q)


def _correlation(a: Tensor, b: Tensor, dim: int, eps: float) -> Tensor:
    a, b = (x - x.mean(dim, keepdim=True) for x in (a, b))
    return (a * b).sum(dim) / (a.norm(dim=dim) * b.norm(dim=dim) + eps)


def _dist(p: Tensor, q: Tensor, y: Tensor, o: dict[str, Any]) -> Tensor:
    inter, intra = (1 - _correlation(p, q, dim, o["eps"]).mean() for dim in (1, 0))
    return o["tau"] ** 2 * (o["beta"] * inter + o["gamma"] * intra)


def _jsd(p: Tensor, q: Tensor, y: Tensor, o: dict[str, Any]) -> Tensor:
    beta = o["beta"]
    if beta in (0.0, 1.0):
        return _kl(q, p) if beta else _kl(p, q)
    m = beta * p + (1 - beta) * q
    return beta * _kl(p, m) + (1 - beta) * _kl(q, m)


def _alpha_beta(p: Tensor, q: Tensor, y: Tensor, o: dict[str, Any]) -> Tensor:
    a, b = o["alpha"], o["beta"]
    s = a + b
    return (a / s * p**s + b / s * q**s - p**a * q**b).sum(-1) / (a * b)


def _acceptance(p: Tensor, q: Tensor, y: Tensor, o: dict[str, Any]) -> Tensor:
    rate = torch.minimum(p, q).sum(-1)
    if o["kind"] == "log":
        return -rate.log()
    weight = torch.exp(-o["eta"] * rate).detach()
    return weight * _kl(p, q) + (1 - weight) * (1 - rate)


PLAIN: dict[str, Callable[[Tensor, Tensor, Tensor, dict[str, Any]], Tensor]] = {
    "kd": lambda p, q, y, o: _kl(p, q),
    "reverse_kl": lambda p, q, y, o: _kl(q, p),
    "tv": lambda p, q, y, o: (p - q).abs().sum(-1) / 2,
    "dist": _dist,
    "jsd": _jsd,
    "alpha_beta": _alpha_beta,
    "acceptance": _acceptance,
    "dkd": lambda p, q, y, o: _decoupled(p, q, y, o["alpha"], o["beta"], torch.ones_like),
    "aekt": lambda p, q, y, o: _decoupled(
        p, q, y, o["alpha"], o["beta"], lambda w: w.clamp(max=o["ratio_max"]) ** o["kappa"]
    ),
    "mixed_kl": lambda p, q, y, o: (
        o["forward_weight"] * _kl(p, q) + (1 - o["forward_weight"]) * _kl(q, p)
    ),
    "skew_kl": lambda p, q, y, o: _kl(p, o["alpha"] * p + (1 - o["alpha"]) * q),
    "skew_reverse_kl": lambda p, q, y, o: _kl(q, (1 - o["alpha"]) * p + o["alpha"] * q),
}


def _plain(
    spec: LossSpec, student: Tensor, teacher: Tensor, target: Tensor, options: dict[str, Any]
) -> Tensor:
    """The loss of rows all of which count, before reduction, in float64."""
    parameters = inspect.signature(spec.function).parameters
    o = {n: p.default for n, p in parameters.items() if p.default is not p.empty} | options
    heat = o.get("temperature", o.get("tau"))
    s, t = student.double(), teacher.double()
    if o.get("standardize"):
        s, t = ((x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-7) for x in (s, t))
    q, p = (s / heat).softmax(-1), (t / heat).softmax(-1)
    square = heat**2 if spec.by_row and spec.t_squared else 1.0
    return square * o["loss_weight"] * PLAIN[spec.name](p, q, target, o)


def _gradients(loss: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss.sum(), leaves)


def _pair(
    rows: int = 6, classes: int = 11, dtype: torch.dtype = torch.float64, **how: Any
) -> tuple[Tensor, Tensor, Tensor]:
    student, teacher, target = make("gaussian", rows, classes, dtype=dtype, **how)
    return (student / 3).requires_grad_(), (teacher / 3).requires_grad_(), target


@each_sample(dtype=(torch.float64, torch.float32))
def test_both_gradients_are_those_of_the_plain_formula(
    case: Case, options: dict[str, Any], dtype: torch.dtype
) -> None:
    """And value and student's gradient those of a constant teacher, to the bit."""
    student, teacher, target = _pair(dtype=dtype, device=case.device)
    loss = case(student, teacher, target, **options, **ON)
    own, given = _gradients(loss, student, teacher)
    alone = case(student, teacher.detach(), target, **options)
    assert same_bits(loss.detach(), alone.detach())
    assert same_bits(own, *_gradients(alone, student))
    values = _plain(case.spec, student, teacher, target, options)
    expected = _gradients(values.mean(), student, teacher)
    close = (
        {"rtol": 1e-9, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 2e-6}
    )
    torch.testing.assert_close(loss.detach().double(), values.mean().detach(), **close)
    for actual, wanted in zip((own, given), expected, strict=True):
        assert actual.dtype == dtype and actual.any()
        torch.testing.assert_close(actual, wanted, **close)


ROLES: list[tuple[str, dict[str, Any], str, dict[str, Any]]] = [
    ("kd", {"temperature": 2.0}, "reverse_kl", {"temperature": 2.0, "loss_weight": 4.0}),
    ("reverse_kl", {}, "kd", {"temperature": 1.0}),
    ("tv", {}, "tv", {}),
    ("dist", {"tau": 2.0, "gamma": 0.5}, "dist", {"tau": 2.0, "gamma": 0.5}),
    ("jsd", {"beta": 0.125}, "jsd", {"beta": 0.875}),
    ("mixed_kl", {"forward_weight": 0.25}, "mixed_kl", {"forward_weight": 0.75}),
    ("mixed_kl", {"forward_weight": 0.0}, "kd", {"temperature": 1.0}),
    ("skew_kl", {"alpha": 0.25}, "skew_reverse_kl", {"alpha": 0.25}),
    ("skew_reverse_kl", {"alpha": 0.25}, "skew_kl", {"alpha": 0.25}),
    ("alpha_beta", {"alpha": 0.25, "beta": 0.5}, "alpha_beta", {"alpha": 0.5, "beta": 0.25}),
    ("acceptance", {}, "acceptance", {}),
]


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize(
    ("name", "options", "other", "exchanged"), ROLES, ids=lambda x: x if isinstance(x, str) else ""
)
def test_roles_exchanged_give_the_teachers_gradient(
    name: str, options: dict[str, Any], other: str, exchanged: dict[str, Any], backend: str
) -> None:
    student, teacher, _ = _pair(dtype=torch.float32)
    one, two = (Case(SPECS[x], backend, "cpu") for x in (name, other))
    _, given = _gradients(one(student, teacher, **options, **ON), student, teacher)
    (expected,) = _gradients(two(teacher, student.detach(), **exchanged), teacher)
    if backend == "native":
        assert same_bits(given, expected)
    torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-6)


HARD = ("peaked", "disagreeing", "nearly_equal", "close", "offset", "gap", "ties", "constant_rows")


@each(ROW_LOSSES, family=HARD, keep=lambda case, family: not case.interpreted)
def test_hard_inputs_in_float32(case: Case, family: str) -> None:
    """The reference in float64 is the judge, but where jumps or bounds depend on the dtype."""
    student, teacher, target = make(family, 5, 12, dtype=torch.float32, device=case.device)
    student.requires_grad_()
    teacher.requires_grad_()
    options = {"reduction": "none", "temperature": 1.0, **ON}
    loss = case(student, teacher, target, **options)
    _, given = _gradients(loss, student, teacher)
    s, t = student.double(), teacher.double()
    wide = Case(case.spec, "reference", case.device)(s, t, target, **options)
    _, expected = _gradients(wide, s, t)
    assert given.isfinite().all()
    jumps = not case.spec.smooth and family not in ("disagreeing", "close")
    if not jumps:
        size = expected.abs().amax(-1, keepdim=True)
        assert ((given - expected).abs() <= 2e-4 * size + 1e-5).all()


EXCLUDING = [name for name in FAMILIES if name not in HARD]


@losses
@pytest.mark.parametrize("family", EXCLUDING)
def test_excluded_classes_and_bad_rows(spec: LossSpec, family: str) -> None:
    """Kernels are finite in the rows in which the reference is, and equal there."""
    found = []
    for backend in ("native", "reference"):
        student, teacher, target = make(family, 6, 9, dtype=torch.float64)
        student.requires_grad_()
        teacher.requires_grad_()
        options = {"reduction": "none"} if spec.by_row else {}
        loss = Case(spec, backend, "cpu")(student, teacher, target, **options, **ON)
        found.append(_gradients(loss, student, teacher)[1])
    finite = [x.isfinite().all(1) for x in found]
    assert torch.equal(*finite)
    given, expected = (x[finite[0]] for x in found)
    torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-10)


@each([spec for spec in LOSSES if spec.takes_target])
def test_ignored_rows_have_no_gradient(case: Case) -> None:
    """Nor the others' another one, whatever the ignored ones hold."""
    student, teacher, target = _pair(dtype=torch.float32, device=case.device)
    kept = torch.tensor([0, 2, 3, 5])
    whole = case(student[kept], teacher[kept], target[kept], **ON, **_mask(case, target[kept]))
    expected = _gradients(whole, student, teacher)
    target[[1, 4]] = -100
    with torch.no_grad():
        student[1], teacher[1], teacher[4] = torch.nan, torch.inf, torch.nan
    loss = case(student, teacher, target, **ON, **_mask(case, target))
    torch.testing.assert_close(loss, whole)
    for actual, wanted in zip(_gradients(loss, student, teacher), expected, strict=True):
        assert (actual[[1, 4]] == 0).all()
        torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-7)


def _mask(case: Case, target: Tensor) -> dict[str, Tensor]:
    return {} if case.spec.needs_target else {"target": target}


@each(ROW_LOSSES)
def test_keywords_of_rows(case: Case) -> None:
    """Weights, temperatures, denominators, learned weights, cross-entropies and parts."""
    student, teacher, target = _pair(device=case.device)
    weight = torch.linspace(0.5, 2.0, 6, dtype=torch.float64)
    heats = torch.linspace(1.0, 3.0, 6, dtype=torch.float64)
    learned = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    loss, parts = case(
        student, teacher, target, token_weight=weight, temperature=heats, num_items_in_batch=9,
        loss_weight=learned, hard_weight=0.5, return_parts=True, **ON,
        **({} if case.spec.needs_target else {"target": target}),
    )  # fmt: skip
    rows = [
        _plain(
            case.spec, student[i : i + 1], teacher[i : i + 1], target[i : i + 1],
            {"temperature": heats[i].item(), "loss_weight": 1.0},
        )
        for i in range(6)
    ]  # fmt: skip
    hard = torch.nn.functional.cross_entropy(student, target, reduction="none")
    expected = (weight * (learned * torch.cat(rows) + 0.5 * hard)).sum() / 9
    leaves = student, teacher, learned
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(parts.distillation + parts.hard, loss.detach())
    pairs = zip(_gradients(loss, *leaves), _gradients(expected, *leaves), strict=True)
    for actual, wanted in pairs:
        torch.testing.assert_close(actual, wanted, rtol=1e-8, atol=1e-11)


@each(ROW_LOSSES, reduction=("mean", "sum", "none"), shared=("reduction",))
def test_half_precision_images_and_reductions(case: Case, reduction: str) -> None:
    """Gradients have the dtypes and shapes of what they are of, and any upstream."""
    student, teacher, target = _pair(12, 5, device=case.device)
    shape = 2, 5, 2, 3
    student, teacher = (x.detach().reshape(2, 2, 3, 5).movedim(-1, 1) for x in (student, teacher))
    s, t = student.half().requires_grad_(), teacher.bfloat16().requires_grad_()
    y = target.reshape(2, 2, 3)
    loss = case(s, t, y, reduction=reduction, **ON)
    assert loss.shape == (y.shape if reduction == "none" else ())
    upstream = row_weights(loss)
    given = torch.autograd.grad(loss, (s, t), upstream)
    assert [x.dtype for x in given] == [torch.float16, torch.bfloat16]
    flat = [x.detach().double().movedim(1, -1).reshape(12, 5).requires_grad_() for x in (s, t)]
    values = _plain(case.spec, *flat, target, {})
    factor = upstream.reshape(-1) if reduction == "none" else 1 / 12 if reduction == "mean" else 1
    expected = _gradients(values * factor, *flat)
    for actual, wanted in zip(given, expected, strict=True):
        assert actual.shape == shape
        rows = actual.movedim(1, -1).reshape(12, 5).double()
        size = wanted.abs().max().item()
        torch.testing.assert_close(rows, wanted, rtol=2e-2, atol=1e-2 * size)


@losses
def test_any_shape_and_a_second_backward_pass(spec: LossSpec) -> None:
    student, teacher, target = _pair()
    options = {"class_dim": 0} if "class_dim" in inspect.signature(spec.function).parameters else {}
    s, t = (x.detach().t().contiguous().requires_grad_() if options else x
            for x in (student, teacher))  # fmt: skip
    index = {spec.target_name: target} if spec.needs_target else {}
    loss = spec.function(s, t, **index, **options, **ON)
    first = torch.autograd.grad(loss, (s, t), retain_graph=True)
    second = torch.autograd.grad(loss, (s, t))
    assert all(same_bits(a, b) for a, b in zip(first, second, strict=True))
    expected = _gradients(spec.function(student, teacher, **index, **ON), student, teacher)
    for actual, wanted in zip(first, expected, strict=True):
        torch.testing.assert_close(actual.t() if options else actual, wanted)


@losses
def test_a_gradient_that_nobody_wants_is_not_made(spec: LossSpec) -> None:
    """A frozen student, a frozen teacher, and no graph; the Module takes the keyword."""
    student, teacher, target = _pair()
    index = {spec.target_name: target} if spec.needs_target else {}
    module = spec.module(**ON)
    both = _gradients(module(student, teacher, **index), student, teacher)
    assert "teacher_grad=True" in repr(module)
    (of_teacher,) = _gradients(module(student.detach(), teacher, **index), teacher)
    (of_student,) = _gradients(module(student, teacher.detach(), **index), student)
    assert same_bits(of_student, both[0]) and same_bits(of_teacher, both[1])
    with torch.no_grad():
        assert not module(student, teacher, **index).requires_grad
    assert not module(student.detach(), teacher.detach(), **index).requires_grad


def test_an_infinite_row_leaves_the_others() -> None:
    """KL is infinite where the student excludes a class; the value off again would be NaN."""
    student, teacher, _ = _pair()
    with torch.no_grad():
        student[2, 3] = -torch.inf
    for backend in ("native", "reference"):
        case = Case(SPECS["kd"], backend, "cpu")
        loss = case(student, teacher, **ON)
        assert loss.item() == torch.inf
        given = _gradients(loss, student, teacher)
        rows = torch.tensor([0, 1, 3, 4, 5])
        rest = _gradients(case(student[rows], teacher[rows], reduction="sum", **ON) / 6,
                          student, teacher)  # fmt: skip
        for actual, wanted in zip(given, rest, strict=True):
            torch.testing.assert_close(actual[rows], wanted[rows])
        assert given[0].isfinite().all() and not given[1][2].isfinite().all()


@losses
@pytest.mark.parametrize("backend", [None, "reference"])
def test_second_derivatives_are_right_or_refused(spec: LossSpec, backend: str | None) -> None:
    """Mixed ones too, of which a gradient with the other side held constant has none."""
    student, teacher, target = _pair(3, 5)
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
    student, teacher, target = _pair()
    index = {spec.target_name: target} if spec.needs_target else {}
    loss = lambda s, t: spec.function(s, t, **index, **ON)  # noqa: E731
    expected = _gradients(loss(student, teacher), student, teacher)
    pair = student.detach(), teacher.detach()
    for actual, wanted in zip(torch.func.grad(loss, (0, 1))(*pair), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-8, atol=1e-11)
    tangents = torch.randn_like(pair[0]), torch.randn_like(pair[1])
    _, along = torch.func.jvp(loss, pair, tangents)
    slope = sum((g * v).sum() for g, v in zip(expected, tangents, strict=True))
    torch.testing.assert_close(along, slope, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("name", ["kd", "jsd", "mixed_kl", "dist", "dkd", "aekt", "acceptance"])
def test_under_a_compiler_in_one_graph(name: str) -> None:
    spec = SPECS[name]
    student, teacher, target = _pair()
    index = {spec.target_name: target} if spec.needs_target else {}
    module = spec.module(**ON)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    eager, loss = (f(student, teacher, **index) for f in (module, compiled))
    torch.testing.assert_close(loss, eager)
    pairs = zip(
        _gradients(loss, student, teacher), _gradients(eager, student, teacher), strict=True
    )
    for actual, wanted in pairs:
        torch.testing.assert_close(actual, wanted, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("name", ["tv", "alpha_beta"])
def test_a_loss_that_names_no_exchanged_roles_takes_the_reference(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that is added later may: the teacher's gradient is autograd's, once."""
    student, teacher, _ = _pair()
    case = Case(SPECS[name], "native", "cpu")
    expected = _gradients(case(student, teacher, **ON), student, teacher)
    monkeypatch.setitem(SPECS[name].__dict__, "exchanged", lambda *options: None)
    given = torch.autograd.grad(case(student, teacher, **ON), (student, teacher), create_graph=True)
    for actual, wanted in zip(given, expected, strict=True):
        torch.testing.assert_close(actual.detach(), wanted, rtol=1e-9, atol=1e-12)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        given[1].square().sum().backward()


def test_a_learned_temperature_beside_it() -> None:
    student, teacher, _ = _pair()
    heat = torch.tensor(2.5, dtype=torch.float64, requires_grad=True)
    loss = functional.kd_loss(student, teacher, heat, **ON)
    q, p = (student / heat).softmax(-1), (teacher / heat).softmax(-1)
    expected = heat**2 * _kl(p, q).mean()
    leaves = student, teacher, heat
    pairs = zip(_gradients(loss, *leaves), _gradients(expected, *leaves), strict=True)
    for actual, wanted in pairs:
        torch.testing.assert_close(actual, wanted)


def test_weights_of_tokens_in_both_directions() -> None:
    student, teacher, _ = _pair()
    weight = torch.linspace(0, 1, 6, dtype=torch.float64)
    loss = functional.mixed_kl_loss(student, teacher, forward_weight=weight, **ON)
    p, q = teacher.softmax(-1), student.softmax(-1)
    expected = (weight * _kl(p, q) + (1 - weight) * _kl(q, p)).mean()
    pairs = zip(_gradients(loss, student, teacher), _gradients(expected, student, teacher),
                strict=True)  # fmt: skip
    for actual, wanted in pairs:
        torch.testing.assert_close(actual, wanted)


@losses
def test_what_has_no_meaning_raises(spec: LossSpec) -> None:
    student, teacher, target = _pair()
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
    student, teacher, target = _pair(7, 5)
    target[4] = -100
    whole = {spec.target_name: target}
    expected = _gradients(
        spec.function(student, teacher, **whole, **ON, backend="reference"), student, teacher
    )
    own = slice(0, 3) if rank == 0 else slice(3, 7)
    s, t = (x.detach()[own].clone().requires_grad_() for x in (student, teacher))
    options = {spec.target_name: target[own], **ON}
    loss = spec.function(s, t, **options, process_group=group)
    for actual, wanted in zip(_gradients(loss, s, t), expected, strict=True):
        torch.testing.assert_close(actual, world * wanted[own], rtol=1e-9, atol=1e-12)
    if spec.by_row:
        with pytest.raises(ValueError, match=r"^teacher_grad must be False where tp_group"):
            spec.function(s, t, **options, tp_group=group)


def _check_sharded(spec: LossSpec) -> None:
    """DTensors: rows that are sharded."""
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = dist.init_device_mesh("cpu", (2,))
    student, teacher, target = _pair(7, 5)
    whole = {spec.target_name: target} if spec.needs_target else {}
    expected = _gradients(spec.function(student, teacher, **whole, **ON), student, teacher)
    place = lambda x: distribute_tensor(x.detach(), mesh, [Shard(0)])  # noqa: E731
    s, t = place(student).requires_grad_(), place(teacher).requires_grad_()
    loss: Any = spec.function(s, t, **{k: place(v) for k, v in whole.items()}, **ON)
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


@losses
def test_every_loss_has_a_plain_formula(spec: LossSpec) -> None:
    assert spec.name in PLAIN, f"write {spec.name} into tests/test_teacher_grad.py"

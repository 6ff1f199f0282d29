"""The embedding losses: values and gradients against formulas written here, and the contract."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kdkernels import _dispatch
from kdkernels.registry import SPECS, LossSpec

EMBEDDING = [spec for spec in SPECS.values() if spec.family == "embedding"]
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}


def unit(x: Tensor) -> Tensor:
    """Each sample over its norm, from the definition."""
    x = x.reshape(len(x), -1)
    return x / x.square().sum(1, keepdim=True).sqrt()


def iekd(
    inh: Tensor,
    exp: Tensor,
    teacher: Tensor,
    inheritance_weight: float = 50.0,
    exploration_weight: float = 50.0,
    similarity: str = "l1",
) -> Tensor:
    inh, exp, teacher = unit(inh), unit(exp), unit(teacher)
    if similarity == "cosine":
        near = sum(1 - a @ b for a, b in zip(inh, teacher, strict=True)) / len(inh)
        far = sum((a @ b).abs() for a, b in zip(exp, teacher, strict=True)) / len(inh)
        return inheritance_weight * near + exploration_weight * far
    near, far = (inh - teacher).abs().sum(), (exp - teacher).abs().sum()
    return (inheritance_weight * near - exploration_weight * far) / inh.numel()


def distance(x: Tensor, i: int, j: int) -> Tensor:
    gap = x[i] - x[j]
    return gap.new_zeros(()) if i == j else gap.square().sum().sqrt()


def tuple_matching(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    temperature: float = 4.0,
    margin: float = 0.2,
) -> Tensor:
    student, teacher = unit(student), unit(teacher)
    losses = []
    everyone = range(len(target))
    for a in everyone:
        for p in everyone:
            if a == p or target[a] != target[p]:
                continue
            near = distance(student, a, p)
            gaps = {
                n: (distance(student, a, n) - near).item()
                for n in everyone
                if target[n] != target[a]
            }
            members = [p, *(n for n, gap in gaps.items() if 0 < gap <= margin)]
            if len(members) == 1:
                continue
            s, t = (
                torch.stack([-distance(x, a, m) for m in members]) / temperature
                for x in (student, teacher)
            )
            losses.append((t.softmax(0) * (t.log_softmax(0) - s.log_softmax(0))).sum())
    return 1000 * torch.stack(losses).mean() if losses else 0 * student.sum()


def local_classifier(
    student: Tensor, teacher: Tensor, centers: Tensor, target: Tensor, temperature: float = 2.0
) -> Tensor:
    local = sorted(set(target.tolist()))
    s = student[:, local] / temperature
    t = torch.stack([teacher @ centers[k] for k in local], 1) / temperature
    return 100 * (t.softmax(1) * (t.log_softmax(1) - s.log_softmax(1))).sum() / len(s)


def huber(x: Tensor) -> Tensor:
    return torch.where(x.abs() < 1, x.square() / 2, x.abs() - 0.5)


def rkd(
    student: Tensor, teacher: Tensor, distance_weight: float = 25.0, angle_weight: float = 50.0
) -> Tensor:
    everyone = range(len(student))
    relations = []
    for x in (student, teacher):
        d = torch.stack([torch.stack([distance(x, i, j) for j in everyone]) for i in everyone])
        towards = x[None] - x[:, None]
        u = towards / torch.where(d > 0, d, 1.0)[:, :, None]
        relations.append((d / d[d > 0].mean(), torch.einsum("ijd,ikd->ijk", u, u)))
    (d_s, a_s), (d_t, a_t) = relations
    return distance_weight * huber(d_s - d_t).mean() + angle_weight * huber(a_s - a_t).mean()


def attention(student: Tensor, teacher: Tensor, p: float = 2.0) -> Tensor:
    q_s, q_t = (unit(x.abs().pow(p).mean(1)) for x in (student, teacher))
    return (q_s - q_t).square().mean()


def hint(student: Tensor, teacher: Tensor) -> Tensor:
    return (student - teacher).square().mean()


def pkd(student: Tensor, teacher: Tensor) -> Tensor:
    c = student.shape[1]
    s, t = (x.movedim(1, 0).reshape(c, -1) for x in (student, teacher))
    parts: list[Tensor] = []
    for a, b in zip(s, t, strict=True):
        a, b = ((x - x.mean()) / (x.var().sqrt() + 1e-6) for x in (a, b))
        parts.append((a - b).square().mean() / 2)
    return sum(parts) / len(parts)


FORMULAS: dict[str, Callable[..., Tensor]] = {
    f.__name__: f for f in (iekd, tuple_matching, local_classifier, rkd, attention, hint, pkd)
}


def students(spec: LossSpec) -> int:
    """How many leading arguments take a gradient."""
    return 2 if spec.name == "iekd" else 1


def inputs(spec: LossSpec, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, ...]:
    assert spec.inputs is not None
    return spec.inputs(torch.Generator().manual_seed(seed), dtype)


def run(
    function: Callable[..., Tensor], spec: LossSpec, tensors: tuple[Tensor, ...], **options: Any
) -> tuple[Tensor, ...]:
    leaves = [x.detach().clone().requires_grad_() for x in tensors[: students(spec)]]
    loss = function(*leaves, *tensors[len(leaves) :], **options)
    return (loss.detach(), *torch.autograd.grad(loss, leaves))


def backends() -> Any:
    grid = []
    for spec in EMBEDDING:
        for backend in _dispatch.BACKENDS:
            reasons = _dispatch.why_not(spec, backend, torch.empty(0))
            if backend not in spec.backends:
                continue
            marks = [pytest.mark.skip(reason="; ".join(reasons))] if reasons else []
            grid.append(pytest.param(spec, backend, id=f"{spec.name}-{backend}", marks=marks))
        if spec.composed is not None:
            grid.append(pytest.param(spec, None, id=f"{spec.name}-composed"))
    return pytest.mark.parametrize(("spec", "backend"), grid)


every = pytest.mark.parametrize("spec", EMBEDDING, ids=lambda spec: spec.name)


def test_every_loss_has_a_formula_here() -> None:
    assert FORMULAS.keys() == {spec.name for spec in EMBEDDING}


@backends()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients(spec: LossSpec, backend: str, dtype: torch.dtype) -> None:
    formula = FORMULAS[spec.name]
    for seed, sample in enumerate(spec.samples):
        tensors = inputs(spec, dtype, seed)
        sample = dict(sample)
        weight = sample.get("loss_weight")
        got = run(spec.function, spec, tensors, **sample, backend=backend)
        sample.pop("loss_weight", None)
        wide = tuple(x.double() if x.is_floating_point() else x for x in tensors)
        true = run(formula, spec, wide, **sample)
        default = inspect.signature(spec.function).parameters["loss_weight"].default
        scale = 1.0 if weight is None else weight / default
        assert got[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert true[0] != 0
        # IE-KD's two parts cancel: its value is judged by their size.
        size = 100.0 if spec.name == "iekd" else true[0].abs().item() * scale
        limit = 1e-4 if dtype != torch.float64 else 1e-10
        assert abs(got[0].double() - scale * true[0]) <= limit * size
        for mine, theirs, leaf in zip(got[1:], true[1:], tensors, strict=False):
            assert mine.dtype == leaf.dtype and mine.shape == leaf.shape
            error = (mine.double() - scale * theirs).norm()
            assert error <= TOLERANCE[dtype] * scale * theirs.norm(), (spec.name, sample)


@backends()
def test_gradcheck(spec: LossSpec, backend: str) -> None:
    tensors = inputs(spec, torch.float64, 3)
    count = students(spec)
    leaves = tuple(x.requires_grad_() for x in tensors[:count])
    options: dict[str, Any] = {"similarity": "cosine"} if spec.name == "iekd" else {}

    def loss(*s: Tensor) -> Tensor:
        return spec.function(*s, *tensors[count:], backend=backend, **options)

    # Interpreted kernels take milliseconds a program: along random directions only.
    assert torch.autograd.gradcheck(loss, leaves, fast_mode=backend == "triton")


@backends()
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=str)
def test_backward_twice_and_no_mutation(spec: LossSpec, backend: str, dtype: torch.dtype) -> None:
    tensors = inputs(spec, dtype)
    before = copy.deepcopy(tensors)
    leaves = [x.requires_grad_() for x in tensors[: students(spec)]]
    upstream = torch.tensor(0.5)
    loss = spec.function(*tensors, backend=backend)
    first = torch.autograd.grad(loss, leaves, upstream, retain_graph=True)
    held = [g.clone() for g in first]
    second = torch.autograd.grad(loss, leaves, upstream)
    once = torch.autograd.grad(spec.function(*tensors, backend=backend), leaves)
    for a, b, c, h in zip(first, second, once, held, strict=True):
        assert torch.equal(a, b) and torch.equal(a, h)
        assert torch.allclose(2 * a.float(), c.float(), rtol=2e-3, atol=1e-6)
    assert all(torch.equal(a.detach(), b) for a, b in zip(tensors, before, strict=True))
    assert upstream == 0.5
    assert torch.equal(spec.function(*tensors, backend=backend), loss)


@backends()
def test_reductions_and_weight(spec: LossSpec, backend: str) -> None:
    tensors = inputs(spec, torch.float64)
    default = inspect.signature(spec.function).parameters["loss_weight"].default
    mean = run(spec.function, spec, tensors, backend=backend)
    for other in ({"reduction": "batchmean"}, {"loss_weight": default}):
        same = run(spec.function, spec, tensors, backend=backend, **other)
        assert all(torch.equal(a, b) for a, b in zip(mean, same, strict=True))
    total = run(spec.function, spec, tensors, backend=backend, reduction="sum")
    if spec.name != "rkd":  # a sum of two means over different counts
        ratio = total[0] / mean[0]
        assert ratio > 1.5 and abs(ratio - ratio.round()) < 1e-9
        for a, b in zip(total[1:], mean[1:], strict=True):
            assert torch.allclose(a, ratio * b)
    heavy = run(spec.function, spec, tensors, backend=backend, loss_weight=3 * default)
    assert all(torch.allclose(a, 3 * b) for a, b in zip(heavy, mean, strict=True))


@every
def test_module_is_its_function(spec: LossSpec) -> None:
    tensors = inputs(spec, torch.float32)
    for sample in spec.samples:
        assert torch.equal(spec.module(**sample)(*tensors), spec.function(*tensors, **sample))
    held = {n for n in vars(spec.module()) if not n.startswith("_") and n != "training"}
    parameters = inspect.signature(spec.function).parameters
    assert held == {n for n, p in parameters.items() if p.default is not p.empty}
    assert not spec.module().state_dict()


@backends()
def test_compiles_without_a_break(spec: LossSpec, backend: str) -> None:
    torch._dynamo.reset()
    # float16 is the dtype with a path of its own in kernels; a reference has one path.
    tensors = inputs(spec, torch.float32 if backend == "reference" else torch.float16)

    def loss(*args: Tensor) -> Tensor:
        return spec.function(*args, backend=backend)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for a, b in zip(run(compiled, spec, tensors), run(loss, spec, tensors), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


@every
def test_errors(spec: LossSpec) -> None:
    tensors = inputs(spec, torch.float32)
    names = list(inspect.signature(spec.function).parameters)

    def refused(error: type[Exception], text: str, *args: Any, **options: Any) -> None:
        with pytest.raises(error, match=text + r".*, got "):
            spec.function(*args, **options)

    for i, name in enumerate(names[: len(tensors)]):
        changed = list(tensors)
        changed[i] = "no tensor"
        refused(TypeError, f"{name} must be a Tensor", *changed)
        changed[i] = tensors[i].bool() if name != "target" else tensors[i].float()
        refused(TypeError, f"{name} must be ", *changed)
        changed[i] = tensors[i][None, None, None]
        refused(ValueError, f"{name} must be ", *changed)
        if name.startswith(("teacher", "centers")):
            changed[i] = tensors[i].clone().requires_grad_()
            refused(ValueError, f"{name} must be a constant", *changed)
    for name in names[len(tensors) :]:
        if name == "process_group":  # test_group.py
            continue
        if name == "resize":
            refused(ValueError, f"{name} must be None or 'bilinear'", *tensors, **{name: "cubic"})
            continue
        if name == "ignore_index":
            refused(TypeError, f"{name} must be an int", *tensors, **{name: "1"})
            continue
        if name not in ("similarity", "reduction", "backend"):
            refused(TypeError, f"{name} must be a number", *tensors, **{name: "1"})
            refused(ValueError, f"{name} must be finite", *tensors, **{name: float("nan")})
        if name not in ("similarity", "reduction", "backend", "loss_weight"):
            refused(ValueError, f"{name} must be >", *tensors, **{name: -1.0})
    refused(ValueError, "reduction must be", *tensors, reduction="average")
    refused(ValueError, "backend must be", *tensors, backend="cuda")
    if spec.name != "local_classifier" and "triton" not in spec.backends:
        refused(ValueError, "backend must be able to run", *tensors, backend="triton")

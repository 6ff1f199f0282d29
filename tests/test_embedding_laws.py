"""What IE-KD promises beyond values: invariance, degenerate samples, layouts; and threads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels import _dispatch, functional as K
from kdkernels.registry import SPECS

FUSED = ("iekd", "tuple_matching")
REASONS = _dispatch.why_not(SPECS["iekd"], "native", torch.empty(0))
ABSENT = _dispatch.why_not(SPECS["iekd"], "triton", torch.empty(0))
KERNELS = [
    pytest.param(backend, marks=pytest.mark.skipif(bool(reasons), reason="; ".join(reasons)))
    for backend, reasons in (("native", REASONS), ("triton", ABSENT))
]
kernels = pytest.mark.parametrize("backend", KERNELS)
backends = pytest.mark.parametrize("backend", [*KERNELS, "reference"])
similarities = pytest.mark.parametrize("similarity", ("l1", "cosine"))


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def gradients(loss: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, leaves, retain_graph=True)


def labels(count: int, classes: int, seed: int = 0) -> Tensor:
    return torch.randint(classes, (count,), generator=torch.Generator().manual_seed(seed))


@backends
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("width", (7, 33, 64, 4096))
def test_equal_factors_are_a_tie(backend: str, dtype: torch.dtype, width: int) -> None:
    """|x - t| = 0 has the subgradient 0, whatever rounds on the way to x and t."""
    if backend == "triton" and width > 64:
        pytest.skip("the interpreter takes seconds for this width")
    teacher = draw(5, width, dtype=dtype)
    factors = [teacher.clone().requires_grad_() for _ in range(2)]
    loss = K.iekd_loss(*factors, teacher, backend=backend)
    assert loss == 0 and not any(gradient.any() for gradient in gradients(loss, *factors))


@backends
@similarities
def test_iekd_ignores_the_scale_of_a_sample(backend: str, similarity: str) -> None:
    factors = [draw(5, 3, 4, 4, seed=s).requires_grad_() for s in range(3)]
    scales = torch.tensor([1e-9, 1e9, 3.0, 0.5, 1e4], dtype=torch.float64)[:, None, None, None]
    options: dict[str, Any] = {"similarity": similarity, "backend": backend}
    loss = K.iekd_loss(factors[0], factors[1], factors[2].detach(), **options)
    scaled = [(f * scales).detach().requires_grad_() for f in factors]
    same = K.iekd_loss(scaled[0], scaled[1], scaled[2].detach(), **options)
    assert torch.allclose(loss, same, rtol=1e-9)
    before, after = gradients(loss, *factors[:2]), gradients(same, *scaled[:2])
    for a, b, f in zip(before, after, factors, strict=False):
        assert torch.allclose(a, b * scales, rtol=1e-6, atol=1e-12)
        # Nothing pulls along the sample itself.
        assert (a * f).flatten(1).sum(1).abs().max() < 1e-12 * a.norm() * f.norm()


@backends
@similarities
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=str)
def test_iekd_degenerate_samples(backend: str, similarity: str, dtype: torch.dtype) -> None:
    inh, exp, teacher = (draw(4, 70, seed=s).to(dtype) for s in range(3))
    inh[0] = teacher[0]
    exp[0] = teacher[0]
    inh[1], exp[1], teacher[1] = 0, 0, 0
    exp[2] = -teacher[2]
    inh.requires_grad_()
    exp.requires_grad_()
    loss = K.iekd_loss(inh, exp, teacher, similarity=similarity, backend=backend)
    assert loss.isfinite()
    for gradient in gradients(loss, inh, exp):
        assert gradient.isfinite().all()
        assert gradient[3].any()
        assert not gradient[1].any()
    alone = K.iekd_loss(inh[:1], exp[:1], teacher[:1], similarity=similarity, backend=backend)
    size = 50.0 if similarity == "cosine" else 0.0
    assert abs(alone - size) < 1e-3


@backends
@similarities
@pytest.mark.parametrize("size", (0.0, 1e-14))
@pytest.mark.parametrize("whose", (0, 1, 2))
def test_iekd_short_factors_match_torch(
    backend: str, similarity: str, size: float, whose: int
) -> None:
    """A norm below 1e-12 counts as 1e-12: no vector of norm 1, and no direction to project out."""
    factors = [draw(2, 9, seed=s) for s in range(3)]
    factors[whose][1] *= size
    students, teacher = [x.requires_grad_() for x in factors[:2]], factors[2]
    mine = K.iekd_loss(*students, teacher, similarity=similarity, backend=backend)
    inh, exp, t = (F.normalize(x) for x in (*students, teacher))
    if similarity == "l1":
        theirs = 50 * ((inh - t).abs().mean() - (exp - t).abs().mean())
    else:
        theirs = 50 * (1 - (inh * t).sum(1) + (exp * t).sum(1).abs()).mean()
    torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)
    for a, b in zip(gradients(mine, *students), gradients(theirs, *students), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@backends
@pytest.mark.parametrize("which", ((True, False), (False, True), (False, False)))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=str)
def test_iekd_any_subset_of_gradients(
    backend: str, which: tuple[bool, bool], dtype: torch.dtype
) -> None:
    three = [draw(3, 20, seed=s).to(dtype) for s in range(3)]
    both = [x.clone().requires_grad_() for x in three[:2]]
    full = K.iekd_loss(*both, three[2], backend=backend)
    expected = gradients(full, *both)
    some = [x.clone().requires_grad_(w) for x, w in zip(three, which, strict=False)]
    loss = K.iekd_loss(*some, three[2], backend=backend)
    assert torch.equal(loss, full) and loss.requires_grad == any(which)
    if any(which):
        loss.backward()
    for leaf, wanted, gradient in zip(some, which, expected, strict=True):
        assert (leaf.grad is not None) == wanted
        assert not wanted or torch.equal(leaf.grad, gradient)


@backends
@pytest.mark.parametrize("layout", ("channels_last", "slice", "mixed", "transposed"))
def test_iekd_layouts(backend: str, layout: str) -> None:
    plain = [draw(4, 6, 5, 3, seed=s).float() for s in range(3)]
    if layout == "slice":
        wide = [torch.cat([x, x], 1) for x in plain]
        other = [x[:, :6] for x in wide]
    elif layout == "transposed":
        other = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in plain]
    else:
        last = torch.channels_last
        other = [x.to(memory_format=last) for x in plain]
        if layout == "mixed":
            other[1] = plain[1].bfloat16()
            plain[1] = other[1].float()
    for three in (plain, other):
        three[:2] = [x.detach().requires_grad_() for x in three[:2]]
    a = K.iekd_loss(*plain, backend=backend)
    b = K.iekd_loss(*other, backend=backend)
    assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)
    pairs = zip(gradients(a, *plain[:2]), gradients(b, *other[:2]), strict=True)
    for x, y in pairs:
        assert torch.allclose(x, y.float(), rtol=1e-2 if y.dtype != x.dtype else 1e-5, atol=1e-6)


@backends
def test_iekd_no_samples(backend: str) -> None:
    inh = torch.zeros(0, 5, requires_grad=True)
    loss = K.iekd_loss(inh, torch.zeros(0, 5), torch.zeros(0, 5), backend=backend)
    loss.backward()
    assert loss == 0 and inh.grad is not None and inh.grad.shape == (0, 5)


@pytest.mark.skipif(bool(REASONS), reason="; ".join(REASONS))
def test_threads_change_no_bit() -> None:
    inh, exp, teacher = (draw(64, 33, 9, 3, seed=s).float() for s in range(3))
    student, other, target = draw(90, 7).float(), draw(90, 8).float(), labels(90, 4)
    inh.requires_grad_()
    student.requires_grad_()
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            a = K.iekd_loss(inh, exp, teacher, backend="native")
            b = K.tuple_matching_loss(student, other, target, backend="native")
            results.append((a, b, *gradients(a + b, inh, student)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


@backends
@pytest.mark.parametrize("name", FUSED)
def test_no_silent_double_backward(backend: str, name: str) -> None:
    spec = SPECS[name]
    assert spec.inputs is not None
    if backend == "reference":
        pytest.skip("the reference is differentiated by autograd")
    student, *rest = spec.inputs(torch.Generator().manual_seed(0), torch.float64)
    student.requires_grad_()
    loss = spec.function(student, *rest, backend=backend)
    (gradient,) = torch.autograd.grad(loss, student, create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        torch.autograd.grad(gradient.square().sum(), student)


@pytest.mark.skipif(bool(ABSENT), reason="; ".join(ABSENT))
@pytest.mark.parametrize("name", FUSED)
def test_triton_blocks_do_not_matter(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Samples and batches of several blocks, the last one not full."""
    from kdkernels.triton import launch

    monkeypatch.setattr(launch, "LIMITS", launch.Limits(1, 16, 8))
    spec = SPECS[name]
    for options in spec.samples[:2] if name == "iekd" else spec.samples[2:]:
        if name == "iekd":
            tensors = tuple(draw(3, 21, seed=s) for s in range(3))
        else:
            tensors = draw(7, 6), draw(7, 7, seed=1), labels(7, 2)
        results = []
        for backend in ("triton", "reference"):
            leaves = [x.clone().requires_grad_() for x in tensors[: 2 if name == "iekd" else 1]]
            loss = spec.function(*leaves, *tensors[len(leaves) :], **options, backend=backend)
            results.append((loss, *gradients(loss, *leaves)))
        assert results[1][0] != 0
        for mine, true in zip(*results, strict=True):
            assert torch.allclose(mine, true, rtol=1e-10, atol=1e-13)


@kernels
@similarities
@pytest.mark.parametrize("size", (1e-25, 1e25))
def test_iekd_squares_beyond_float32(backend: str, similarity: str, size: float) -> None:
    """Norms whose squares float32 cannot hold; the other samples do not feel it."""
    three = [draw(3, 20, seed=s).float() for s in range(3)]
    options: dict[str, Any] = {"similarity": similarity, "backend": backend}
    expected = K.iekd_loss(*three, **options)
    far = [x.clone() for x in three]
    far[0][1] *= size
    # Below 1e-12 a norm is a constant, so that only a large sample keeps its direction.
    loss = K.iekd_loss(*far, **options)
    if size > 1:
        assert torch.allclose(loss, expected, rtol=1e-5)
    else:
        zero = [x.clone() for x in three]
        zero[0][1] = 0
        assert torch.allclose(loss, K.iekd_loss(*zero, **options), rtol=1e-5)


@kernels
@similarities
@pytest.mark.parametrize("size", (1e151, 1e210, 1e306))
def test_iekd_squares_beyond_float64(backend: str, similarity: str, size: float) -> None:
    """Of a student's factor and of the teacher's: the direction is what counts."""
    three = [draw(3, 20, seed=s) for s in range(3)]
    options: dict[str, Any] = {"similarity": similarity, "backend": backend}
    far = [x.clone() for x in three]
    far[0][1] *= size
    far[2][2] *= size
    results = []
    for tensors in (three, far):
        leaves = [x.requires_grad_() for x in tensors[:2]]
        loss = K.iekd_loss(*leaves, tensors[2], **options)
        results.append((loss, *gradients(loss, *leaves)))
    results[1][1][1] *= size  # a gradient shrinks as its factor grows
    for mine, true in zip(*results, strict=True):
        assert torch.allclose(mine, true, rtol=1e-10, atol=1e-13)

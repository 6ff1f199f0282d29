"""What REFILLED promises beyond values: miner, invariance, degenerate batches, local classes."""

from __future__ import annotations

import pytest
import torch
from test_embedding_laws import backends, draw, gradients, kernels, labels
from test_embedding_losses import tuple_matching

from kdkernels import functional as K
from kdkernels._ops import operator_name
from kdkernels.losses import ClassCenters
from kdkernels.reference import refilled as reference


@pytest.mark.parametrize("margin", (0.0, 0.05, 0.2, 2.0))
def test_miner_equals_a_triple_loop(margin: float) -> None:
    x, y = draw(13, 4), labels(13, 3)
    unit = x / x.square().sum(1, keepdim=True).sqrt()
    mined = K.semihard_tuples(x, y, margin)
    for a in range(13):
        for p in range(13):
            for n in range(13):
                near, far = (unit[a] - unit[p]).norm(), (unit[a] - unit[n]).norm()
                wanted = a != p and y[a] == y[p] and y[n] != y[a] and 0 < far - near <= margin
                assert mined[a, p, n] == wanted
    assert mined.any() == (margin > 0)
    assert mined.dtype == torch.bool and not mined.requires_grad


@backends
def test_tuples_are_the_miners(backend: str) -> None:
    """The count that the mean divides by is the miner's."""
    s, t, y = draw(30, 6, dtype=torch.float32), draw(30, 9, seed=1).float(), labels(30, 4)
    total, mean = (
        K.tuple_matching_loss(s, t, y, reduction=r, backend=backend) for r in ("sum", "mean")
    )
    assert round((total / mean).item()) == K.semihard_tuples(s, y).any(-1).sum()


@backends
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
def test_the_margin_belongs_to_the_band_and_zero_does_not(backend: str, dtype: torch.dtype) -> None:
    """Distances of exactly 0 and 2: the gap is 2 for equal positives, else 0 or -2."""
    here, there = [1.0, 0.0], [-1.0, 0.0]
    t, y = draw(3, 5).to(dtype), torch.tensor([0, 0, 1])
    for embeddings, margin, tuples in (
        ([here, here, there], 2.0, 2),
        ([here, here, there], 2.0 - 1e-6, 0),
        ([here, there, there], 2.0, 0),
        ([there, here, here], 0.0, 0),
    ):
        s = torch.tensor(embeddings, dtype=dtype)
        mined = K.semihard_tuples(s, y, margin)
        loss = K.tuple_matching_loss(s, t, y, margin=margin, backend=backend)
        expected = tuple_matching(s.double(), t.double(), y, margin=margin)
        assert mined.any(-1).sum() == tuples
        assert bool(loss > 0) == bool(tuples)
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-12)


@backends
def test_tuples_ignore_rotations_and_scales(backend: str) -> None:
    s, t, y = draw(20, 6), draw(20, 9, seed=1), labels(20, 4)
    rotation = torch.linalg.qr(draw(6, 6, seed=2))[0]
    wide = torch.linalg.qr(draw(12, 9, seed=3))[0]  # into more dimensions
    a = K.tuple_matching_loss(s, t, y, backend=backend)
    b = K.tuple_matching_loss(3 * s @ rotation, 0.1 * t @ wide.T, y, backend=backend)
    assert a > 0 and torch.allclose(a, b, rtol=1e-9)
    same = K.tuple_matching_loss(s @ rotation, s, y, backend=backend)
    assert same.abs() < 1e-9


@backends
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
@pytest.mark.parametrize("kind", ("equal", "zero", "one_class", "all_classes", "single", "empty"))
def test_no_tuple_is_zero_and_attached(backend: str, dtype: torch.dtype, kind: str) -> None:
    count = {"single": 1, "empty": 0}.get(kind, 6)
    s, t, y = draw(6, 4)[:count].to(dtype), draw(6, 5)[:count].to(dtype), labels(6, 2)[:count]
    if kind == "equal":
        s[:] = s[0].clone()
    elif kind == "zero":
        s[:] = 0
    elif kind in ("one_class", "all_classes"):
        y = torch.zeros(6).long() if kind == "one_class" else torch.arange(6)
    s.requires_grad_()
    loss = K.tuple_matching_loss(s, t, y, backend=backend)
    assert loss == 0 and loss.dtype == dtype
    (gradient,) = gradients(loss, s)
    assert gradient.shape == s.shape and not gradient.any()


@backends
def test_some_equal_embeddings(backend: str) -> None:
    """Positives at distance 0 make tuples, and the gradient stays finite."""
    s, t, y = draw(8, 4), draw(8, 5), torch.tensor([0, 0, 0, 1, 1, 1, 2, 2])
    s[1], t[1] = s[0].clone(), t[0].clone()
    s[4] = 0
    s.requires_grad_()
    loss = K.tuple_matching_loss(s, t, y, margin=2.0, backend=backend)
    assert loss > 0 and gradients(loss, s)[0].isfinite().all()


@backends
def test_small_distances_keep_their_digits(backend: str) -> None:
    """Float32 embeddings 1e-4 apart: a float32 product would leave noise."""
    s, t, y = 1 + 1e-4 * draw(12, 6).float(), draw(12, 6, seed=1).float(), labels(12, 3)
    s.requires_grad_()
    wide = s.detach().double().requires_grad_()
    mine, true = (K.tuple_matching_loss(x, t.to(x.dtype), y, backend=backend) for x in (s, wide))
    assert torch.allclose(mine.double(), true, rtol=1e-4)
    a, b = gradients(mine, s)[0].double(), gradients(true, wide)[0]
    assert (a - b).norm() < 1e-3 * b.norm()


@backends
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
def test_cold_softmax(backend: str, dtype: torch.dtype) -> None:
    """A temperature at which exponentials underflow: finite, and as the reference in float64."""
    s, t, y = draw(12, 6), draw(12, 7, seed=1), labels(12, 3)
    wide = s.clone().requires_grad_()
    true = K.tuple_matching_loss(wide, t, y, 1e-3, 2.0, backend="reference")
    leaf = s.to(dtype).requires_grad_()
    mine = K.tuple_matching_loss(leaf, t.to(dtype), y, 1e-3, 2.0, backend=backend)
    assert torch.allclose(mine.double(), true, rtol=1e-3)
    a, b = gradients(mine, leaf)[0].double(), gradients(true, wide)[0]
    assert (a - b).norm() <= 2e-3 * b.norm()


@pytest.mark.parametrize("present", ([1, 3, 5], [4], list(range(8))), ids=str)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_absent_classes_get_exactly_no_gradient(present: list[int], dtype: torch.dtype) -> None:
    y = torch.tensor(present)[labels(10, len(present))]
    z = draw(10, 8).to(dtype).requires_grad_()
    teacher, centers = draw(10, 5).float(), K.class_centers(draw(40, 5), labels(40, 8), 8)
    loss = K.local_classifier_loss(z, teacher, centers, y)
    (gradient,) = gradients(loss, z)
    absent = [c for c in range(8) if c not in y]
    assert not gradient[:, absent].any() and gradient.isfinite().all()
    if len(present) == 1:
        assert loss == 0 and loss.requires_grad and not gradient.any()
    else:
        assert gradient[:, sorted(set(y.tolist()))].any()
    # What the logits of absent classes are changes nothing.
    other = z.detach().clone()
    other[:, absent] = 77.0
    assert torch.equal(K.local_classifier_loss(other, teacher, centers, y), loss)


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_ignored_samples_of_the_local_classifier(reduction: str, backend: str | None) -> None:
    """Deleting them changes nothing; what they hold is not looked at; their class is not local."""
    z, teacher, centers = draw(10, 8).requires_grad_(), draw(10, 5), draw(8, 5)
    whole = labels(10, 8)
    ignored = int(whole[3])
    for index in (ignored, -100):
        y = torch.where(whole == ignored, index, whole)
        counted = y != index
        assert 0 < counted.sum() < 10
        with torch.no_grad():
            dirty = torch.where(counted[:, None], teacher, float("nan"))
        options = {"reduction": reduction, "backend": backend}
        loss = K.local_classifier_loss(z, dirty, centers, y, ignore_index=index, **options)
        kept = K.local_classifier_loss(
            z[counted], teacher[counted], centers, y[counted], ignore_index=None, **options
        )
        if reduction == "none":
            assert not loss[~counted].any()
            torch.testing.assert_close(loss[counted], kept)
        else:
            torch.testing.assert_close(loss, kept)
        (gradient,), (wanted,) = gradients(loss.sum(), z), gradients(kept.sum(), z)
        torch.testing.assert_close(gradient, wanted)
        assert not gradient[~counted].any()
        specified = reference.local_classifier(
            z, torch.where(counted[:, None], teacher, 0.0), centers, y, ignore_index=index,
            reduction=reduction,
        )  # fmt: skip
        torch.testing.assert_close(loss, 100.0 * specified)
    none = K.local_classifier_loss(z, teacher, centers, torch.full((10,), -100), backend=backend)
    assert none == 0 and not gradients(none, z)[0].any()
    with pytest.raises(ValueError, match=r"target must be in \[0, 8\), got -100"):
        K.local_classifier_loss(z, teacher, centers, torch.full((10,), -100), ignore_index=None)


def test_class_centers_are_exact_and_in_any_order() -> None:
    x, y = 1e3 + draw(50, 6).float(), labels(50, 4)
    whole = K.class_centers(x, y, 5)
    for batches in (x.split(7), x.split(50), x.split(1)):
        some = ClassCenters(5, 6)
        order = list(zip(batches, y.split(len(batches[0])), strict=True))
        for embeddings, target in reversed(order):
            some.update(embeddings, target)
        assert torch.allclose(some.centers(), whole, rtol=0, atol=1e-7)
    assert not whole[4].any()
    for k in range(4):
        mean = x[y == k].double().mean(0)
        assert torch.allclose(whole[k].double(), mean / mean.norm(), atol=1e-7)
    with pytest.raises(ValueError, match=r"target must be in \[0, 4\), got"):
        K.class_centers(x, y + 1, 4)
    with pytest.raises(ValueError, match=r"num_classes must be >= 1, got 0"):
        ClassCenters(0, 3)


def test_class_centers_keep_small_means() -> None:
    """Embeddings that nearly cancel: sums in float32 would leave their rounding errors."""
    large, small = 1e4 * draw(20, 6), draw(20, 6, seed=1)
    x, y = torch.cat([large, small - large]).float(), torch.zeros(40).long()
    mean = x.double().mean(0)
    some = ClassCenters(1, 6)
    for embeddings, target in zip(x.split(10), y.split(10), strict=True):
        some.update(embeddings, target)
    for centers in (K.class_centers(x, y, 1), some.centers()):
        assert torch.allclose(centers[0].double(), mean / mean.norm(), rtol=0, atol=1e-6)


@kernels
def test_operators_pass_opcheck(backend: str) -> None:
    inh, exp, teacher = (draw(3, 5, seed=s) for s in range(3))
    inh.requires_grad_()
    iekd, backwards, tuples = (
        getattr(torch.ops.kdkernels, operator_name(backend, name)).default
        for name in ("iekd", "iekd_backward", "tuple_matching")
    )
    for wanted in ((True, False), (False, False)):
        arguments = (inh, exp, teacher, [1.0, 2.0], None, True, 1, *wanted)
        torch.library.opcheck(iekd, arguments)
    upstream = torch.ones((), dtype=torch.float64)
    backward = (upstream, inh.detach(), exp, teacher, [1.0, 2.0], None, False, 2, True, True)
    torch.library.opcheck(backwards, backward)
    d, target = torch.cdist(draw(6, 3), draw(6, 3)), torch.tensor([0, 0, 0, 1, 1, 1])
    d = (d + d.T).fill_diagonal_(0)
    arguments = (d.clone().requires_grad_(), d, target, [2.0, 4.0, 1.0], None, 1, True)
    torch.library.opcheck(tuples, arguments)


@pytest.mark.parametrize("backend", (None, "reference"))
@pytest.mark.parametrize("bad", (torch.nan, torch.inf))
def test_a_bad_embedding_is_seen(backend: str | None, bad: float) -> None:
    """The miner's comparisons leave it out; the other rows' gradient would be NaN unseen."""
    student = torch.tensor([[1.0, 0.0], [0.0, 1.0], [bad, 0.0], [0.9, 0.1], [0.5, 0.5]])
    target = torch.tensor([0, 1, 1, 0, 1])
    loss = K.tuple_matching_loss(student, torch.eye(5), target, 4.0, 2.0, backend=backend)
    assert loss.isnan()

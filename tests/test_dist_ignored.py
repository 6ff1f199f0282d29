"""DIST with ignored rows: what is left is the loss of the other rows alone, in rows and columns.

``test_masks.py`` has what it shares with the row losses, ``test_group.py`` the ranks of a group.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import Case, each, same_bits, value_and_grad
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from kdkernels import DISTLoss, _dispatch
from kdkernels.functional import dist_loss
from kdkernels.registry import SPECS

DIST = SPECS["dist"]
NAN, INF = float("nan"), float("inf")
TOLERANCE = {torch.float64: 1e-11, torch.float32: 3e-5, torch.bfloat16: 1e-2}


def _inputs(rows: int, classes: int, dtype: torch.dtype, keep: str) -> tuple[Tensor, ...]:
    """Student, teacher and labels, of which -100 is ignored; its rows hold NaN and inf."""
    generator = torch.Generator().manual_seed(rows)
    student, teacher = torch.randn(2, rows, classes, generator=generator).to(dtype)
    index = torch.arange(rows)
    kept = {
        "two of three": index % 3 > 0,
        "a run": index >= rows * 2 // 3,  # whole tiles and chunks are ignored
        "one": index == rows // 2,
        "none": index < 0,
        "all": index >= 0,
    }[keep]
    student[~kept], teacher[~kept] = NAN, INF
    return student, teacher, torch.where(kept, index % classes, -100)


def _check(
    case: Case, loss: Tensor, gradient: Tensor, student: Tensor, teacher: Tensor, labels: Tensor,
    **options: Any,
) -> None:  # fmt: skip
    """Against the float64 reference of the rows that are left, with no mask anywhere."""
    kept = labels.flatten() != -100
    rest = student[kept].double(), teacher[kept].double()
    wanted, slope = value_and_grad(dist_loss, *rest, backend="reference", **options)
    tolerance = TOLERANCE[student.dtype]
    torch.testing.assert_close(loss.double(), wanted, rtol=tolerance, atol=tolerance)
    size = slope.abs().max().item() if len(slope) else 0.0
    torch.testing.assert_close(
        gradient[kept].double(), slope, rtol=tolerance, atol=tolerance * size + 1e-300
    )
    assert same_bits(gradient[~kept], torch.zeros_like(gradient[~kept]))


def _of_shape(
    case: Case, student: Tensor, teacher: Tensor, labels: Tensor, shape: tuple[int, ...],
    last: bool = False, **options: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Loss, and gradient as rows, of logits that lie in another shape of the rows; the teacher's
    classes may be last in memory."""
    s, t = (x.view(*shape, x.shape[1]) for x in (student, teacher))
    if len(shape) == 3:
        s, t = s.movedim(-1, 1).contiguous(), t.movedim(-1, 1)
        t = t if last else t.contiguous()
    loss, slope = value_and_grad(case, s, t, target=labels.view(shape), **options)
    slope = slope.movedim(1, -1) if len(shape) == 3 else slope
    return loss, slope.reshape(student.shape)


@each(
    [DIST],
    keep_rows=("two of three", "a run", "one", "none", "all"),
    dtype=(torch.float64, torch.float32, torch.bfloat16),
    keep=lambda case, rows, dtype: not case.interpreted or dtype == torch.float32,
)
def test_equals_the_loss_of_the_other_rows(case: Case, keep_rows: str, dtype: torch.dtype) -> None:
    """(N, C), (B, S, V) and (N, C, H, W), where 255 is ignored; class indices and bools."""
    for rows, classes in case.pick(((24, 7), (600, 19), (312, 200)), ((24, 5),)):
        student, teacher, labels = _inputs(rows, classes, dtype, keep_rows)
        for reduction in ("mean", "sum"):
            options = {"tau": 2.0, "gamma": 0.5, "reduction": reduction}
            expected = (student, teacher, labels)
            far = torch.where(labels == -100, 255, labels)
            given: list[tuple[tuple[int, ...], Tensor, dict[str, Any]]] = [
                ((rows,), labels, {}),
                ((3, rows // 3), labels != -100, {}),
                ((2, 4, rows // 8), far, {"ignore_index": 255}),
                ((2, 4, rows // 8), labels, {"last": True}),
                ((rows,), labels != -100, {"ignore_index": None}),
            ]
            for shape, y, more in given:
                actual = _of_shape(case, student, teacher, y, shape, **options, **more)
                _check(case, *actual, *expected, **options)


@each([DIST])
def test_no_index_is_ignored(case: Case) -> None:
    student, teacher, _ = _inputs(9, 5, torch.float64, "all")
    labels = torch.full((9,), -100)
    expected = value_and_grad(case, student, teacher)
    actual = value_and_grad(case, student, teacher, target=labels, ignore_index=None)
    assert all(same_bits(a, b) for a, b in zip(actual, expected, strict=True))


@each([DIST], dtype=(torch.float32, torch.float16))
def test_labels_changed_between_the_passes(case: Case, dtype: torch.dtype) -> None:
    """The gradient is that of the labels when the loss was computed; they may be of inference
    mode."""
    generator = torch.Generator().manual_seed(1)
    student, teacher = torch.randn(2, 8, 5, generator=generator).to(dtype)
    given = torch.arange(8) - 3
    for labels in (given, given.to(torch.uint8), given > 0):
        expected = value_and_grad(case, student, teacher, target=labels, ignore_index=0)[1]
        with torch.inference_mode():
            cached = labels.clone()
        leaf = student.clone().requires_grad_()
        changed = labels.clone()
        losses = [case(leaf, teacher, target=y, ignore_index=0).mul(2.0) for y in (changed, cached)]
        changed.fill_(0)
        for loss in losses:
            for _ in range(2):
                (found,) = torch.autograd.grad(loss, leaf, retain_graph=True)
                torch.testing.assert_close(found, 2 * expected)


def test_transforms() -> None:
    """grad, jvp and vmap, of the labels too."""
    student, teacher, labels = _inputs(9, 5, torch.float64, "two of three")
    _, expected = value_and_grad(dist_loss, student, teacher, labels=labels)
    of = lambda s, y: dist_loss(s, teacher, labels=y)  # noqa: E731
    torch.testing.assert_close(torch.func.grad(of)(student, labels), expected)
    clean = student.nan_to_num()
    tangent = torch.ones_like(clean).cumsum(0)
    _, along = torch.func.jvp(lambda s: of(s, labels), (clean,), (tangent,))
    torch.testing.assert_close(along, (expected * tangent).sum())
    batch = torch.stack([labels, labels.roll(3)]), torch.stack([clean, clean.roll(3, 0)])
    teacher = teacher.nan_to_num(posinf=0.0)
    each_alone = torch.stack([torch.func.grad(of)(s, y) for y, s in zip(*batch, strict=True)])
    torch.testing.assert_close(torch.vmap(torch.func.grad(of))(batch[1], batch[0]), each_alone)


def test_one_graph_for_all_labels() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(DISTLoss(), fullgraph=True, backend=counter)
    for keep in ("two of three", "one", "none"):
        student, teacher, labels = _inputs(24, 7, torch.float64, keep)
        expected = value_and_grad(DISTLoss(), student, teacher, labels)
        actual = value_and_grad(compiled, student, teacher, labels)
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    assert counter.frame_count == 1


@pytest.mark.parametrize("backend", (None, "reference"))
def test_class_dim(backend: str | None) -> None:
    student, teacher, labels = _inputs(24, 7, torch.float64, "two of three")
    expected = value_and_grad(dist_loss, student, teacher, labels=labels, backend=backend)
    s, t = (x.view(2, 3, 4, 7).movedim(-1, 1).unsqueeze(-1) for x in (student, teacher))
    y = labels.view(2, 3, 4, 1)
    loss, slope = value_and_grad(dist_loss, s, t, labels=y, class_dim=1, backend=backend)
    torch.testing.assert_close(loss, expected[0])
    torch.testing.assert_close(slope[..., 0].movedim(1, -1).reshape(24, 7), expected[1])
    with pytest.raises(ValueError, match=r"^labels must be of shape \(2, 3, 4, 1\), got \(24,\)$"):
        dist_loss(s, t, labels=labels, class_dim=1)


def test_labels_are_only_a_mask() -> None:
    """Any class index counts; what is no mask is refused before anything runs."""
    student, teacher, labels = _inputs(9, 5, torch.float64, "all")
    far = dist_loss(student, teacher, labels=labels + 99)
    assert torch.equal(far, dist_loss(student, teacher))
    text = r"^labels must be integer class indices or a bool mask, got torch.float64$"
    with pytest.raises(TypeError, match=text):
        dist_loss(student, teacher, labels=labels.double())


def test_compiled_cuda_kernels_leave_it_to_others() -> None:
    other = torch.empty(0, device="meta")  # no CPU tensor, and Triton does not run it
    assert _dispatch.beside_cuda(DIST, other, None) == "reference"
    with pytest.raises(ValueError, match=r"got 'native': compiled CUDA kernels ignore no rows$"):
        _dispatch.beside_cuda(DIST, other, "native")

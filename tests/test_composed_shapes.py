"""Shapes: tokens, pooled embeddings, batches of nothing, channels of one value; parts compiled."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from batches import EMBEDDING, Call, batch, calls, graded, leaves, names
from torch import Tensor

from kdkernels import functional as K, nn
from kdkernels.losses import ClassCenters
from kdkernels.registry import SPECS

TOKENS = [SPECS[name] for name in ("attention", "iekd", "pkd", "hint")]
VECTORS = [spec for spec in EMBEDDING if any("embeddings" in name for name in names(spec))]


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@calls(TOKENS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=str)
def test_tokens_are_maps_with_channels_last(call: Call, dtype: torch.dtype) -> None:
    """(B, N, D) is (B, D, N, 1) read in place; the gradient has the tokens' shape."""
    maps = [draw(3, 5, 7, 1, seed=seed, dtype=dtype) for seed in range(len(batch(call.spec)))]
    tokens = [x.squeeze(3).mT for x in maps]
    for sample in call.spec.samples:
        loss, *gradients = graded(call, call.spec, tokens, **sample)
        expected, *others = graded(call, call.spec, maps, **sample)
        torch.testing.assert_close(loss, expected)
        for gradient, other, leaf in zip(gradients, others, tokens, strict=False):
            assert gradient.shape == leaf.shape and gradient.dtype == dtype
            torch.testing.assert_close(gradient, other.squeeze(3).mT, rtol=2e-3, atol=1e-6)


def test_attention_of_tokens_has_widths_of_its_own() -> None:
    student, teacher = draw(3, 7, 4), draw(3, 7, 9, seed=1)
    for backend in (None, "reference"):
        loss = K.attention_transfer_loss(student, teacher, backend=backend)
        q = [x.square().mean(2) for x in (student, teacher)]
        q = [x / x.norm(dim=1, keepdim=True) for x in q]
        torch.testing.assert_close(loss, (q[0] - q[1]).square().mean())


@calls(VECTORS)
def test_pooled_embeddings_are_flattened(call: Call) -> None:
    """What adaptive pooling returns, (B, C, 1, 1), is (B, C); the gradient keeps its shape."""
    tensors = batch(call.spec)
    expected = graded(call, call.spec, tensors)
    pooled = tuple(
        x[:, :, None, None] if "embeddings" in name else x
        for name, x in zip(names(call.spec), tensors, strict=True)
    )
    loss, *gradients = graded(call, call.spec, pooled)
    assert torch.equal(loss, expected[0])
    for gradient, flat, leaf in zip(gradients, expected[1:], pooled, strict=False):
        assert gradient.shape == leaf.shape and torch.equal(gradient.reshape(flat.shape), flat)


def test_parts_take_pooled_embeddings() -> None:
    embeddings, target = draw(12, 6), torch.arange(12) % 3
    pooled = embeddings[:, :, None, None]
    assert torch.equal(K.class_centers(pooled, target, 4), K.class_centers(embeddings, target, 4))
    assert torch.equal(K.semihard_tuples(pooled, target), K.semihard_tuples(embeddings, target))
    accumulated = ClassCenters(4, 6)
    accumulated.update(pooled, target)
    assert torch.equal(accumulated.centers(), K.class_centers(embeddings, target, 4))


@calls(EMBEDDING)
@pytest.mark.parametrize("reduction", ("mean", "sum"))
def test_no_samples(call: Call, reduction: str) -> None:
    """0, attached to the graph, with a gradient of no elements."""
    held = ("centers",)
    tensors = [
        x if name in held else x[:0]
        for name, x in zip(names(call.spec), batch(call.spec), strict=True)
    ]
    loss, *gradients = graded(call, call.spec, tensors, reduction=reduction)
    assert loss == 0
    assert [g.shape for g in gradients] == [x.shape for x in tensors[: leaves(call.spec)]]


@pytest.mark.parametrize("backend", (None, "reference"))
def test_pkd_of_small_batches(backend: str | None) -> None:
    """A channel of one value is constant: zeros, as for every constant channel."""
    for shapes in (((1, 4, 1, 1), (1, 4, 1, 1)), ((1, 1, 4), (1, 1, 4))):
        for size in (1.0, 1e30):
            tensors = [size * draw(*s, seed=i) for i, s in enumerate(shapes)]
            loss, gradient = graded(Call(SPECS["pkd"], backend), SPECS["pkd"], tensors)
            assert loss == 0 and gradient.shape == shapes[0] and not gradient.any()
    # A student of another size, resized to nothing and to one value a channel.
    student = draw(1, 4, 3, 3).requires_grad_()
    K.pkd_loss(student, draw(1, 4, 1, 1), backend=backend).backward()
    assert student.grad is not None and not student.grad.any()
    assert K.pkd_loss(draw(0, 4, 3, 3), draw(0, 4, 5, 5), backend=backend) == 0
    assert K.pkd_loss(draw(1, 4, 1, 1).fill_(torch.nan), draw(1, 4, 1, 1), backend=backend).isnan()


def refused(function: Any, text: str, *args: Tensor) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        function(*args)


def test_errors_spell_shapes() -> None:
    maps, tokens = draw(2, 16, 4, 5), draw(2, 6, 16)
    name = "teacher_features must be"
    pkd, attention = K.pkd_loss, K.attention_transfer_loss
    refused(pkd, f"{name} (2, 16, H, W), got shape (2, 8, 4, 5)", maps, draw(2, 8, 4, 5))
    refused(pkd, f"{name} (2, 16, H, W), got shape (2, 6, 16)", maps, tokens)
    refused(pkd, f"{name} (2, 6, 16), got shape (2, 7, 16)", tokens, draw(2, 7, 16))
    refused(pkd, f"{name} (2, 6, 16), got shape (2, 16, 6, 1)", tokens, draw(2, 16, 6, 1))
    refused(
        attention,
        f"{name} (2, C, 4, 5) (maps of another size: resize='bilinear'), got shape (2, 16, 5, 4)",
        maps,
        draw(2, 16, 5, 4),
    )
    refused(attention, f"{name} (2, 6, D), got shape (2, 5, 16)", tokens, draw(2, 5, 16))
    refused(attention, f"{name} (2, 6, D), got shape (2, 16, 6, 1)", tokens, draw(2, 16, 6, 1))
    name = "student_features must be (B, N, D) or (B, C, H, W), got shape"
    refused(pkd, f"{name} (2, 16)", draw(2, 16), draw(2, 16))
    refused(attention, f"{name} (2, 16)", draw(2, 16), draw(2, 16))
    name = "student_embeddings must be (B, D) or (B, C, H, W), got shape"
    refused(K.rkd_loss, f"{name} (2, 3, 4)", draw(2, 3, 4), draw(2, 3, 4))


@calls([spec for spec in TOKENS if spec.name != "hint"], interpreted=False)
def test_tokens_compile_without_a_break(call: Call) -> None:
    torch._dynamo.reset()
    tokens = [draw(3, 7, 5, seed=seed) for seed in range(len(batch(call.spec)))]
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for a, b in zip(
        graded(compiled, call.spec, tokens), graded(call, call.spec, tokens), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_parts_compile_without_a_break() -> None:
    """Also as they are used: centres of a batch, and the loss that takes them."""
    embeddings, target, logits = draw(12, 6), torch.arange(12) % 3, draw(12, 4, seed=1)

    def accumulated(e: Tensor, y: Tensor) -> Tensor:
        centers = ClassCenters(4, 6)
        centers.update(e, y)
        return centers.centers()

    def stage_2(e: Tensor, y: Tensor, z: Tensor) -> Tensor:
        return K.local_classifier_loss(z, e, K.class_centers(e, y, 4), y)

    maps = draw(2, 6, 3, 3), draw(2, 6, 3, 3, seed=1)
    for part, args in (
        (lambda e, y: K.class_centers(e, y, 4), (embeddings, target)),
        (lambda e, y: K.class_centers(e, y, 4), (embeddings.half(), target.int())),
        (accumulated, (embeddings, target)),
        (K.semihard_tuples, (embeddings, target)),
        (stage_2, (embeddings, target, logits)),
        (nn.reconstruction_loss, maps),
        (lambda x: nn.split_channels(x)[0], maps[:1]),
    ):
        torch._dynamo.reset()
        compiled = torch.compile(part, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*args), part(*args))


def test_centers_keep_the_precision_of_their_embeddings() -> None:
    embeddings, target = draw(12, 6, dtype=torch.float64), torch.arange(12) % 3
    sums = torch.stack([embeddings[target == k].sum(0) for k in range(4)])
    expected = torch.nn.functional.normalize(sums, dim=1)
    accumulated = ClassCenters(4, 6)
    for half in (slice(6), slice(6, 12)):
        accumulated.update(embeddings[half], target[half])
    for centers in (K.class_centers(embeddings, target, 4), accumulated.centers()):
        torch.testing.assert_close(centers, expected, rtol=1e-14, atol=1e-15)
    for dtype in (torch.float32, torch.bfloat16):
        assert K.class_centers(embeddings.to(dtype), target, 4).dtype == torch.float32
    leaf = embeddings.clone().requires_grad_()
    assert not K.class_centers(leaf, target, 4).requires_grad

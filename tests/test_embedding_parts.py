"""Relation and feature losses, and the module parts of ``kdkernels.nn``."""

from __future__ import annotations

import pytest
import torch
from test_embedding_laws import draw, gradients

from kdkernels import functional as K, nn
from kdkernels.registry import SPECS


@pytest.mark.parametrize("name", ("rkd", "attention", "hint", "pkd"))
@pytest.mark.parametrize("fill", (0.0, 1.5))
def test_constant_features_give_no_nan(name: str, fill: float) -> None:
    spec = SPECS[name]
    assert spec.inputs is not None
    student, teacher = spec.inputs(torch.Generator().manual_seed(0), torch.float32)
    flat = torch.full_like(student, fill).requires_grad_()
    for other in (teacher, torch.full_like(teacher, fill)):
        loss = spec.function(flat, other)
        assert loss.isfinite() and gradients(loss, flat)[0].isfinite().all()


@pytest.mark.parametrize("backend", (None, "reference"))
def test_an_infinite_loss_of_weight_zero_is_switched_off(backend: str | None) -> None:
    features, teacher = torch.zeros(2, 3, 4, 4), torch.full((2, 3, 4, 4), 3e38)
    assert K.hint_loss(features, teacher, backend=backend) == float("inf")
    assert K.hint_loss(features, teacher, loss_weight=0.0, backend=backend) == 0


def test_centers_made_in_inference_mode() -> None:
    with torch.inference_mode():
        centers = K.ClassCenters(2, 3)
    centers.update(torch.eye(3)[:2], torch.tensor([1, 0]))
    assert torch.equal(centers.centers(), torch.eye(3)[[1, 0]])


def test_relation_invariances() -> None:
    s, t = draw(7, 5), draw(7, 6)
    rotation = torch.linalg.qr(draw(5, 5, seed=4))[0]
    assert torch.allclose(K.rkd_loss(3 * s @ rotation + 5, t), K.rkd_loss(s, t))
    assert K.rkd_loss(s, 2 * s + 1) < 1e-12
    f, g = draw(3, 4, 5, 5), draw(3, 4, 5, 5, seed=1)
    assert torch.allclose(K.pkd_loss(2 * f + 3, g), K.pkd_loss(f, g), rtol=1e-5)
    assert torch.allclose(K.attention_transfer_loss(9 * f, g), K.attention_transfer_loss(f, g))
    assert K.pkd_loss(draw(3, 4, 3, 3), g).isfinite()  # another size is resized


def test_rkd_blocks_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    from kdkernels.reference import rkd

    s, t = draw(9, 5).requires_grad_(), draw(9, 6)
    whole = K.rkd_loss(s, t)
    expected = gradients(whole, s)[0]
    monkeypatch.setattr(rkd, "BLOCK", 200)
    blocks = K.rkd_loss(s, t)
    assert torch.allclose(blocks, whole) and torch.allclose(gradients(blocks, s)[0], expected)


def test_task_serialization_starts_as_the_identity() -> None:
    head, z = nn.TaskSerialization(6), draw(3, 6).float()
    assert torch.equal(head(z), z)
    assert {n: p.shape for n, p in head.named_parameters()} == {"weight": (6, 6), "bias": (6,)}


def test_split_channels() -> None:
    x = draw(2, 7, 3, 3)
    a, b = nn.split_channels(x)
    assert a.shape[1] == 4 and torch.equal(torch.cat([a, b], 1), x)
    assert a.data_ptr() == x.data_ptr()
    order = torch.tensor([6, 5, 4, 3, 2, 1, 0])
    a, b = nn.split_channels(x, 0.01, order)
    assert a.shape[1] == 1 and torch.equal(a[:, 0], x[:, 6]) and torch.equal(b[:, -1], x[:, 0])
    with pytest.raises(ValueError, match=r"ratio must be in \(0, 1\), got 1.0"):
        nn.split_channels(x, 1.0)
    with pytest.raises(ValueError, match=r"permutation must be of shape \(7,\), got"):
        nn.split_channels(x, permutation=order[1:])
    assert torch.equal(nn.split_channels(x, permutation=order.to(torch.int16))[0][:, 0], x[:, 6])
    with pytest.raises(ValueError, match="permutation must be each of the 7 channels once, got"):
        nn.split_channels(x, permutation=order // 2)
    for wrong in (order.tolist(), order.float()):
        with pytest.raises(TypeError, match=r"permutation must be .*channel indices, got"):
            nn.split_channels(x, permutation=wrong)  # type: ignore[arg-type]


def test_factor_coders() -> None:
    x = draw(2, 8, 5, 5).float()
    coder = nn.FactorAutoEncoder(8, 4)
    factor, back = coder(x)
    assert factor.shape == (2, 4, 5, 5) and back.shape == x.shape
    loss = nn.reconstruction_loss(x, back)
    assert torch.allclose(loss, (x - back).abs().mean())
    loss.backward()
    assert all(p.grad is not None for p in coder.parameters())
    assert nn.reconstruction_loss(x[:0], back[:0]) == 0
    with pytest.raises(TypeError, match="reconstruction must be a Tensor, got tuple"):
        nn.reconstruction_loss(x, (factor, back))  # type: ignore[arg-type]
    convs = [m for m in nn.FactorEncoder(6, 3) if isinstance(m, torch.nn.Conv2d)]
    assert [(c.in_channels, c.out_channels, c.bias) for c in convs] == [
        (6, 6, None), (6, 3, None), (3, 3, None),
    ]  # fmt: skip
    assert len(nn.FactorEncoder(4, 2)[:3]) == 3
    with pytest.raises(ValueError, match="out_channels must be >= 1, got 0"):
        nn.FactorEncoder(4, 0)
    assert nn.HintRegressor(6, 9)(draw(1, 6, 2, 2).float()).shape == (1, 9, 2, 2)


def test_iekd_recipe() -> None:
    """Split, encode, distil: a step lowers the inheritance distance."""
    torch.manual_seed(0)
    feature, teacher = torch.randn(4, 8, 6, 6), torch.randn(4, 3, 6, 6)
    inherit, explore = nn.FactorEncoder(4, 3), nn.FactorEncoder(4, 3)
    halves = nn.split_channels(feature)
    optimizer = torch.optim.SGD([*inherit.parameters(), *explore.parameters()], lr=0.05)
    values = []
    for _ in range(15):
        loss = K.iekd_loss(inherit(halves[0]), explore(halves[1]), teacher)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert values[-1] < values[0]

"""Mixed precision as it is used: autocast models, GradScaler, gradients that must not underflow."""

from __future__ import annotations

import torch
from cases import Case, each_emulated as each, reductions, value_and_grad
from inputs import make
from torch import Tensor, nn


def _model(case: Case) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 9)).to(case.device)


def _features(case: Case) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, 6, generator=generator).to(case.device)


@each(dtype={"bfloat16": torch.bfloat16, "float16": torch.float16}, shared=("dtype",))
def test_autocast(case: Case, dtype: torch.dtype) -> None:
    """Half logits from the model, a float32 loss from them, float32 gradients of the weights."""
    model = _model(case)
    _, teacher, target = make("gaussian", 8, 9, dtype=dtype, device=case.device)
    with torch.autocast(case.device, dtype):
        logits = model(_features(case))
        loss = case(logits, teacher, target)
    assert logits.dtype == dtype and loss.dtype == torch.float32
    outside = case(logits.detach(), teacher, target)
    assert torch.equal(loss.detach(), outside)  # autocast changes nothing inside the loss
    loss.backward()
    for parameter in model.parameters():
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32
        assert torch.isfinite(parameter.grad).all() and parameter.grad.any()


@each()
def test_gradscaler_skips_an_overflow_and_recovers(case: Case) -> None:
    model, features = _model(case), _features(case)
    _, teacher, target = make("gaussian", 8, 9, dtype=torch.float16, device=case.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    scaler = torch.amp.GradScaler(case.device, init_scale=2.0**8)
    losses = []
    for step in range(6):
        optimizer.zero_grad()
        with torch.autocast(case.device, torch.float16):
            logits = model(features * (1e30 if step == 2 else 1.0))
            loss = case(logits, teacher, target)
        before = [p.detach().clone() for p in model.parameters()]
        scale = scaler.get_scale()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        unchanged = all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        assert unchanged == (step == 2)
        assert (scaler.get_scale() < scale) == (step == 2)
        if step != 2:
            losses.append(loss.item())
    assert losses[-1] < losses[0]


@each(
    dtype={"float16": torch.float16, "bfloat16": torch.bfloat16},
    loss_scale=(1.0, 65536.0),
    shared=("dtype", "loss_scale"),
)
def test_small_gradients_survive_in_half_precision(
    case: Case, dtype: torch.dtype, loss_scale: float
) -> None:
    """Gradients that would underflow before the loss scale is applied arrive with it."""
    rows, classes = case.pick((512, 128), (16, 32))
    student, teacher, target = make("gaussian", rows, classes, dtype=dtype, device=case.device)
    reference = Case(case.spec, "reference", case.device)
    for reduction in reductions(case.spec):
        options = {"reduction": reduction}
        shape = (rows,) if reduction == "none" else ()
        one = torch.ones(shape, device=case.device)
        batch = (student.double(), teacher.double(), target)
        _, usual = value_and_grad(reference, *batch, upstream=one, **options)
        # The typical element is below float16's smallest number, and above it times the loss scale.
        options["loss_weight"] = 2.0**-25 / usual.abs().median().item()
        upstream = loss_scale * one
        _, gradient = value_and_grad(case, student, teacher, target, upstream=upstream, **options)
        _, truth = value_and_grad(reference, *batch, upstream=upstream, **options)
        smallest = torch.finfo(dtype).smallest_normal
        representable = truth.abs() > 4 * smallest
        if loss_scale > 1:
            assert representable.float().mean() > 0.3
        error = (gradient.double() - truth).abs()
        noise = 1e-6 * truth.abs().amax(-1, keepdim=True)
        bound = 2 * torch.finfo(dtype).eps * truth.abs() + noise + smallest * torch.finfo(dtype).eps
        wrong = ~(error <= bound)
        assert not wrong.any(), (error / bound).max()

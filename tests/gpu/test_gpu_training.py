"""As trainers use the losses: torch.compile, autocast with GradScaler, operators under opcheck."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import LOSSES, ROW_LOSSES, Case, value_and_grad
from gpu_support import DEVICE, REHEARSAL, each_case, inputs, needs_gpu, pick, shrink
from torch import Tensor

from kdkernels._dtypes import working_dtype

pytestmark = needs_gpu
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def close(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], dtype: Any = F32) -> None:
    """In the norm: a compiler may round the operations around the loss in another order."""
    bound = 1e-5 if dtype == F32 else 1e-2
    for a, b in zip(actual, expected, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype and torch.isfinite(a).all()
        error = (a.double() - b.double()).norm().item() / b.double().norm().item()
        assert error <= bound, f"{error:.2e} > {bound:.0e}"


@pytest.mark.parametrize("dtype", (F32, BF16), ids=str)
@each_case(LOSSES)
def test_compiled_in_one_graph(case: Case, dtype: torch.dtype) -> None:
    """Inductor, with operations before and after that it fuses and whose memory it reuses."""
    student, teacher, target = inputs(shrink((64, 1000)), dtype)

    def training(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return 3 * case(2 * s, t, y) + s.float().square().mean()

    backend = pick("inductor", "aot_eager")
    compiled = torch.compile(training, fullgraph=True, backend=backend)
    expected = value_and_grad(training, student, teacher, target)
    for _ in range(3):
        close(value_and_grad(compiled, student, teacher, target), expected, dtype)


@each_case(LOSSES, ["native"])
def test_compiled_with_cuda_graphs(case: Case) -> None:
    """mode="reduce-overhead": the operators inside CUDA graphs, with new data at each step."""
    how: dict[str, Any] = pick({"mode": "reduce-overhead"}, {"backend": "aot_eager"})
    compiled = torch.compile(lambda s, t, y: case(s, t, y) * 2, fullgraph=True, **how)
    for seed in range(5):
        student, teacher, target = inputs(shrink((64, 1000)), F32, seed=seed)
        torch.compiler.cudagraph_mark_step_begin()
        loss, gradient = value_and_grad(compiled, student, teacher, target)
        value, slope = value_and_grad(case, student, teacher, target)
        close((loss.clone(), gradient.clone()), (2 * value, 2 * slope))


@pytest.mark.parametrize("dtype", (F16, BF16), ids=str)
@each_case(LOSSES)
def test_autocast_and_grad_scaler(case: Case, dtype: torch.dtype) -> None:
    """Ten steps with a loss scale, one of which overflows: it is skipped, and training recovers."""
    torch.manual_seed(0)
    model = torch.nn.Linear(32, pick(1000, 20)).to(DEVICE)
    reference = torch.nn.Linear(32, pick(1000, 20)).to(DEVICE)
    reference.load_state_dict(model.state_dict())
    features = torch.randn(64, 32, device=DEVICE)
    _, teacher, target = inputs((64, pick(1000, 20)), dtype)
    oracle = Case(case.spec, "reference", case.device)
    histories = []
    for net, loss_of in ((model, case), (reference, oracle)):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
        scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**10, growth_interval=100)
        history, skipped = [], 0
        for turn in range(10):
            optimizer.zero_grad()
            with torch.autocast(DEVICE, dtype=dtype):
                loss = loss_of(net(features), teacher, target)
            factor = math.inf if turn == 4 else 1.0
            scaler.scale(loss * factor).backward()
            before = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            skipped += scaler.get_scale() < before
            history.append(loss.item())
        assert skipped == 1 and all(map(math.isfinite, history))
        assert history[-1] < history[0]
        histories.append(history)
    for mine, other in zip(*histories, strict=True):
        assert abs(mine - other) <= 2e-2 * abs(other) + 1e-4, histories


@each_case(ROW_LOSSES, ["native"])
def test_row_operators_pass_opcheck(case: Case) -> None:
    options = {"kd": [], "dkd": [1.0, 8.0], "aekt": [1.0, 8.0, 1.0, 10.0]}[case.spec.name]
    student, teacher, target = inputs((12, 40), F32)
    target[1] = -100
    of_rows = (target, None, None, torch.full((12,), 2.0, device=DEVICE))
    args = (*of_rows, case.spec.name, [2.0, 4.0, 0.0, *options], None, False, False, -100, 1)
    leaf = student.requires_grad_()
    operators = torch.ops.kdkernels
    for reduction in (0, 1, 2):
        for wanted in (True, False) if reduction else (False,):
            torch.library.opcheck(operators.row.default, (leaf, teacher, *args, reduction, wanted))
        shape = (12,) if reduction == 0 else ()
        upstream = torch.full(shape, 1.5, device=DEVICE, dtype=working_dtype(leaf, teacher))
        torch.library.opcheck(
            operators.row_backward.default, (upstream, student.detach(), teacher, *args, reduction)
        )


@each_case([spec for spec in LOSSES if not spec.by_row], ["native"])
def test_correlation_operators_pass_opcheck(case: Case) -> None:
    student, teacher, _ = inputs((12, 40), F32)
    args = (case.spec.name, [1.0, 1.0, 2.0, 1e-8], None, 1)
    operators = torch.ops.kdkernels
    upstream = torch.tensor(1.5, device=DEVICE)
    for reduction in (1, 2):
        torch.library.opcheck(
            operators.correlation.default,
            (student.clone().requires_grad_(), teacher, *args, reduction, True),
        )
        torch.library.opcheck(
            operators.correlation_backward.default, (upstream, student, teacher, *args, reduction)
        )


@each_case(LOSSES)
def test_inference_mode_and_deterministic_mode(case: Case) -> None:
    """Under deterministic algorithms torch fills empty tensors with NaN: nobody reads them."""
    student, teacher, target = inputs(shrink((64, 1000)), F32)
    expected = value_and_grad(case, student, teacher, target)
    torch.use_deterministic_algorithms(True)
    try:
        close(value_and_grad(case, student, teacher, target), expected)
    finally:
        torch.use_deterministic_algorithms(False)
    with torch.inference_mode():
        torch.testing.assert_close(case(student, teacher, target), expected[0])
    assert REHEARSAL or expected[0].is_cuda

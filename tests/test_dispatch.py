"""Which backend runs: the choice, requests that never fall back, and the reasons given."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cases import KERNELS, LOSS_IDS, LOSSES, Case, call, each
from inputs import make
from test_import import FORKS, USE, run
from torch import Tensor

import kdkernels
from kdkernels import _dispatch
from kdkernels._dispatch import BACKENDS, choose, use_backend, why_not
from kdkernels.registry import LossSpec

losses = pytest.mark.parametrize("spec", LOSSES, ids=LOSS_IDS)
CPU = torch.empty(0)


def _ran_kernels(loss: Tensor) -> bool:
    """Kernels may give the rows' values, of which torch operations make the loss."""
    seen, nodes = set(), [loss.grad_fn]
    while nodes:
        node = nodes.pop()
        if type(node).__name__.startswith("_Fused"):
            return True
        if node is not None and node not in seen:
            seen.add(node)
            nodes += [parent for parent, _ in node.next_functions]
    return False


@each()
def test_a_request_runs_that_backend(case: Case) -> None:
    student, teacher, target = make("gaussian", 3, 5, device=case.device)
    student.requires_grad_()
    assert _ran_kernels(case(student, teacher, target)) == (case.backend in KERNELS)
    with use_backend(case.backend):
        assert choose(case.spec, student, None) == case.backend
        by_context = call(case.spec, student, teacher, target)
        assert _ran_kernels(by_context) == (case.backend in KERNELS)
        other = "reference"  # the argument wins
        assert not _ran_kernels(call(case.spec, student, teacher, target, backend=other))
    assert _dispatch._requested is None


@losses
def test_the_first_able_backend_is_chosen(spec: LossSpec) -> None:
    able = [b for b in BACKENDS if not why_not(spec, b, CPU)]
    assert able[-1] == "reference"
    assert choose(spec, CPU, None) == able[0]


@losses
@pytest.mark.parametrize("backend", KERNELS)
def test_an_unable_backend_raises_with_its_reasons(spec: LossSpec, backend: str) -> None:
    """On a device that no kernel knows; the reference is never taken in its place."""
    student, teacher, target = (x.to("meta") for x in make("gaussian", 3, 5))
    reasons = why_not(spec, backend, student)
    assert reasons and all(isinstance(reason, str) and reason for reason in reasons)
    with pytest.raises(ValueError, match="backend must be able to run") as error:
        call(spec, student, teacher, target, backend=backend)
    assert all(reason in str(error.value) for reason in reasons)
    with use_backend(backend), pytest.raises(ValueError, match="backend must be able to run"):
        call(spec, student, teacher, target)
    assert why_not(spec, "reference", student) == []


@losses
def test_why_not_is_the_callers_own_list(spec: LossSpec) -> None:
    meta = torch.empty(0, device="meta")
    why_not(spec, "native", meta).clear()
    assert why_not(spec, "native", meta)


def test_use_backend_nests_and_restores() -> None:
    with use_backend("reference"):
        with use_backend(None):
            assert _dispatch._requested is None
        assert _dispatch._requested == "reference"
        with pytest.raises(ZeroDivisionError), use_backend("native"):
            1 / 0  # noqa: B018
        assert _dispatch._requested == "reference"
    assert _dispatch._requested is None
    with (
        pytest.raises(ValueError, match=r"backend must be 'native', .* got 'cuda'"),
        use_backend("cuda"),
    ):
        pass
    assert _dispatch._requested is None


def test_available_agrees_with_why_not() -> None:
    table = kdkernels.available("cpu")
    assert set(table) == set(_dispatch.SPECS)
    for name, row in table.items():
        assert list(row) == list(BACKENDS)
        assert all(row[b] == why_not(_dispatch.SPECS[name], b, CPU) for b in BACKENDS)
    assert table == kdkernels.available(torch.device("cpu"))


@losses
def test_a_loss_without_kernels_says_so(spec: LossSpec) -> None:
    import dataclasses

    plain = dataclasses.replace(spec, backends=("reference",))
    for backend in KERNELS:
        assert why_not(plain, backend, CPU) == [f"{spec.name} has no {backend} kernels"]


def test_the_environment_requests_a_backend(tmp_path: Path) -> None:
    run(
        USE
        + """
from kdkernels import _dispatch
use()
for spec in SPECS.values():
    assert _dispatch.choose(spec, torch.empty(0), None) == "reference"
with kdkernels.use_backend(None):
    assert _dispatch._requested is None
assert _dispatch._requested == "reference"
""",
        tmp_path,
        KDKERNELS_BACKEND="reference",
    )


def test_a_request_by_the_environment_never_falls_back(tmp_path: Path) -> None:
    code = f"""
def work():
    print("RUN")
    try:
        exec({USE!r} + "use()", dict())
    except ValueError as error:
        print(error)
forks(work, [
    {{"KDKERNELS_BACKEND": "native", "KDKERNELS_DISABLE_NATIVE": "1"}},
    {{"KDKERNELS_BACKEND": "triton"}},
    {{"KDKERNELS_BACKEND": "cuda"}},
    {{"KDKERNELS_BACKEND": ""}},
])
"""
    _, native, triton, unknown, empty = run(FORKS + code, tmp_path).split("RUN\n")
    assert "KDKERNELS_DISABLE_NATIVE is set" in native
    assert "TRITON_INTERPRET=1" in triton or "pip install triton" in triton
    assert "backend must be 'native', 'triton', 'reference' or None, got 'cuda'" in unknown
    assert empty == ""

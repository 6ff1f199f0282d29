"""Options of the suite, and the cases they select."""

from __future__ import annotations

import pytest
import torch

from kdkernels.registry import SPECS

from .contenders import CONTENDERS, KERNELS
from .machine import default_device
from .shapes import MODES, WORKLOADS

HALF_CONTENDERS = (*KERNELS, "floor")
"""In bfloat16 the kernels are compared with themselves in float32, at a few workloads."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("kdkernels benchmarks")
    group.addoption("--device", default=default_device(), help="cpu or cuda")
    group.addoption("--quick", action="store_true", help="a few workloads, forward + backward only")
    group.addoption("--budget", type=float, default=0.8, help="seconds of timing for each case")
    group.addoption("--with-reference", action="store_true", help="time the reference backend too")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "contender" not in metafunc.fixturenames:
        return
    option = metafunc.config.getoption
    quick = option("--quick", default=False)
    extra = ("reference",) if option("--with-reference", default=False) else ()
    # The contenders of a comparison are neighbours in time: they turn fastest.
    cases = [
        pytest.param(
            spec,
            workload,
            dtype,
            mode,
            name,
            id=f"{workload.name}-{str(dtype).removeprefix('torch.')}-{spec.name}-{mode}-{name}",
        )
        for workload in WORKLOADS
        if workload.quick or not quick
        for dtype in (torch.float32, torch.bfloat16)
        if dtype == torch.float32 or (workload.half and not quick)
        for spec in SPECS.values()
        if spec.family != "embedding"  # these take no logits: embedding_eager.py
        for mode in MODES
        if mode == "forward_backward" or not (quick or dtype != torch.float32)
        for name in ((*CONTENDERS, *extra) if dtype == torch.float32 else HALF_CONTENDERS)
    ]
    metafunc.parametrize(("spec", "workload", "dtype", "mode", "contender"), cases)

"""Options of the suite, and the cases they select."""

from __future__ import annotations

import pytest
import torch

from kdkernels.registry import SPECS, LossSpec

from . import contenders
from .contenders import KERNELS
from .machine import default_device
from .shapes import MODES, WORKLOADS, Workload, suits

HALF_CONTENDERS = (*KERNELS, "floor")
"""In bfloat16 the kernels are compared with themselves in float32, at a few workloads."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("kdkernels benchmarks")
    group.addoption("--device", default=default_device(), help="cpu or cuda")
    group.addoption("--quick", action="store_true", help="a few workloads, forward + backward only")
    group.addoption("--budget", type=float, default=0.4, help="seconds of timing for each case")
    group.addoption("--with-reference", action="store_true", help="time the reference backend too")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "contender" not in metafunc.fixturenames:
        return
    option = metafunc.config.getoption
    quick, device = option("--quick", default=False), option("--device", default="cpu")
    with_reference = option("--with-reference", default=False)

    def names(spec: LossSpec, workload: Workload) -> tuple[str, ...]:
        # An embedding loss whose kernels are for other devices runs its reference here.
        alone = workload.features and contenders.ours(spec, device) == "reference"
        usual = contenders.contenders(spec, workload)
        return (*usual, "reference") if with_reference or alone else usual

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
        if suits(workload, spec)
        for mode in MODES
        if mode == "forward_backward" or (workload.forward and not quick and dtype == torch.float32)
        for name in (HALF_CONTENDERS if dtype != torch.float32 else names(spec, workload))
    ]
    metafunc.parametrize(("spec", "workload", "dtype", "mode", "contender"), cases)

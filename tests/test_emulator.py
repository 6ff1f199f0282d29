"""The emulator that runs the CUDA kernels on the CPU: tests/emulator.

Its checks are a C++ program, tests/emulator/check_emulator.cpp; the rounding of its half-precision
formats is compared with torch's.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import check_programs
import numpy as np
import pytest
import torch

CHECKS = check_programs.names("check_emulator.cpp")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return check_programs.build(
        tmp_path_factory.mktemp("emulator"), "check_emulator.cpp", flags=("-DKDK_EMULATED",)
    )


@pytest.mark.parametrize("check", CHECKS)
def test_check(program: Path, check: str) -> None:
    check_programs.passes(program, check)


def test_every_check_is_listed(program: Path) -> None:
    assert check_programs.listed(program) == sorted(CHECKS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["f16", "bf16"])
def test_narrow_rounds_as_torch(program: Path, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    low, high = -(2**31), 2**31
    bits = torch.randint(low, high, (100_000,), generator=generator).to(torch.int32)
    # Every number of the format, and the points half way between neighbours, with theirs.
    exact = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).float().view(torch.int32)
    half = 0x1000 if dtype is torch.float16 else 0x8000
    near = [exact + offset for offset in (-1, 0, 1, half - 1, half, half + 1)]
    # Between the denormal numbers of float16 the half way points are other ones.
    denormal = (torch.arange(-4096, 4097) * 2.0**-26).float()
    beside = torch.nextafter(denormal, torch.tensor(torch.inf))
    x = torch.cat([bits.view(torch.float32), torch.cat(near).view(torch.float32), denormal, beside])
    x = x[~x.isnan()]  # every NaN is 0x7fff on the device, and in the check of conversions

    name = "f16" if dtype is torch.float16 else "bf16"
    out = subprocess.run(
        [program, "narrow", name], input=x.numpy().tobytes(), capture_output=True, check=True
    ).stdout
    ours = torch.from_numpy(np.frombuffer(out, dtype=np.int16).copy())
    theirs = x.to(dtype).view(torch.int16)
    wrong = (ours != theirs).nonzero().flatten()
    assert len(wrong) == 0, f"{len(wrong)} differ, first {x[wrong[0]].item().hex()}"

"""The emulator that runs the CUDA kernels on the CPU: tests/emulator.

Its checks are a C++ program, tests/emulator/check_emulator.cpp; the rounding of its half-precision
formats is compared with torch's.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "tests" / "emulator" / "check_emulator.cpp"
CHECKS = re.findall(r'^ +\{"(\w+)", \1\},$', SOURCE.read_text(), flags=re.MULTILINE)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("the emulator needs a C++ compiler: $CXX, or else g++")
    path = tmp_path_factory.mktemp("emulator") / "check_emulator"
    folders = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests' / 'emulator'}"]
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-DKDK_EMULATED"]
    command = [compiler, *flags, *folders, str(SOURCE), "-o", str(path)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return path


@pytest.mark.parametrize("check", CHECKS)
def test_check(program: Path, check: str) -> None:
    ran = subprocess.run([program, check], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, f"{ran.stdout}{ran.stderr}"


def test_every_check_is_listed(program: Path) -> None:
    assert subprocess.check_output([program], text=True).split() == sorted(CHECKS)


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

"""What csrc/cuda/runtime.cpp asks of CUDA, on a runtime without a GPU: tests/emulator/runtime.

Its checks are a C++ program, tests/emulator/check_runtime.cpp.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EMULATOR = ROOT / "tests" / "emulator"
CHECKS = re.findall(
    r'^ +\{"(\w+)", \1\},$', (EMULATOR / "check_runtime.cpp").read_text(), flags=re.MULTILINE
)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("the emulated runtime needs a C++ compiler: $CXX, or else g++")
    path = tmp_path_factory.mktemp("runtime") / "check_runtime"
    folders = [f"-I{ROOT / 'csrc'}", f"-I{EMULATOR / 'runtime'}"]
    sources = [str(EMULATOR / "check_runtime.cpp"), str(ROOT / "csrc" / "cuda" / "runtime.cpp")]
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", *folders]
    command = [compiler, *flags, *sources, "-o", str(path)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return path


@pytest.mark.parametrize("check", CHECKS)
def test_check(program: Path, check: str) -> None:
    ran = subprocess.run([program, check], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, f"{ran.stdout}{ran.stderr}"


def test_every_check_is_listed(program: Path) -> None:
    assert subprocess.check_output([program], text=True).split() == sorted(CHECKS)

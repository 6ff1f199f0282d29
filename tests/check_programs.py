"""C++ programs of checks on the emulator (tests/emulator/checks.h): names, building, running."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import cuda_emulator
import pytest

ROOT = Path(__file__).resolve().parents[1]
EMULATOR = ROOT / "tests" / "emulator"


def names(source: str) -> list[str]:
    """The checks that a program of ``tests/emulator`` lists."""
    return re.findall(r'^ +\{"(\w+)", \1\},$', (EMULATOR / source).read_text(), flags=re.MULTILINE)


def build(
    folder: Path, source: str, *others: Path, flags: tuple[str, ...] = (), include: Path = EMULATOR
) -> Path:
    """The program; ``include`` comes before the folder of all checks."""
    compiler = cuda_emulator.compiler()
    if compiler is None:
        pytest.skip("the emulator needs a C++ compiler: $CXX, or else g++ or clang++")
    program = folder / Path(source).stem
    folders = [f"-I{ROOT / 'csrc'}", f"-I{include}"]
    command = [compiler, "-std=c++17", "-O1", "-Wall", "-Wextra", *flags, *folders]
    command += [str(EMULATOR / source), *map(str, others), "-o", str(program)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return program


def passes(program: Path, check: str) -> None:
    ran = subprocess.run([program, check], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, f"{ran.stdout}{ran.stderr}"


def listed(program: Path) -> list[str]:
    return subprocess.check_output([program], text=True).split()

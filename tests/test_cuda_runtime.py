"""What csrc/cuda/runtime.cpp asks of CUDA, on a runtime without a GPU: tests/emulator/runtime.

Its checks are a C++ program, tests/emulator/check_runtime.cpp.
"""

from __future__ import annotations

from pathlib import Path

import check_programs
import pytest
from check_programs import EMULATOR, ROOT

CHECKS = check_programs.names("check_runtime.cpp")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return check_programs.build(
        tmp_path_factory.mktemp("runtime"), "check_runtime.cpp", ROOT / "csrc/cuda/runtime.cpp",
        include=EMULATOR / "runtime",
    )  # fmt: skip


@pytest.mark.parametrize("check", CHECKS)
def test_check(program: Path, check: str) -> None:
    check_programs.passes(program, check)


def test_every_check_is_listed(program: Path) -> None:
    assert check_programs.listed(program) == sorted(CHECKS)

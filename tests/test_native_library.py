"""The compiled library: one file for every torch from 2.10 on, so nothing of ATen or c10 in it."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from kdkernels import native
from kdkernels.registry import SPECS


@pytest.fixture
def library() -> str:
    module = native.extension()
    if module is None:
        pytest.skip(native.reason())
    assert module.__file__ is not None
    return module.__file__


def _binutils(tool: str, *arguments: str) -> list[str]:
    program = shutil.which(tool)
    if program is None:
        pytest.skip(f"{tool} (binutils) is not installed")
    command = [program, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()


def _undefined(library: str) -> list[str]:
    return _binutils("nm", "--dynamic", "--undefined-only", "--demangle", library)


def test_only_the_stable_abi_is_used(library: str) -> None:
    symbols = _undefined(library)
    assert any("aoti_torch" in s for s in symbols), "no symbol of the stable ABI: wrong file?"
    unstable = [s for s in symbols if re.search(r"\b(c10|at|caffe2|torch::(autograd|jit))::", s)]
    assert not unstable, f"symbols that change with torch's version: {unstable[:5]}"


def test_no_cuda_in_the_cpu_library(library: str) -> None:
    assert not [s for s in _undefined(library) if re.search(r"\bcu(da|Launch|blas)", s)]


def test_rules_are_those_of_the_registry(library: str) -> None:
    """A rule that no loss uses, or a loss that lost its rule, is a mistake in a build list."""
    module = native.extension()
    assert module is not None
    for family in {spec.rule_family for spec in SPECS.values()}:
        compiled = set(module.rules(family))
        wanted = {
            s.rule for s in SPECS.values() if s.rule_family == family and "native" in s.backends
        }
        assert compiled == wanted


# A kernel is compiled for several instruction sets. Of equal weak symbols (templates, inline
# functions) the linker keeps one for the whole library: were it the one of AVX-512, every machine
# without AVX-512 would stop at an illegal instruction, though it asked for nothing of the kind.


def _objects(library: str, sets: list[str]) -> list[tuple[Path, str]]:
    """The kernels' object files of the build that made this library, and their instruction sets."""
    root = Path(__file__).resolve().parent.parent
    for plan in root.glob("build/temp*/build.ninja"):
        if f"build {library}: link" in plan.read_text(encoding="utf-8"):
            named = ((path, path.stem.rpartition("_")[2]) for path in plan.parent.glob("*_*.o"))
            return [(path, name) for path, name in named if name in sets]
    return []


def test_objects_share_no_code_between_instruction_sets(library: str) -> None:
    module = native.extension()
    assert module is not None
    objects = _objects(library, module.cpu_capabilities())
    if not objects:
        pytest.skip("no object files of this library (python setup.py build_ext --inplace)")
    for path, instruction_set in objects:
        own = f"kdkernels::{instruction_set}::"
        lines = _binutils("nm", "--defined-only", "--demangle", str(path))
        functions = [line for line in lines if re.match(r"\w+ [TWi] ", line)]
        assert any(own in line for line in functions), f"{path.name} has no kernel: wrong file?"
        shared = [line for line in functions if own not in line]
        assert not shared, f"{path.name}, outside of {own} {shared[:5]}"


def test_wide_registers_stay_in_their_namespaces(library: str) -> None:
    """The same in the linked library, however it was built."""
    if not any("::avx512::" in s for s in _binutils("nm", "--defined-only", "--demangle", library)):
        pytest.skip("the library is stripped, or for an architecture without AVX-512")
    allowed: tuple[str, ...] = ()
    function, used, leaks = "", 0, []
    for line in _binutils("objdump", "-d", "--no-show-raw-insn", "--demangle", library):
        if line.endswith(">:"):
            function = line
            allowed = ("%ymm", "%zmm") if "::avx512::" in line else ()
            allowed = ("%ymm",) if "::avx2::" in line else allowed
        elif "%ymm" in line or "%zmm" in line:
            used += 1
            if not any(register in line for register in allowed):
                leaks.append(f"{function} {line.strip()}")
    assert used and not leaks, leaks[:5]

"""The rules on the CPU: the toy rules on its traversals, and all rules on single numbers.

``row_loss`` runs a rule of tests/rules as ``kdkernels._C`` runs the losses', on each instruction
set that the machine has; ``function`` and ``pointwise`` call rules and what they are made of,
without a traversal.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from cuda_emulator import ROOT, TOYS, build_facts, compiler, raise_error, row_call
from torch import Tensor

from kdkernels import native

BUILD = ROOT / "build" / "rules"
ROW_RULES = [
    name for name, family in build_facts().rules().items() if family in ("divergence", "decoupled")
]


def _setup() -> ModuleType:
    """setup.py, which knows the instruction sets."""
    specification = importlib.util.spec_from_file_location("kdkernels_setup", ROOT / "setup.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def _sets() -> dict[str, list[str]]:
    """The instruction sets with their flags, to the one that kdkernels chooses here: others would
    be a minute of compilation for nothing."""
    sets: dict[str, list[str]] = _setup().instruction_sets()
    extension = native.extension()
    last = extension.cpu_capability() if extension else None
    names = list(sets)[: list(sets).index(last) + 1] if last in sets else list(sets)
    return {name: sets[name] for name in names}


def ninja_file(target: Path) -> str:
    sets = _sets()
    csrc, tests = ROOT / "csrc", ROOT / "tests"
    flags = "-std=c++17 -O1 -fPIC -fvisibility=hidden -fno-math-errno -Wno-psabi"
    lines = [
        f"flags = {flags} -I{tests}/emulator",
        "rule compile",
        f"  command = {compiler()} $flags $extra -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {compiler()} -shared $in -o $out",
    ]
    objects = []

    def add(name: str, path: Path, *extra: str) -> None:
        objects.append(f"{name}.o")
        lines.extend([f"build {name}.o: compile {path}", f"  extra = {' '.join(extra)}"])

    toys = "'-DKDK_RULES(X)=" + " ".join(f"X({rule})" for rule in TOYS) + "'"
    isas = "'-DKDK_ISAS(rule)=" + " ".join(f"X(rule,{name})" for name in sets) + "'"
    files = [csrc / "rules" / f"{rule}.h" for rule in ROW_RULES]
    files += [tests / "rules" / f"{rule}.h" for rule in TOYS]
    every = "'-DKDK_RULES(X)=" + " ".join(f"X({path.stem})" for path in files) + "'"
    for name, isa_flags in sets.items():
        stages = csrc / "cpu" / "row_stages.cpp"
        add(f"row_stages_{name}", stages, *isa_flags, f"-DKDK_ISA={name}")
        for rule in TOYS:
            source = csrc / "cpu" / "rule.cpp"
            add(f"{rule}_{name}", source, *isa_flags, f"-DKDK_RULE={rule}", f"-DKDK_ISA={name}")
        included = [f"-include {path}" for path in files]
        source = tests / "rules" / "functions.cpp"
        # Products and sums are fused from -O2 on, as they are in the library.
        add(f"functions_{name}", source, "-O2", *isa_flags, f"-DKDK_ISA={name}", every, *included)
    for path in (
        csrc / "cpu" / "dispatch.cpp",
        csrc / "cpu" / "evaluate.cpp",
        tests / "rules/cpu.cpp",
    ):
        add(path.stem, path, toys, isas)
    return "\n".join([*lines, f"build {target}: link {' '.join(objects)}", f"default {target}", ""])


@functools.cache
def library() -> ctypes.CDLL:
    """Compiled if need be; one process compiles, others wait."""
    import fcntl

    BUILD.mkdir(parents=True, exist_ok=True)
    target = BUILD / "rules.so"
    with open(BUILD / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (BUILD / "build.ninja").write_text(ninja_file(target))
        command = [sys.executable, "-m", "ninja", "-C", str(BUILD), "-j", "2"]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(result.stdout + result.stderr)
    loaded = ctypes.CDLL(str(target))
    loaded.run_row.restype = loaded.supported.restype = ctypes.c_char_p
    return loaded


def instruction_sets() -> list[str]:
    """Those that the machine has, weakest first."""
    names: bytes = library().supported()
    return names.decode().split()


def row_loss(
    isa: str,
    rule: str,
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    *args: Any,
    **kw: Any,
) -> tuple[Tensor, Tensor | None]:
    """Loss and gradient; arguments as those of ``cuda_emulator.row_loss``."""
    call, loss, gradient = row_call(student, teacher, target, *args, **kw)
    raise_error(library().run_row(f"{rule}_{isa}".encode(), ctypes.byref(call)))
    return loss, gradient


def function(isa: str, name: str, x: Tensor, vector: bool) -> Tensor:
    """exp, expm1, log or log1p."""
    y = torch.empty_like(x)
    run = getattr(library(), f"function_{isa}")
    run.restype = ctypes.c_bool
    wide = x.dtype == torch.float64
    count = ctypes.c_int64(x.numel())
    assert run(
        name.encode(), wide, vector, count, *map(ctypes.c_void_p, (x.data_ptr(), y.data_ptr()))
    )
    return y


def pointwise(
    isa: str, rule: str, options: list[float], p: Tensor, q: Tensor, d: Tensor, vector: bool
) -> tuple[Tensor, Tensor]:
    """A rule's value and slope."""
    x = torch.stack([p, q, d])
    y = torch.empty_like(x[:2])
    run = getattr(library(), f"pointwise_{isa}")
    run.restype = ctypes.c_bool
    given = (ctypes.c_double * 4)(*options)
    count = ctypes.c_int64(p.numel())
    wide = x.dtype == torch.float64
    at = map(ctypes.c_void_p, (x.data_ptr(), y.data_ptr()))
    assert run(rule.encode(), given, wide, vector, count, *at)
    return y[0], y[1]

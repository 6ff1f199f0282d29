"""Build of the native extension ``kdkernels._C``; everything else is in pyproject.toml.

The extension is optional: without a C++ compiler, torch, pybind11 or ninja at build time the
installation succeeds as pure Python, and ``python -m kdkernels.info`` says what is missing. With
``KDKERNELS_NATIVE=1`` a build that fails is an error; with ``KDKERNELS_NATIVE=0`` none is tried.

Sources are found by name: each ``csrc/rules/*.h`` but ``math.h`` is a loss, compiled once for each
instruction set. A new loss edits nothing here.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
TORCH_TARGET = "2.10"
X86_FLAGS = {
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": [
        *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"),
        *("-mprefer-vector-width=512", "-Wno-uninitialized", "-Wno-maybe-uninitialized"),
    ],
}


def instruction_sets() -> dict[str, list[str]]:
    """Name and compiler flags of each instruction set of this architecture, weakest first."""
    sets: dict[str, list[str]] = {"baseline": []}
    if platform.machine().lower() in ("x86_64", "amd64"):
        sets |= X86_FLAGS
    return sets


def compiler() -> str | None:
    """The C++ compiler, or None."""
    named = os.environ.get("CXX")
    if named:
        return named if shutil.which(named.split()[0]) else None
    return next((name for name in ("g++", "clang++", "c++") if shutil.which(name)), None)


def missing() -> list[str]:
    """What the native build lacks here."""
    lacks = [name for name in ("torch", "pybind11") if importlib.util.find_spec(name) is None]
    if compiler() is None:
        lacks.append("a C++ compiler")
    if ninja() is None:
        lacks.append("ninja")
    if sys.platform == "win32":
        lacks.append("a GCC-compatible compiler (Windows is pure Python for now)")
    return lacks


def ninja() -> str | None:
    if importlib.util.find_spec("ninja") is not None:
        import ninja as package

        return str(Path(package.BIN_DIR) / "ninja")
    return shutil.which("ninja")


def target_macro() -> str:
    major, minor = (int(part) for part in TORCH_TARGET.split("."))
    return f"0x{major:02x}{minor:02x}000000000000"


class NinjaBuild(build_ext):
    """Writes a ninja file and runs it; falls back to pure Python unless KDKERNELS_NATIVE=1."""

    def run(self) -> None:
        wanted = os.environ.get("KDKERNELS_NATIVE", "")
        if wanted == "0":
            return
        lacks = missing()
        try:
            if lacks:
                raise RuntimeError("missing: " + ", ".join(lacks))
            self.build()
        except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
            if wanted == "1":
                raise
            print(f"kdkernels: installing without native kernels ({error})", file=sys.stderr)

    def build(self) -> None:
        directory = Path(self.build_temp).absolute()
        directory.mkdir(parents=True, exist_ok=True)
        output = Path(self.get_ext_fullpath("kdkernels._C")).absolute()
        output.parent.mkdir(parents=True, exist_ok=True)
        (directory / "build.ninja").write_text(ninja_file(output))
        command = [str(ninja()), "-C", str(directory)]
        if os.environ.get("MAX_JOBS"):
            command += ["-j", os.environ["MAX_JOBS"]]
        subprocess.run(command, check=True)

    def get_outputs(self) -> list[str]:
        output = self.get_ext_fullpath("kdkernels._C")
        return [output] if Path(output).exists() else []


def ninja_file(output: Path) -> str:
    """The build: one object for each (rule, instruction set), and the operators."""
    import pybind11
    import torch

    source = (ROOT / "csrc").absolute()
    torch_root = Path(torch.__file__).parent
    rules = sorted(path.stem for path in (source / "rules").glob("*.h") if path.stem != "math")
    sets = instruction_sets()
    sanitizer = os.environ.get("KDKERNELS_SANITIZE")
    flags = [
        *("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno"),
        *("-Wall", "-Wextra", "-Werror=return-type", "-Wno-psabi"),
        *([f"-fsanitize={sanitizer}", "-g", "-fno-omit-frame-pointer"] if sanitizer else []),
    ]
    includes = [torch_root / "include", pybind11.get_include(), sysconfig.get_path("include")]
    defines = [
        "-DTORCH_STABLE_ONLY",
        f"-DTORCH_TARGET_VERSION={target_macro()}",
        f'-DKDK_TORCH_TARGET=\\"{TORCH_TARGET}\\"',
        "'-DKDK_RULES(X)=" + " ".join(f"X({rule})" for rule in rules) + "'",
        "'-DKDK_ISAS(rule)=" + " ".join(f"X(rule,{name})" for name in sets) + "'",
    ]
    link = ["-shared", f"-L{torch_root / 'lib'}", "-ltorch_cpu"]
    if sys.platform == "darwin":
        link += ["-undefined", "dynamic_lookup"]
    if sanitizer:
        link += [f"-fsanitize={sanitizer}"]
    lines = [
        f"cxx = {compiler()}",
        f"flags = {' '.join(flags)}",
        f"host = {' '.join([*(f'-isystem {path}' for path in includes), *defines])}",
        "rule compile",
        "  command = $cxx $flags $extra -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = $out",
        "rule link",
        f"  command = $cxx $in {' '.join(link)} -o $out",
        "  description = $out",
    ]
    objects = []

    def add(name: str, path: Path, extra: str) -> None:
        objects.append(f"{name}.o")
        lines.extend([f"build {name}.o: compile {path}", f"  extra = {extra}"])

    for rule in rules:
        for name, isa_flags in sets.items():
            extra = [*isa_flags, f"-DKDK_RULE={rule}", f"-DKDK_ISA={name}"]
            add(f"{rule}_{name}", source / "cpu" / "rule.cpp", " ".join(extra))
    hosts = [*source.glob("*.cpp"), *(source / "cpu").glob("*.cpp")]
    for path in sorted(path for path in hosts if path.name != "rule.cpp"):
        add(path.stem, path, "$host")
    lines.append(f"build {output}: link {' '.join(objects)}")
    lines.append(f"default {output}\n")
    return "\n".join(lines)


setup(ext_modules=[Extension("kdkernels._C", [])], cmdclass={"build_ext": NinjaBuild})

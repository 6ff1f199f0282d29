"""Build of the native extensions ``kdkernels._C`` (CPU) and ``kdkernels._cuda``; everything else is
in pyproject.toml.

Both are optional: without a C++ compiler, torch, pybind11 or ninja at build time the installation
succeeds as pure Python, and ``python -m kdkernels.info`` says what is missing. With
``KDKERNELS_NATIVE=1`` a build that fails is an error; with ``KDKERNELS_NATIVE=0`` none is tried.
CUDA kernels are built where nvcc is found and torch has CUDA, and their failure leaves the CPU's
alone; ``KDKERNELS_CUDA=1`` and ``0`` likewise. csrc/cuda/build.py has the facts of that build.

Sources are found by name: each rule of ``csrc/rules`` is compiled once for each instruction set. A
new loss edits nothing here.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).absolute().parent
sys.path.insert(0, str(ROOT / "csrc" / "cuda"))
import build as cuda_build  # noqa: E402

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
        native, cuda = (os.environ.get(f"KDKERNELS_{name}", "") for name in ("NATIVE", "CUDA"))
        if native == "0":
            if cuda == "1":
                raise RuntimeError("KDKERNELS_CUDA must not be 1 where KDKERNELS_NATIVE is 0")
            return
        lacks = missing()
        try:
            if lacks:
                raise RuntimeError("missing: " + ", ".join(lacks))
            statements = [*preamble(), *cpu_statements(self.output("_C"))]
            extra, reason = ([], "") if cuda == "0" else self.cuda_statements()
            if reason and cuda == "1":
                raise RuntimeError(f"KDKERNELS_CUDA=1, but {reason}")
            self.ninja([*statements, *extra], self.output("_C"))
        except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
            if native == "1" or cuda == "1":
                raise
            print(f"kdkernels: installing without native kernels ({error})", file=sys.stderr)
            return
        if extra:
            try:
                self.ninja([*statements, *extra], self.output("_cuda"))
                return
            except (OSError, subprocess.CalledProcessError) as error:
                if cuda == "1":
                    raise
                reason = str(error)
        if cuda != "0":
            # A library of an older build would not agree with the rules and the Python of today.
            self.output("_cuda").unlink(missing_ok=True)
        if reason and torch_cuda() is not None:
            print(f"kdkernels: installing without CUDA kernels ({reason})", file=sys.stderr)

    def cuda_statements(self) -> tuple[list[str], str]:
        """The statements that make the CUDA library, or why it cannot be made here."""
        lacks = cuda_build.missing(torch_cuda())
        if lacks:
            return [], "missing: " + ", ".join(lacks)
        try:
            return cuda_statements(self.output("_cuda")), ""
        except (RuntimeError, OSError) as error:
            return [], str(error)

    def output(self, name: str) -> Path:
        return Path(self.get_ext_fullpath(f"kdkernels.{name}")).absolute()

    def ninja(self, statements: list[str], target: Path) -> None:
        directory = Path(self.build_temp).absolute()
        directory.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        (directory / "build.ninja").write_text("\n".join(statements))
        command = [str(ninja()), "-C", str(directory)]
        if os.environ.get("MAX_JOBS"):
            command += ["-j", os.environ["MAX_JOBS"]]
        subprocess.run([*command, str(target)], check=True)

    def get_outputs(self) -> list[str]:
        return [str(path) for path in map(self.output, ("_C", "_cuda")) if path.exists()]


def preamble(capture: str = "") -> list[str]:
    """How C++ is compiled, for both libraries; ``capture`` is what follows a command."""
    import pybind11
    import torch

    sanitizer = os.environ.get("KDKERNELS_SANITIZE")
    # Instrumented code that is inlined by force takes the compiler minutes.
    sanitize = [
        f"-fsanitize={sanitizer}",
        "-g",
        "-fno-omit-frame-pointer",
        "-DKDK_NO_FORCED_INLINE",
    ]
    flags = [
        *("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno"),
        *("-Wall", "-Wextra", "-Werror=return-type", "-Wno-psabi"),
        *(sanitize if sanitizer else []),
    ]
    torch_include = Path(torch.__file__).parent / "include"
    # pybind11 first: torch 2.11 has one of its own, which refuses TORCH_STABLE_ONLY.
    includes = [pybind11.get_include(), torch_include, sysconfig.get_path("include")]
    defines = [
        "-DTORCH_STABLE_ONLY",
        f"-DTORCH_TARGET_VERSION={target_macro()}",
        f'-DKDK_TORCH_TARGET=\\"{TORCH_TARGET}\\"',
        "'-DKDK_RULES(X)=" + " ".join(f"X({rule})" for rule in cuda_build.rules()) + "'",
        "'-DKDK_ISAS(rule)=" + " ".join(f"X(rule,{name})" for name in instruction_sets()) + "'",
    ]
    return [
        f"cxx = {compiler()}",
        f"flags = {' '.join(flags)}",
        f"host = {' '.join([*(f'-isystem {path}' for path in includes), *defines])}",
        "rule compile",
        f"  command = $cxx $flags $extra -MMD -MF $out.d -c $in -o $out{capture}",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = $out",
    ]


def cpu_statements(output: Path) -> list[str]:
    """kdkernels._C: one object for each (rule, instruction set), and the operators."""
    source = ROOT / "csrc"
    sanitizer = os.environ.get("KDKERNELS_SANITIZE")
    link = ["-shared", f"-L{torch_libraries()}", "-ltorch_cpu"]
    if sys.platform == "darwin":
        link += ["-undefined", "dynamic_lookup"]
    if sanitizer:
        link += [f"-fsanitize={sanitizer}"]
    lines = [
        "rule link",
        f"  command = $cxx $in {' '.join(link)} -o $out",
        "  description = $out",
    ]
    objects = []

    def add(name: str, path: Path, extra: str) -> None:
        objects.append(f"{name}.o")
        lines.extend([f"build {name}.o: compile {path}", f"  extra = {extra}"])

    for rule in cuda_build.rules():
        for name, isa_flags in instruction_sets().items():
            extra = [*isa_flags, f"-DKDK_RULE={rule}", f"-DKDK_ISA={name}"]
            add(f"{rule}_{name}", source / "cpu" / "rule.cpp", " ".join(extra))
    hosts = [*source.glob("*.cpp"), *(source / "cpu").glob("*.cpp")]
    # How the CUDA kernels are launched is plain arithmetic, which the tests try without CUDA.
    hosts += (source / "cuda").glob("plan*.cpp")
    for path in sorted(path for path in hosts if path.name != "rule.cpp"):
        add(path.stem, path, "$host")
    lines.append(f"build {output}: link {' '.join(objects)}\n")
    return lines


def cuda_statements(output: Path, extra: Sequence[str] = (), capture: str = "") -> list[str]:
    """kdkernels._cuda; ``extra`` flags of nvcc."""
    nvcc = cuda_build.find_nvcc()
    if nvcc is None:
        raise RuntimeError(f"missing: nvcc: {cuda_build.HOW_TO_GET}")
    tools = cuda_build.toolkit(nvcc)
    names = cuda_build.architectures(tools.architectures)
    sanitizer = os.environ.get("KDKERNELS_SANITIZE")
    return cuda_build.ninja_statements(
        output, torch_libraries(), tools, names, extra, capture, sanitizer
    )


def torch_cuda() -> str | None:
    """The version of CUDA that torch was built for, if it was."""
    import torch

    return torch.version.cuda


def torch_libraries() -> Path:
    import torch

    return Path(torch.__file__).parent / "lib"


if __name__ == "__main__":  # tests/gpu/compile.py imports this file for the statements
    setup(
        ext_modules=[Extension("kdkernels._C", [])],
        cmdclass={"build_ext": NinjaBuild},
    )

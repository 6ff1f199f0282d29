"""Build of the native extensions ``kdkernels._C`` (CPU) and ``kdkernels._cuda``; everything else is
in pyproject.toml.

Both are optional: where something that they need is missing, the installation succeeds as pure
Python, and ``python -m kdkernels.info`` says what. kdkernels/_toolchain.py finds torch and the
tools. With ``KDKERNELS_NATIVE=1`` a build that fails is an error; with ``KDKERNELS_NATIVE=0`` none
is tried. CUDA kernels are built where nvcc is found and torch has CUDA, and their failure leaves
the CPU's alone; ``KDKERNELS_CUDA=1`` and ``0`` likewise. csrc/cuda/build.py has the facts of that
build.

Sources are found by name: each rule of ``csrc/rules`` is compiled once for each instruction set. A
new loss edits nothing here.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools before 70, which is refused below, in words
    bdist_wheel = object

ROOT = Path(__file__).absolute().parent
sys.path.insert(0, str(ROOT / "csrc" / "cuda"))
import build as cuda_build  # noqa: E402

if TYPE_CHECKING:
    from kdkernels import _toolchain as toolchain
else:
    toolchain = cuda_build.toolchain

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


def target_macro() -> str:
    major, minor = toolchain.release(toolchain.OLDEST_TORCH)
    return f"0x{major:02x}{minor:02x}000000000000"


class NinjaBuild(build_ext):
    """Writes a ninja file and runs it; falls back to pure Python unless KDKERNELS_NATIVE=1."""

    def run(self) -> None:
        native, cuda = (os.environ.get(f"KDKERNELS_{name}", "") for name in ("NATIVE", "CUDA"))
        if native == "0":
            if cuda == "1":
                raise RuntimeError("KDKERNELS_CUDA must not be 1 where KDKERNELS_NATIVE is 0")
            self.without_kernels("KDKERNELS_NATIVE was 0")
            return
        self.note.unlink(missing_ok=True)
        lacks = [name for name, found in toolchain.needs().items() if not found]
        try:
            if lacks:
                raise RuntimeError("missing: " + ", ".join(lacks))
            statements = [*preamble(), *cpu_statements(self.output("_C"))]
            extra, reason = ([], "") if cuda == "0" else self.cuda_statements()
            if reason and cuda == "1":
                raise RuntimeError(f"KDKERNELS_CUDA=1, but {reason}")
            self.ninja([*statements, *extra], self.output("_C"), "CPU kernels")
        except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
            if native == "1" or cuda == "1":
                raise
            failed = isinstance(error, subprocess.CalledProcessError)
            self.without_kernels("the compiler failed; pip -v shows why" if failed else str(error))
            return
        if extra:
            try:
                self.ninja([*statements, *extra], self.output("_cuda"), "CUDA kernels")
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

    def without_kernels(self, reason: str) -> None:
        """Leave no library of an older build, and the reason for ``python -m kdkernels.info``."""
        for name in ("_C", "_cuda"):
            self.output(name).unlink(missing_ok=True)
        self.note.parent.mkdir(parents=True, exist_ok=True)
        self.note.write_text(reason + "\n", encoding="utf-8")
        print(f"kdkernels: installing without native kernels ({reason})", file=sys.stderr)

    @property
    def note(self) -> Path:
        return self.output("_C").with_name(toolchain.WITHOUT_KERNELS)

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

    def ninja(self, statements: list[str], target: Path, what: str) -> None:
        """Make a library, and say what that took."""
        start = time.monotonic()
        directory = Path(self.build_temp).absolute()
        directory.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        (directory / "build.ninja").write_text("\n".join(statements))
        command = [str(toolchain.ninja()), "-C", str(directory)]
        if os.environ.get("MAX_JOBS"):
            command += ["-j", os.environ["MAX_JOBS"]]
        subprocess.run([*command, str(target)], check=True)
        seconds, megabytes = time.monotonic() - start, target.stat().st_size / 1e6
        print(f"kdkernels: {what}: {seconds:.0f} s, {megabytes:.1f} MB", flush=True)

    def made(self) -> list[str]:
        return [str(path) for path in map(self.output, ("_C", "_cuda")) if path.exists()]

    def get_outputs(self) -> list[str]:
        return [*self.made(), *([str(self.note)] if self.note.exists() else [])]


class Wheel(bdist_wheel):
    """A wheel without libraries is for every Python and platform, and says so in its name."""

    def run(self) -> None:
        self.run_command("build")
        if not self.get_finalized_command("build_ext").made():
            self.root_is_pure = True
            self.distribution.ext_modules = None
        super().run()


def preamble(capture: str = "") -> list[str]:
    """How C++ is compiled, for both libraries; ``capture`` is what follows a command."""
    sanitizer = os.environ.get("KDKERNELS_SANITIZE")
    # Instrumented code that is inlined by force takes the compiler minutes.
    sanitize = [
        f"-fsanitize={sanitizer}",
        "-g",
        "-fno-omit-frame-pointer",
        "-DKDK_NO_FORCED_INLINE",
    ]
    flags = [
        # Instrumented code takes the compiler three times as long to optimise in full.
        *("-std=c++17", "-O1" if sanitizer else "-O3", "-fPIC", "-fvisibility=hidden"),
        "-fno-math-errno",
        *("-Wall", "-Wextra", "-Werror=return-type", "-Wno-psabi"),
        *(sanitize if sanitizer else []),
    ]
    # pybind11 first: torch 2.11 has one of its own, which refuses TORCH_STABLE_ONLY.
    includes = [toolchain.pybind11(), torch().include, sysconfig.get_path("include")]
    defines = [
        "-DTORCH_STABLE_ONLY",
        f"-DTORCH_TARGET_VERSION={target_macro()}",
        f'-DKDK_TORCH_TARGET=\\"{toolchain.OLDEST_TORCH}\\"',
        "'-DKDK_RULES(X)=" + " ".join(f"X({rule})" for rule in cuda_build.rules()) + "'",
        "'-DKDK_ISAS(rule)=" + " ".join(f"X(rule,{name})" for name in instruction_sets()) + "'",
    ]
    return [
        f"cxx = {toolchain.compiler()}",
        f"flags = {' '.join(flags)}",
        f"host = {' '.join([*(f'-isystem {path}' for path in includes), *defines])}",
        "rule compile",
        f"  command = $cxx $flags $extra -MMD -MF $out.d -c $in -o $out{capture}",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = $out",
    ]


def cpu_statements(output: Path) -> list[str]:
    """kdkernels._C: the rules and the stages that they share, by instruction set; the operators."""
    source = ROOT / "csrc"
    sanitizer = os.environ.get("KDKERNELS_SANITIZE")
    link = ["-shared", f"-L{torch().libraries}", "-ltorch_cpu"]
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

    of_sets = stages, of_rule = [source / "cpu" / name for name in ("row_stages.cpp", "rule.cpp")]
    for name, isa_flags in instruction_sets().items():
        extra = " ".join([*isa_flags, f"-DKDK_ISA={name}"])
        add(f"row_stages_{name}", stages, extra)
        for rule in cuda_build.rules():
            add(f"{rule}_{name}", of_rule, f"{extra} -DKDK_RULE={rule}")
    hosts = [*source.glob("*.cpp"), *(source / "cpu").glob("*.cpp")]
    # How the CUDA kernels are launched is plain arithmetic, which the tests try without CUDA.
    hosts += (source / "cuda").glob("plan*.cpp")
    for path in sorted(path for path in hosts if path not in of_sets):
        add(path.stem, path, "$host")
    lines.append(f"build {output}: link {' '.join(objects)}\n")
    return lines


def cuda_statements(output: Path, extra: Sequence[str] = (), capture: str = "") -> list[str]:
    """kdkernels._cuda; ``extra`` flags of nvcc."""
    nvcc = cuda_build.find_nvcc()
    if nvcc is None:
        raise RuntimeError(f"missing: nvcc: {cuda_build.HOW_TO_GET}")
    tools = cuda_build.toolkit(nvcc)
    ahead = cuda_build.ahead_of_torch(tools.version, torch().cuda)
    if ahead:
        print(f"kdkernels: {ahead}", file=sys.stderr)
    names = cuda_build.architectures(tools.architectures)
    print(f"kdkernels: CUDA kernels for {' '.join(names)}", flush=True)
    sanitizer = os.environ.get("KDKERNELS_SANITIZE")
    return cuda_build.ninja_statements(
        output, torch().libraries, tools, names, extra, capture, sanitizer
    )


def torch() -> toolchain.Torch:
    found = toolchain.find_torch()
    if found is None:
        raise RuntimeError(f"missing: torch {toolchain.OLDEST_TORCH} or newer")
    return found


def torch_cuda() -> str | None:
    """The version of CUDA that torch was built for, if it was."""
    return torch().cuda


def refuse_old_setuptools() -> None:
    """Older ones stop at pyproject.toml's license, in words that name neither."""
    found, new = toolchain.setuptools()
    if not new:
        sys.exit(
            f"kdkernels: setuptools must be {toolchain.OLDEST_SETUPTOOLS} or newer, got {found}: "
            f"{sys.executable} -m pip install 'setuptools>={toolchain.OLDEST_SETUPTOOLS}'"
        )


if __name__ == "__main__":  # tests/gpu/compile.py imports this file for the statements
    refuse_old_setuptools()
    setup(
        ext_modules=[Extension("kdkernels._C", [])],
        cmdclass={"build_ext": NinjaBuild, "bdist_wheel": Wheel},
    )

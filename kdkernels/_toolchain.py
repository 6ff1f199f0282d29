"""What a build of the compiled extensions needs, and where it lies.

setup.py and ``python -m kdkernels.info`` both ask here, so that they agree. Only the standard
library: setup.py runs this file by its path, before the package can be imported.

Torch is found, never imported or fetched: its headers and libraries are used by path. The isolated
environment that pip and others build in holds no torch, so the interpreters outside are asked.
``KDKERNELS_TORCH`` names the folder of a torch (``torch.__path__[0]``) where all of that fails.
"""

from __future__ import annotations

import ast
import functools
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

OLDEST_TORCH = "2.10"
"""The stable ABI that the extensions are compiled for; they load in every later torch."""

OLDEST_TRITON = "3.6"

OLDEST_SETUPTOOLS = "77"
"""The first that reads pyproject.toml's license."""

COMPILERS = ("g++", "clang++", "c++", f"{platform.machine()}-conda-linux-gnu-c++")

WITHOUT_KERNELS = "_without_kernels.txt"
"""Lies where ``_C`` would, and says why the build has made none."""

HOW_TO_GET_NVCC = (
    "install a CUDA toolkit of version 12 or newer (https://developer.nvidia.com/cuda-downloads, "
    "or conda's cuda-nvcc and cuda-cudart-dev) and put its bin folder on PATH, or set CUDA_HOME"
)


class Torch(NamedTuple):
    """An installed torch, read from its files."""

    folder: Path
    version: str
    cuda: str | None
    """The version of CUDA that it was built for, if it was."""

    @property
    def include(self) -> Path:
        return self.folder / "include"

    @property
    def libraries(self) -> Path:
        return self.folder / "lib"


def release(version: str) -> tuple[int, ...]:
    """``2.13.0+cpu`` is (2, 13, 0)."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in match[0].split(".")) if match else ()


# Torch.


def read_torch(folder: Path) -> Torch | None:
    """The torch in a folder, or None."""
    try:
        text = (folder / "version.py").read_text(encoding="utf-8")
    except OSError:
        return None
    facts = {}
    for statement in ast.parse(text).body:
        if isinstance(statement, ast.Assign | ast.AnnAssign):
            name = statement.targets[0] if isinstance(statement, ast.Assign) else statement.target
            if isinstance(name, ast.Name) and isinstance(statement.value, ast.Constant):
                facts[name.id] = statement.value.value
    if not facts.get("__version__") or not (folder / "include").is_dir():
        return None
    cuda = facts.get("cuda")
    return Torch(folder, str(facts["__version__"]), str(cuda) if cuda else None)


@functools.cache
def find_torch() -> Torch | None:
    """The torch to compile against: of KDKERNELS_TORCH, of this process, of those outside."""
    named = os.environ.get("KDKERNELS_TORCH")
    if named:
        found = read_torch(Path(named))
        if found is None:
            raise RuntimeError(
                f"KDKERNELS_TORCH must be the folder of an installed torch, got {named!r}"
            )
        return found
    candidates = (folder for folder in _torch_folders() if folder is not None)
    return next((torch for torch in map(read_torch, candidates) if torch is not None), None)


def _torch_folders() -> Iterator[Path | None]:
    spec = importlib.util.find_spec("torch")
    if spec is not None:
        yield from map(Path, spec.submodule_search_locations or ())
    for interpreter in dict.fromkeys(_interpreters()):
        yield _torch_of(interpreter)


def _torch_of(interpreter: str) -> Path | None:
    """Where another interpreter would import torch from, without the paths of an isolated build."""
    code = "import importlib.util as u; s = u.find_spec('torch'); print(s.origin if s else '')"
    hidden = ("PYTHONPATH", "PYTHONNOUSERSITE")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    try:
        done = subprocess.run(
            [interpreter, "-c", code],
            cwd=sys.prefix,  # the current folder is on that interpreter's path
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    origin = done.stdout.strip()
    return Path(origin).parent if origin else None


def _interpreters() -> Iterator[str]:
    """Interpreters whose torch is meant: pip builds with the environment's own, hiding its
    packages; ``python -m build`` and uv build in a new environment, below the one that is meant."""
    yield sys.executable
    parent = Path(f"/proc/{os.getppid()}")
    try:
        arguments = (parent / "cmdline").read_text(encoding="utf-8").split("\0")
        pairs = (parent / "environ").read_text(encoding="utf-8").split("\0")
        folder = (parent / "cwd").readlink()
    except (OSError, UnicodeDecodeError):  # no Linux, or another user's
        arguments, pairs, folder = [], [], Path.cwd()
    environment = dict(pair.split("=", 1) for pair in pairs if "=" in pair) or dict(os.environ)
    if arguments and Path(arguments[0]).name.startswith("python"):
        frontend = arguments[0]
        if os.sep in frontend:
            yield str(folder / frontend)
        else:
            yield shutil.which(frontend, path=environment.get("PATH")) or sys.executable
    for root in (environment.get("VIRTUAL_ENV"), environment.get("CONDA_PREFIX"), ".venv"):
        interpreter = folder / (root or "") / "bin" / "python"
        if root and interpreter.exists():
            yield str(interpreter)


# The other tools.


def compiler(environment: Mapping[str, str] = os.environ) -> str | None:
    """The command that compiles C++: ``$CXX``, else the first one on the path; or None."""
    path = environment.get("PATH", "")
    named = environment.get("CXX")
    if named:
        return named if shutil.which(named.split()[0], path=path) else None
    return next((name for name in COMPILERS if shutil.which(name, path=path)), None)


def ninja() -> str | None:
    if importlib.util.find_spec("ninja") is not None:
        import ninja as package

        return str(Path(package.BIN_DIR) / "ninja")
    return shutil.which("ninja")


def pybind11() -> str | None:
    """The folder of pybind11's headers."""
    if importlib.util.find_spec("pybind11") is None:
        return None
    import pybind11 as package

    return str(package.get_include())


def python_headers() -> str | None:
    """The folder of Python.h, which Linux distributions package apart."""
    folder = sysconfig.get_path("include")
    return folder if (Path(folder) / "Python.h").is_file() else None


def find_nvcc(environment: Mapping[str, str] = os.environ) -> str | None:
    """CUDA's compiler: of CUDA_HOME or CUDA_PATH, on PATH, beside torch, of the usual place."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if environment.get(variable):
            named = Path(environment[variable]) / "bin" / "nvcc"
            return str(named) if os.access(named, os.X_OK) else None
    found = shutil.which("nvcc", path=environment.get("PATH"))
    if found:
        return found
    torch = find_torch()
    # Where NVIDIA's Python packages put it, from CUDA 13 on.
    packages = sorted(torch.folder.parent.glob("nvidia/cu*/bin/nvcc")) if torch else []
    for path in (*packages, Path("/usr/local/cuda/bin/nvcc")):
        if os.access(path, os.X_OK):
            return str(path)
    return None


def needs() -> dict[str, str]:
    """What a build of the CPU kernels needs, and what is here of it; empty where it is missing."""
    torch, command = find_torch(), compiler()
    found = f"{torch.version}, {torch.folder}" if torch else ""
    if torch and release(torch.version) < release(OLDEST_TORCH):
        found = ""
    return {
        f"torch {OLDEST_TORCH} or newer": found,
        "a C++ compiler": "" if sys.platform == "win32" else command or "",
        "Python.h": python_headers() or "",
        "ninja": ninja() or "",
        "pybind11": pybind11() or "",
    }


def setuptools() -> tuple[str, bool]:
    """Its version, and whether it reads pyproject.toml."""
    found = version("setuptools") or "none"
    return found, release(found) >= release(OLDEST_SETUPTOOLS)


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def why_without_kernels() -> str:
    """What the build said where it made no ``_C``; empty if nothing."""
    try:
        return (Path(__file__).parent / WITHOUT_KERNELS).read_text(encoding="utf-8").strip()
    except OSError:
        return ""

"""The commands that bring what is missing, each to be pasted as it is; no torch is needed here."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import shlex
import shutil
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import unquote, urlparse

from . import _toolchain


def remedy(need: str) -> str:
    """The command that brings one of ``_toolchain.needs()``."""
    if need == "a C++ compiler":
        return _compiler_command()
    if need == "Python.h":
        return _headers_command()
    return pip_install(need.replace(" ", ">=", 1).removesuffix(" or newer"))


def nvcc(cuda: str | None) -> str:
    """For torch's version of CUDA; NVIDIA's Python packages have one folder from CUDA 13 on."""
    if cuda is not None and _toolchain.release(cuda) >= (13,):
        return pip_install(f"cuda-toolkit[nvcc,cccl]=={cuda}.*")
    return _toolchain.HOW_TO_GET_NVCC


def triton() -> str:
    """The one that torch asks for, if it does."""
    if platform.system() != "Linux" or platform.machine() not in ("x86_64", "aarch64"):
        return "there is none for this platform"
    wanted = (line.partition(";")[0] for line in importlib.metadata.requires("torch") or ())
    exact = next((line for line in wanted if line.startswith("triton")), None)
    return pip_install((exact or f"triton>={_toolchain.OLDEST_TRITON}").replace(" ", ""))


def torch_needed(found: str) -> str:
    need = f"torch {_toolchain.OLDEST_TORCH} or newer"
    return f"kdkernels needs {need}, and {sys.executable} has {found}; install it: {remedy(need)}"


def pip_install(*arguments: str) -> str:
    """The command that installs into this environment, whichever is active in the shell."""
    if importlib.util.find_spec("pip") is None and shutil.which("uv"):
        return shlex.join(["uv", "pip", "install", "--python", sys.executable, *arguments])
    managed = Path(sysconfig.get_path("stdlib")) / "EXTERNALLY-MANAGED"
    allowed = sys.prefix == sys.base_prefix and managed.exists()
    options = ["--break-system-packages"] if allowed else []
    command = shlex.join([sys.executable, "-m", "pip", "install", *options, *arguments])
    if importlib.util.find_spec("pip") is None:
        command = shlex.join([sys.executable, "-m", "ensurepip"]) + " && " + command
    return command


def build_command() -> str:
    """The command that compiles the extension: in place in a checkout, else a reinstallation."""
    root = Path(__file__).resolve().parent.parent
    if (root / "csrc").is_dir() and (root / "pyproject.toml").is_file():
        return pip_install("--no-build-isolation", "-e", str(root))
    options = ["--no-build-isolation", "--force-reinstall", "--no-deps"]
    source = _installed_from()
    if source is None:  # from an index, which may hold a wheel without kernels
        return pip_install(*options, "--no-cache-dir", "--no-binary", "kdkernels", "kdkernels")
    return pip_install(*options, source)


def _installed_from() -> str | None:
    """The folder, archive or repository that pip has noted; None for an index."""
    try:
        text = importlib.metadata.distribution("kdkernels").read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        return None
    if not text:
        return None
    noted = json.loads(text)
    url: str = noted["url"]
    if "vcs_info" in noted:
        return f"{noted['vcs_info']['vcs']}+{url}@{noted['vcs_info']['commit_id']}"
    if urlparse(url).scheme == "file":
        return unquote(urlparse(url).path)
    return url


def _system_command(packages: Mapping[str, str]) -> str:
    """The command of the first package manager that is here and that this user may run."""
    root = os.geteuid() == 0 if hasattr(os, "geteuid") else False
    sudo = "" if root else "sudo "
    updates = {"apt-get": f"{sudo}apt-get update && "}
    for manager, command in packages.items():
        own = manager in ("conda", "xcode-select")
        if shutil.which(manager) and (own or root or shutil.which("sudo")):
            return updates.get(manager, "") + ("" if own else sudo) + command
    return packages["conda"]


def _compiler_command() -> str:
    return _system_command(
        {
            "xcode-select": "xcode-select --install",
            "apt-get": "apt-get install -y g++",
            "dnf": "dnf install -y gcc-c++",
            "apk": "apk add g++",
            "conda": "conda install -y -c conda-forge cxx-compiler",
        }
    )


def _headers_command() -> str:
    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    return _system_command(
        {
            "apt-get": f"apt-get install -y {name}-dev",
            "dnf": f"dnf install -y {name}-devel",
            "apk": "apk add python3-dev",
            "conda": f"conda install -y -c conda-forge python={name.removeprefix('python')}",
        }
    )

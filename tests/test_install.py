"""What is missing is named, with a command that brings it; a library of another copy too."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from kdkernels import _remedies, _toolchain, info, native

ROOT = Path(__file__).resolve().parents[1]
NEEDS = tuple(_toolchain.needs())


# What is missing.


def _without(monkeypatch: pytest.MonkeyPatch, *modules: str) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name in modules else find(name, *a)
    )


def _report(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(native, "extension", lambda device_type="cpu": None)
    monkeypatch.setattr(native, "reason", lambda device_type="cpu": "it did not load")
    monkeypatch.delenv("KDKERNELS_DISABLE_NATIVE", raising=False)
    return "\n".join(info.lines(info.info()))


def _take_away(monkeypatch: pytest.MonkeyPatch, need: str) -> None:
    name = need.split()[0]
    if name == "a":  # C++ compiler
        monkeypatch.setenv("CXX", "/nowhere/c++")
    elif name == "Python.h":
        monkeypatch.setattr(sysconfig, "get_path", lambda *a, **k: "/nowhere")
    elif name == "setuptools":
        monkeypatch.setattr(_toolchain, "version", lambda package: "65.5.0")
    elif name == "torch":
        monkeypatch.setattr(_toolchain, "find_torch", lambda: None)
    elif name == "nvcc":
        monkeypatch.setattr(_toolchain, "find_nvcc", lambda: None)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
    else:
        monkeypatch.setenv("PATH", "/nowhere")
        _without(monkeypatch, name)


@pytest.mark.parametrize("need", [*NEEDS, "setuptools 77 or newer"])
def test_what_a_build_lacks_is_named_with_its_remedy(
    monkeypatch: pytest.MonkeyPatch, need: str
) -> None:
    assert f"{need} " in _report(monkeypatch)
    _take_away(monkeypatch, need)
    text = _report(monkeypatch)
    (line,) = re.findall(rf"^  {re.escape(need)} +missing; (.*)$", text, re.MULTILINE)
    assert line == _remedies.remedy(need)
    steps = re.findall(r"^  to add it: (.*)$", text, re.MULTILINE)
    assert line in steps and steps[-1] == _remedies.build_command()
    assert "install" in line and need.split()[0] not in ("missing",)


@pytest.mark.parametrize(("name", "package"), [("nvcc", "cuda-toolkit"), ("triton", "triton")])
def test_what_only_gpus_need_is_named_but_is_no_step(
    monkeypatch: pytest.MonkeyPatch, name: str, package: str
) -> None:
    _take_away(monkeypatch, name)
    text = _report(monkeypatch)
    (line,) = re.findall(rf"^  {name} +missing; (.*)$", text, re.MULTILINE)
    assert package in line
    assert not [s for s in re.findall(r"to add it: (.*)", text) if package in s]


def test_info_says_how_to_enable_what_is_disabled(monkeypatch: pytest.MonkeyPatch) -> None:
    _report(monkeypatch)  # without the extension
    monkeypatch.setenv("KDKERNELS_DISABLE_NATIVE", "1")
    assert "unset KDKERNELS_DISABLE_NATIVE" in "\n".join(info.lines(info.info()))


def test_nvcc_is_not_asked_of_a_torch_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    _take_away(monkeypatch, "nvcc")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert re.search(r"^  nvcc +missing; not needed", _report(monkeypatch), re.MULTILINE)


def test_nvcc_of_a_python_package_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nvcc = tmp_path / "nvidia" / "cu13" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.touch(mode=0o755)
    found = _toolchain.Torch(tmp_path / "torch", "2.13.0", "13.0")
    monkeypatch.setattr(_toolchain, "find_torch", lambda: found)
    assert _toolchain.find_nvcc({"PATH": ""}) == str(nvcc)


@pytest.mark.parametrize("found", ["none", "2.9.1"])
def test_importing_without_a_torch_names_the_command(tmp_path: Path, found: str) -> None:
    lines = ["import sys", "sys.path.insert(0, sys.argv[1])"]
    stand_in = f"from types import ModuleType as M; m = M('torch'); m.__version__ = {found!r}"
    lines += [f"{stand_in}; sys.modules['torch'] = {'None' if found == 'none' else 'm'}"]
    lines += ["import kdkernels"]
    command = [sys.executable, "-c", "\n".join(lines), str(ROOT)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    need = f"torch {_toolchain.OLDEST_TORCH} or newer"
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and f"kdkernels needs {need}" in last and f"has {found}" in last
    assert last.endswith(_remedies.remedy(need))


def test_the_limits_are_those_of_pyproject() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'"torch>={_toolchain.OLDEST_TORCH}"' in text
    assert f'"triton>={_toolchain.OLDEST_TRITON};' in text
    assert f'"setuptools>={_toolchain.OLDEST_SETUPTOOLS}"' in text


# The commands.


def test_commands_name_this_interpreter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "executable", "/a folder/python")
    words = shlex.split(_remedies.pip_install("torch>=2.10"))
    assert words[0] == "/a folder/python" and words[-1] == "torch>=2.10"

    monkeypatch.setattr(sys, "base_prefix", sys.prefix)  # no virtual environment
    (tmp_path / "EXTERNALLY-MANAGED").touch()
    monkeypatch.setattr(sysconfig, "get_path", lambda *a, **k: str(tmp_path))
    assert "--break-system-packages" in _remedies.pip_install("ninja")


def test_commands_where_there_is_no_pip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _without(monkeypatch, "pip")
    monkeypatch.setenv("PATH", str(tmp_path))
    ensure, _, install = _remedies.pip_install("ninja").partition(" && ")
    assert ensure.endswith("-m ensurepip") and install.endswith("install ninja")
    (tmp_path / "uv").touch(mode=0o755)
    words = shlex.split(_remedies.pip_install("ninja"))
    assert words == ["uv", "pip", "install", "--python", sys.executable, "ninja"]


@pytest.mark.parametrize(
    ("noted", "source"),
    [
        ('{"url": "file:///a%20folder/kdkernels", "dir_info": {}}', "/a folder/kdkernels"),
        (
            '{"url": "https://e.org/k", "vcs_info": {"vcs": "git", "commit_id": "abc"}}',
            "git+https://e.org/k@abc",
        ),
        ("", "kdkernels"),
    ],
)
def test_an_installed_copy_is_built_again_from_where_it_came(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, noted: str, source: str
) -> None:
    monkeypatch.setattr(_remedies, "__file__", str(tmp_path / "kdkernels" / "_remedies.py"))
    monkeypatch.setattr(
        importlib.metadata, "distribution", lambda name: SimpleNamespace(read_text=lambda f: noted)
    )
    words = shlex.split(_remedies.build_command())
    assert words[-1] == source and "--force-reinstall" in words
    assert ("--no-binary" in words) == (not noted)


@pytest.mark.parametrize(
    ("managers", "root", "expected"),
    [
        ({"apt-get"}, True, "apt-get update && apt-get install -y g++"),
        ({"apt-get", "sudo"}, False, "sudo apt-get update && sudo apt-get install -y g++"),
        ({"apt-get", "conda"}, False, "conda install -y -c conda-forge cxx-compiler"),
        ({"dnf"}, True, "dnf install -y gcc-c++"),
    ],
)
def test_system_packages_come_by_a_command_that_this_user_may_run(
    monkeypatch: pytest.MonkeyPatch, managers: set[str], root: bool, expected: str
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name, **k: name if name in managers else None)
    monkeypatch.setattr(os, "geteuid", lambda: 0 if root else 1000, raising=False)
    assert _remedies.remedy("a C++ compiler") == expected


# A library of another copy.


def test_a_library_of_another_copy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    stray = ModuleType("kdkernels._C")
    stray.__file__ = "/another/kdkernels/_C.so"
    assert "/another/kdkernels/_C.so" in native.stray(stray)
    stray.__file__ = native.__file__.replace("native.py", "_C.so")
    assert native.stray(stray) == ""


def test_a_copy_without_a_library_warns_of_the_one_it_runs(tmp_path: Path) -> None:
    """As behind an editable installation, whose finder is asked when the folder holds no _C."""
    module = native.extension()
    if module is None:
        pytest.skip(native.reason())
    library = str(module.__file__)
    shutil.copytree(
        ROOT / "kdkernels", tmp_path / "kdkernels", ignore=shutil.ignore_patterns("*.so", "__py*")
    )
    code = f"""
import importlib.util, sys
class Editable:
    def find_spec(name, path=None, target=None):
        if name == "kdkernels._C":
            return importlib.util.spec_from_file_location(name, {library!r})
sys.meta_path.insert(0, Editable)  # before that of a real editable installation
from kdkernels import info
print("\\n".join(info.lines(info.info())))
"""
    command = [sys.executable, "-c", code]
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    shown = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True
    )
    assert "RuntimeWarning" in shown.stderr and library in shown.stderr
    assert f"  {library}\n  WARNING: " in shown.stdout and str(tmp_path) in shown.stdout

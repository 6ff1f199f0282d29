"""Wheels and archives: what is built is tagged for what it holds, and archives are whole.

The builds run the real setuptools and ninja, in an environment as bare as that of an isolated
build, with a stand-in for the compiler: the kernels themselves take minutes.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

import setup
from kdkernels import _toolchain, native

ROOT = Path(__file__).resolve().parents[1]
TORCH = Path(torch.__file__).parent

COMPILER = """\
#!/bin/sh
while [ $# -gt 0 ]; do
  case "$1" in
    -o) shift; echo stand-in > "$1";;
    -MF) shift; echo "x:" > "$1";;
  esac
  shift
done
"""
SHELL = ("sh", "-c", '"$@"; exit $?', "sh")
# What pip has in the environment of an isolated build, and a test that it works.
ISOLATION = """\
import importlib.util, sys
sys.path[:] = [p for p in sys.path if "site-packages" not in p and not p.startswith({torch!r})]
assert importlib.util.find_spec("torch") is None, sys.path
assert importlib.util.find_spec("setuptools") is not None, sys.path
"""


def test_torch_is_read_from_its_files(tmp_path: Path) -> None:
    assert _toolchain.read_torch(tmp_path) is None
    (tmp_path / "include").mkdir()
    (tmp_path / "version.py").write_text(
        "__version__ = '2.14.0a0+cu130'\ncuda: Optional[str] = '13.0'\nhip = None\n"
    )
    found = _toolchain.read_torch(tmp_path)
    assert found == _toolchain.Torch(tmp_path, "2.14.0a0+cu130", "13.0")
    installed = _toolchain.read_torch(TORCH)
    assert installed == _toolchain.Torch(TORCH, torch.__version__, torch.version.cuda)


def test_an_old_torch_is_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    need = f"torch {_toolchain.OLDEST_TORCH} or newer"
    for version, new in ("2.9.1+cpu", False), ("2.10.0a0", True), ("3.0", True):
        found = _toolchain.Torch(TORCH, version, None)
        monkeypatch.setattr(_toolchain, "find_torch", lambda found=found: found)
        assert bool(_toolchain.needs()[need]) == new


def test_old_setuptools_are_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    setup.refuse_old_setuptools()
    monkeypatch.setattr(setup.toolchain, "version", lambda package: "65.5.0")
    with pytest.raises(SystemExit, match=r"must be 77 or newer, got 65\.5\.0: .* -m pip install"):
        setup.refuse_old_setuptools()


class Builder:
    """Builds wheels of a copy of the sources in an environment without torch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.source = folder / "source"
        ignored = shutil.ignore_patterns("*.so", "__pycache__", _toolchain.WITHOUT_KERNELS)
        for name in ("kdkernels", "csrc"):
            shutil.copytree(ROOT / name, self.source / name, ignore=ignored)
        for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
            shutil.copy(ROOT / name, self.source)
        self.compiler = folder / "c++"
        self.compiler.write_text(COMPILER)
        self.compiler.chmod(0o755)
        self.overlay = folder / "overlay"
        self.overlay.mkdir()
        (self.overlay / "sitecustomize.py").write_text(ISOLATION.format(torch=str(TORCH.parent)))
        for package in ("setuptools", "packaging", "ninja", "pybind11"):
            self._link(package)
        environment = folder / "environment"
        make = [sys.executable, "-m", "venv", "--without-pip", str(environment)]
        subprocess.run(make, check=True)
        self.python = environment / "bin" / "python"
        (self.packages,) = environment.glob("lib/python*/site-packages")

    def _link(self, package: str) -> None:
        try:
            files = importlib.metadata.files(package) or []
        except importlib.metadata.PackageNotFoundError:
            return
        for top in {file.parts[0] for file in files} - {"..", "__pycache__"}:
            place = Path(str(files[0].locate())).parents[len(files[0].parts) - 1] / top
            if place.exists() and not (self.overlay / top).exists():
                (self.overlay / top).symlink_to(place)

    def wheel(
        self, parent: Iterable[str] = ("sh", "-c", '"$@"; exit $?', "sh"), **env: str
    ) -> Path:
        """By the backend's hook, below a shell: a parent with torch would be asked for it."""
        output = Path(self.folder / "dist")
        shutil.rmtree(output, ignore_errors=True)
        output.mkdir()
        hidden = ("VIRTUAL_ENV", "CONDA_PREFIX", "PYTHON", "KDKERNELS_", "CXX")
        kept = {k: v for k, v in os.environ.items() if not k.startswith(hidden)}
        kept |= {"PYTHONPATH": str(self.overlay), "CXX": str(self.compiler), **env}
        code = f"from setuptools import build_meta; build_meta.build_wheel({str(output)!r})"
        command = [*parent, str(self.python), "-c", code]
        done = subprocess.run(
            command, cwd=self.source, env=kept, capture_output=True, text=True, check=False
        )
        self.said = done.stderr
        assert done.returncode == 0, done.stderr
        (made,) = output.iterdir()
        return made

    def with_torch(self) -> None:
        """The environment has torch, which the isolated build does not see."""
        (self.packages / "torch.pth").write_text(f"{TORCH.parent}\n")


@pytest.fixture
def builder(tmp_path: Path) -> Builder:
    if sys.platform == "win32":
        pytest.skip("Windows is pure Python for now")
    lacks = [name for name, found in _toolchain.needs().items() if not found]
    if lacks or not _toolchain.setuptools()[1]:
        pytest.skip(f"a build needs {', '.join(lacks) or 'newer setuptools'}")
    return Builder(tmp_path)


def _contents(wheel: Path) -> tuple[list[str], str, str]:
    """Files, metadata on the wheel, and the reason for the lack of kernels."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (facts,) = (archive.read(n).decode() for n in names if n.endswith(".dist-info/WHEEL"))
        notes = [archive.read(n).decode() for n in names if n.endswith(_toolchain.WITHOUT_KERNELS)]
    return names, facts, "".join(notes).strip()


def _is_pure(wheel: Path) -> str:
    """The reason, after a look at everything that a pure wheel must be."""
    names, facts, reason = _contents(wheel)
    assert wheel.name.endswith("-py3-none-any.whl")
    assert "Root-Is-Purelib: true" in facts and "Tag: py3-none-any" in facts
    assert not [name for name in names if name.endswith(".so")]
    assert {"kdkernels/__init__.py", "kdkernels/py.typed", "kdkernels/losses/kd.py"} <= set(names)
    return reason


def _has_kernels(wheel: Path) -> None:
    names, facts, reason = _contents(wheel)
    assert not reason and "Root-Is-Purelib: false" in facts
    assert [name for name in names if re.fullmatch(r"kdkernels/_C\..*\.so", name)]
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert f"-{tag}-{tag}-" in wheel.name and "none-any" not in wheel.name


def test_an_isolated_build_finds_the_torch_outside(builder: Builder) -> None:
    builder.with_torch()
    _has_kernels(builder.wheel())
    # What an earlier build has left must not slip into a wheel without kernels.
    assert "compiler failed" in _is_pure(builder.wheel(CXX="false"))
    assert _is_pure(builder.wheel(KDKERNELS_NATIVE="0")) == "KDKERNELS_NATIVE was 0"
    _has_kernels(builder.wheel())


def test_a_build_without_torch_is_pure_and_says_so(builder: Builder) -> None:
    need = f"torch {_toolchain.OLDEST_TORCH} or newer"
    assert _is_pure(builder.wheel()) == f"missing: {need}"
    assert f"installing without native kernels (missing: {need})" in builder.said
    with pytest.raises(AssertionError, match="RuntimeError: missing: torch"):
        builder.wheel(KDKERNELS_NATIVE="1")
    with pytest.raises(AssertionError, match="KDKERNELS_TORCH must be the folder"):
        builder.wheel(KDKERNELS_TORCH="/nowhere")
    _has_kernels(builder.wheel(KDKERNELS_TORCH=str(TORCH)))


@pytest.mark.skipif(sys.platform != "linux", reason="the parent process is asked on Linux only")
def test_a_build_in_a_new_environment_finds_the_front_ends_torch(builder: Builder) -> None:
    """As ``python -m build`` does it: this process, which has torch, starts the backend."""
    _has_kernels(builder.wheel(parent=()))


def test_the_reason_reaches_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(_toolchain, "__file__", str(tmp_path / "_toolchain.py"))
    (tmp_path / _toolchain.WITHOUT_KERNELS).write_text("missing: ninja\n")
    monkeypatch.setitem(sys.modules, "kdkernels._C", None)
    monkeypatch.delattr("kdkernels._C", raising=False)
    module, reason = native._load_cpu()
    assert module is None and "missing: ninja" in reason and "pip install" in reason


def test_the_archive_of_sources_holds_every_file(tmp_path: Path) -> None:
    """Built from what git tracks, in a copy; an archive that lacks a test's file is no use."""
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        pytest.skip("the sources are no git checkout")
    if not _toolchain.setuptools()[1]:
        pytest.skip(f"setuptools {_toolchain.setuptools()[0]} is too old")
    listed = subprocess.run([git, "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    tracked = [name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]
    for name in tracked:
        (tmp_path / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / "source" / name)
    command = [sys.executable, "setup.py", "-q", "sdist", "--dist-dir", str(tmp_path)]
    subprocess.run(command, cwd=tmp_path / "source", check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        packed = {name.partition("/")[2] for name in opened.getnames()}
    assert not set(tracked) - packed
    assert {"PKG-INFO", "tests/conftest.py", "csrc/rules/kd.h"} <= packed

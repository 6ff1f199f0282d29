"""Importing kdkernels does nothing: checked in fresh processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

# Runs ``work()`` in a fork for each environment; importing torch once saves most of the time.
FORKS = """
import os, sys, torch
def forks(work, environments):
    for environment in environments:
        sys.stdout.flush()
        child = os.fork()
        if not child:
            os.environ.update(environment)
            try:
                work()
                sys.stdout.flush()
            finally:
                os._exit(0 if sys.exc_info()[0] is None else 1)
        assert os.waitpid(child, 0)[1] == 0, environment
"""
ROOT = Path(__file__).resolve().parent.parent
USE = """
import torch, kdkernels
from kdkernels.registry import SPECS
def use(backend=None):
    s = torch.randn(3, 5, requires_grad=True)
    y = {"target": torch.tensor([0, 1, 2])}
    for spec in SPECS.values():
        if spec.family in ("divergence", "decoupled", "binary", "correlation"):
            kwargs = y if spec.needs_target else {}
            spec.function(s, torch.randn(3, 5), backend=backend, **kwargs).backward()
"""


def run(code: str, cwd: Path, **env: str) -> str:
    """Run code in a fresh interpreter whose caches and home are ``cwd``; returns what it prints."""
    caches = ("HOME", "XDG_CACHE_HOME", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "TMPDIR")
    kept = {
        k: v for k, v in os.environ.items() if not k.startswith(("KDKERNELS_", "TRITON_", "TORCH"))
    }
    path = os.pathsep.join(filter(None, (str(ROOT), kept.get("PYTHONPATH", ""))))
    kept |= {name: str(cwd) for name in caches}
    kept |= {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "2"} | env
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=kept, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_touches_nothing(tmp_path: Path) -> None:
    """No CUDA, no Triton, no compiler, no file, no thread, no change of torch's settings."""
    run(
        """
import sys, threading, torch
def settings():
    return (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(),
            torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark)
before, modules = settings(), set(sys.modules)
state = torch.get_rng_state()
import kdkernels
new = set(sys.modules) - modules
assert not torch.cuda.is_initialized()
heavy = ("triton", "torch._inductor", "torch._dynamo", "numpy", "kdkernels.triton")
loaded = [h for h in heavy if h in new]
assert not loaded, f"imported besides torch: {loaded}"
assert threading.active_count() == 1
assert settings() == before and torch.equal(state, torch.get_rng_state())
""",
        tmp_path,
    )
    assert not list(tmp_path.iterdir())


def test_use_on_the_cpu_needs_no_triton_and_writes_nothing(tmp_path: Path) -> None:
    run(
        "import sys, torch; modules = set(sys.modules)\n"
        + USE
        + """
use()
new = set(sys.modules) - modules
assert not [m for m in new if m.split(".")[0] == "triton"], new
assert not torch.cuda.is_initialized()
""",
        tmp_path,
    )
    assert not list(tmp_path.iterdir())


def test_import_is_quick(tmp_path: Path) -> None:
    """Less than a quarter of torch's own import (measured: a tenth to a seventh).

    A ratio of two processor times of one run, the best of three: the machine's speed is in both.
    """
    code = """
import time
def work():
    start = time.process_time()
    import kdkernels
    print(time.process_time() - start)
forks(work, [{}] * 3)
"""
    timed = "import time; begun = time.process_time(); import torch\n"
    timed += "print(time.process_time() - begun)\n"
    torch_s, *ours_s = map(float, run(timed + FORKS + code, tmp_path).split())
    assert min(ours_s) < torch_s / 4


@pytest.mark.parametrize(
    "env", [{"KDKERNELS_DISABLE_NATIVE": "1"}, {}], ids=["no_extension", "with_extension"]
)
def test_works_without_triton(tmp_path: Path, env: dict[str, str]) -> None:
    run(
        "import sys; sys.modules['triton'] = None\n"  # how Python says: not to be found
        + USE
        + """
from kdkernels import _dispatch
use()
use("reference")
for spec in SPECS.values():
    if "triton" in spec.backends:
        assert "not installed" in _dispatch.why_not(spec, "triton", torch.empty(0))[0]
try:
    use("triton")
except ValueError as error:
    assert "-m pip install" in str(error) and "triton>=" in str(error).replace("==", ">=")
else:
    raise AssertionError("backend='triton' ran without triton")
""",
        tmp_path,
        **env,
    )


def test_works_without_the_extension(tmp_path: Path) -> None:
    run(
        USE
        + """
from kdkernels import _dispatch
use()
for spec in SPECS.values():
    if "native" in spec.backends:
        reasons = _dispatch.why_not(spec, "native", torch.empty(0))
        assert reasons == ["KDKERNELS_DISABLE_NATIVE is set"]
    assert _dispatch.choose(spec, torch.empty(0), None) == "reference"
""",
        tmp_path,
        KDKERNELS_DISABLE_NATIVE="1",
    )


def test_a_broken_extension_is_reported_not_raised(tmp_path: Path) -> None:
    """A library built for another Python or torch does not load: the reference runs instead."""
    run(
        """
import sys
class Broken:
    def find_spec(self, name, path=None, target=None):
        if name == "kdkernels._C":
            raise ImportError("undefined symbol: test")
sys.meta_path.insert(0, Broken())
"""
        + USE
        + """
use()
from kdkernels import native
assert "undefined symbol: test" in native.reason() and "pip install" in native.reason()
""",
        tmp_path,
    )


def test_forked_workers(tmp_path: Path) -> None:
    """DataLoader workers are forks of a process that has already run kernels on its threads."""
    run(
        USE
        + """
from torch.utils.data import DataLoader, Dataset
def loss(seed):
    generator = torch.Generator().manual_seed(seed)
    s, t = (torch.randn(64, 4096, generator=generator) for _ in range(2))
    return kdkernels.kd_loss(s, t).item(), kdkernels.dist_loss(s, t).item()
class Losses(Dataset):
    def __len__(self): return 4
    def __getitem__(self, i): return loss(i)
expected = [loss(i) for i in range(4)]
loader = DataLoader(Losses(), batch_size=None, num_workers=2, multiprocessing_context="fork")
assert [tuple(x) for x in loader] == expected
""",
        tmp_path,
    )


def test_info(tmp_path: Path) -> None:
    """``python -m kdkernels.info`` reports, whatever is missing."""
    code = """
import runpy
def work():
    print("RUN")
    try:
        runpy.run_module("kdkernels.info", run_name="__main__")
    except SystemExit as exit:
        assert not exit.code, exit.code
forks(work, [{}, {"KDKERNELS_DISABLE_NATIVE": "1"}])
"""
    _, usual, disabled = run(FORKS + code, tmp_path).split("RUN")
    assert all("torch" in text and "triton" in text for text in (usual.lower(), disabled.lower()))
    assert "KDKERNELS_DISABLE_NATIVE" in disabled and "KDKERNELS_DISABLE_NATIVE" not in usual

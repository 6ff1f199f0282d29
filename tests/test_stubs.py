"""What type checkers see of the public names."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from kdkernels import _stubs

WRONG = """
from kdkernels import DISTLoss, FusedLinearKDLoss, JSDLoss, KDLoss, linear_kd_loss
from kdkernels.functional import kd_loss
import torch
KDLoss(temperatur=3.0)
JSDLoss(beta="0.5")
kd_loss(torch.zeros(2, 3), torch.zeros(2, 3), reducton="mean")
ok: float | torch.Tensor = KDLoss(4.0, loss_weight=torch.ones(())).temperature
s, t = torch.zeros(2, 3), torch.zeros(2, 3)
kd_loss(s, t).backward()
kd_loss(s, t, return_parts=True)[1].entropy.mean()
kd_loss(s, t, return_parts=True).backward()
FusedLinearKDLoss("jsd", betta=0.1)
linear_kd_loss(s, t, s, return_parts=True)[1].hard
kd_loss(s, t, temperature=torch.ones(2)), JSDLoss(temperature=torch.ones(2))
DISTLoss(tau=torch.ones(2))
"""


@pytest.mark.parametrize("package", _stubs.PACKAGES, ids=lambda package: package.__name__)
def test_the_stub_is_what_the_functions_say(package: ModuleType) -> None:
    written = _stubs.stub(package).read_text(encoding="utf-8")
    assert written == _stubs.text(package), "run python -m kdkernels._stubs"


@pytest.mark.skipif(importlib.util.find_spec("mypy") is None, reason="mypy is not installed")
def test_wrong_arguments_are_seen(tmp_path: Path) -> None:
    file = tmp_path / "wrong.py"
    file.write_text(WRONG)
    root = Path(_stubs.__file__).parents[1]
    command = [sys.executable, "-m", "mypy", "--config-file=", "--follow-imports=silent"]
    run = subprocess.run(
        [*command, "--cache-dir", str(tmp_path), str(file)],
        capture_output=True, text=True, cwd=root,
    )  # fmt: skip
    lines = sorted({int(x.split(":")[1]) for x in run.stdout.splitlines() if ": error:" in x})
    assert lines == [5, 6, 7, 12, 13, 16], run.stdout + run.stderr

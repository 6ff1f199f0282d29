"""The CUDA library is loaded where it runs, and refused with the reason elsewhere; on stand-ins."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from test_import import run

import kdkernels
from kdkernels import _cuda_code, _dispatch, info, native
from kdkernels.registry import SPECS

H100, A10, B200 = ((9, 0), "H100"), ((8, 6), "A10"), ((10, 0), "B200")


class Library(ModuleType):
    """Stands for kdkernels._cuda: what it says of itself, and which GPUs it was asked for."""

    __file__ = native.__file__

    def __init__(self, built: str, toolkit: str, driver: str) -> None:
        super().__init__("kdkernels._cuda")
        self.built, self.toolkit, self.known = built, toolkit, driver
        self.asked: list[int] = []
        self.error = ""

    def build_info(self) -> dict[str, str]:
        return {"CUDA": self.toolkit, "architectures": self.built}

    def driver(self) -> str:
        return self.known

    def device_info(self, index: int) -> dict[str, int]:
        self.asked.append(index)
        if self.error:
            raise RuntimeError(self.error)
        return {"arch": 90}

    def rules(self, family: str) -> list[str]:
        return [s.rule for s in SPECS.values() if s.rule_family == family]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Makes this machine one with GPUs, of which some are in use, and with a library."""

    def make(library: Library, gpus: list[Any], used: tuple[int, ...] = (0,)) -> str:
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: gpus[index][0])
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: gpus[index][1])
        monkeypatch.setattr(
            torch._C, "_cuda_hasPrimaryContext", lambda index: index in used, raising=False
        )
        monkeypatch.setattr(
            info, "_devices", lambda: {"cpu": ["cpu"], "cuda": [name for _, name in gpus]}
        )
        monkeypatch.setitem(sys.modules, "kdkernels._cuda", library)
        monkeypatch.setattr(kdkernels, "_cuda", library, raising=False)
        native._load.cache_clear()
        _dispatch.clear_cache()
        return native.reason("cuda")

    monkeypatch.setattr(native, "_cuda", None)
    monkeypatch.delenv("KDKERNELS_DISABLE_NATIVE", raising=False)
    yield make
    monkeypatch.undo()
    native._load.cache_clear()
    _dispatch.clear_cache()


def refused(reason: str) -> None:
    """Nothing is loaded, no loss runs compiled on GPUs, and ``info`` says why."""
    assert native.extension("cuda") is None and native._cuda is None
    table = kdkernels.available("cuda")
    assert all(row["native"] for row in table.values())
    assert table["kd"]["native"] == [reason]
    text = "\n".join(info.lines(info.info()))
    assert f"CUDA extension: not loaded: {reason}" in text and f"native: {reason}" in text


def test_a_library_that_runs_is_loaded(machine: Any) -> None:
    library = Library("80 90 100+PTX", "13.0", "13.0")
    assert machine(library, [H100, A10]) == ""
    assert native.extension("cuda") is native._cuda is library
    assert kdkernels.available("cuda")["kd"]["native"] == []
    assert _dispatch._choose("kd", None, "cuda") == "native"
    assert "CUDA extension: loaded" in "\n".join(info.lines(info.info()))


def test_only_gpus_that_are_in_use_are_tried(machine: Any) -> None:
    library = Library("90", "13.0", "13.0")
    machine(library, [H100, H100, H100], used=(1,))
    assert library.asked == [1]
    library = Library("90", "13.0", "13.0")
    machine(library, [H100, H100], used=())
    assert library.asked == []


def test_a_driver_older_than_the_toolkit_is_no_error_of_every_call(machine: Any) -> None:
    library = Library("90", "13.0", "12.8")
    reason = machine(library, [H100])
    assert "built with CUDA 13.0" in reason and "the driver knows CUDA 12.8" in reason
    assert "update the driver" in reason and library.asked == []
    refused(reason)


def test_what_a_gpu_in_use_answers_is_the_reason(machine: Any) -> None:
    library = Library("90", "12.6", "13.0")
    library.error = "kdkernels: cudaFuncGetAttributes failed: no kernel image"
    reason = machine(library, [A10, H100][1:])
    assert library.error in reason and "H100" in reason
    refused(reason)


def test_a_gpu_that_refuses_later_does_not_break_info(machine: Any) -> None:
    library = Library("90", "13.0", "13.0")
    assert machine(library, [H100, H100]) == ""
    library.error = "all CUDA-capable devices are busy"
    facts = info.info()
    assert facts["cuda_extension"]["devices"][1] == {"error": library.error}
    assert "driver 13.0" in "\n".join(info.lines(facts))


def test_no_driver_is_a_reason(machine: Any) -> None:
    assert "knows CUDA 0.0" in machine(Library("90", "12.0", "0.0"), [H100])


@pytest.mark.parametrize(
    ("built", "toolkit", "driver", "gpu", "part"),
    [
        ("80 90", "12.8", "12.2", H100, ""),  # machine code needs the major version alone
        ("80 90", "12.8", "13.0", A10, ""),
        ("80 90", "12.8", "13.0", B200, "build with KDKERNELS_CUDA_ARCHS=100"),
        ("90", "12.8", "13.0", A10, "was built for 90, and A10 is (8, 6)"),
        ("80 90+PTX", "12.8", "12.8", B200, ""),
        ("80 90+PTX", "12.8", "13.0", B200, ""),
        ("80 90+PTX", "12.8", "12.6", B200, "compiles none of CUDA 12.8"),
        ("80 90+PTX", "12.8", "12.6", H100, ""),
        ("90", "13.0", "12.9", H100, "nvcc of CUDA 12"),
    ],
)
def test_code_toolkit_and_driver(
    built: str, toolkit: str, driver: str, gpu: Any, part: str
) -> None:
    why = _cuda_code.why_not({"CUDA": toolkit, "architectures": built}, driver, *gpu)
    assert part in why and bool(why) == bool(part)


def test_nothing_asks_for_gpus_before_their_tensors_come(tmp_path: Any) -> None:
    """Neither an import nor a loss on the CPU loads the library or wakes a GPU."""
    run(
        """
import sys, torch
torch.version.cuda = "13.0"
class Watch:
    def find_spec(self, name, path=None, target=None):
        assert name != "kdkernels._cuda", "the CUDA library is loaded"
sys.meta_path.insert(0, Watch())
def woken(*args, **kwargs):
    raise AssertionError("CUDA is initialised")
torch.cuda._lazy_init = woken
import kdkernels
kdkernels.kd_loss(torch.randn(3, 5, requires_grad=True), torch.randn(3, 5)).backward()
kdkernels.available("cpu")
""",
        tmp_path,
    )

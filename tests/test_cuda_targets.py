"""For which GPUs the CUDA kernels are compiled, in which form, and what a build says; no nvcc."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

import build
import setup
from kdkernels import _cuda_code


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("90", ["90"]),
        ("80,90;100+PTX", ["80", "90", "100+PTX"]),
        ("8.0 sm_90a 12.0 80", ["80", "90a", "120"]),
    ],
)
def test_architectures_are_named_in_the_usual_ways(text: str, expected: list[str]) -> None:
    assert build.architectures(["80"], {"KDKERNELS_CUDA_ARCHS": text}) == expected


def no_gpus() -> list[str]:
    return []


@pytest.mark.parametrize("text", ["hopper", "75", "9", "90,,x", "+PTX"])
def test_other_architectures_are_refused(text: str) -> None:
    with pytest.raises(RuntimeError, match="KDKERNELS_CUDA_ARCHS must be"):
        build.parse_architectures(text)


def test_default_architectures_are_those_of_nvcc() -> None:
    assert build.architectures(["75", "80", "90", "100"], {}, no_gpus) == ["80", "90", "100+PTX"]
    assert build.architectures(["75", "80", "90"], {}, no_gpus) == ["80", "90+PTX"]
    with pytest.raises(RuntimeError, match="none of sm_80"):
        build.architectures(["75"], {}, no_gpus)


def test_default_architectures_run_on_ampere_to_blackwell() -> None:
    built = " ".join(build.architectures(["80", "86", "90", "100", "103", "120"], {}, no_gpus))
    for capability in (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0), (12, 1):
        assert _cuda_code.code_for(built, capability) == "machine"
    assert _cuda_code.code_for(built, (13, 0)) == "PTX"


@pytest.mark.parametrize(
    ("gpus", "expected"),
    [
        (["90"], ["90"]),
        (["80", "86"], ["80", "86"]),
        (["75", "86"], ["86"]),
        (["75"], ["80", "86+PTX"]),  # no kernels run there: as on a machine without a GPU
        (["90", "120"], ["80", "86+PTX"]),  # this nvcc does not know one of them
        ([], ["80", "86+PTX"]),
    ],
)
def test_a_machine_with_gpus_builds_for_them(
    monkeypatch: pytest.MonkeyPatch, gpus: list[str], expected: list[str]
) -> None:
    monkeypatch.setattr(build, "ARCHITECTURES", ("80", "86"))
    assert build.architectures(["80", "86", "90"], {}, lambda: gpus) == expected
    named = {"KDKERNELS_CUDA_ARCHS": "90"}
    assert build.architectures(["80", "86", "90"], named, lambda: gpus) == ["90"]
    named = {"KDKERNELS_CUDA_ARCHS": "all"}
    assert build.architectures(["80", "86", "90"], named, lambda: gpus) == ["80", "86+PTX"]


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("printf '9.0\\n8.6\\n9.0\\n12.0\\n'", ["86", "90", "120"]),
        ("echo 'NVIDIA-SMI has failed'; exit 9", []),
        ("echo '[N/A]'", []),
        (None, []),
    ],
)
def test_gpus_are_those_of_the_driver(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str | None, expected: list[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    if script is not None:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    assert build.visible_gpus() == expected


def test_machine_code_is_compressed_as_its_drivers_read_it() -> None:
    assert build.compression((12, 9)) == ["-Xfatbin", "-compress-all"]
    assert build.compression((13, 0))[2:] == ["-compress-mode=size"]
    statements = build.ninja_statements(
        Path("_cuda.so"), Path(), build.Toolkit("nvcc", (13, 0), Path(), Path(), ("90",)), ["90"]
    )
    (flags,) = [s for s in statements if s.startswith("nvccflags")]
    assert "-Xfatbin -compress-all -compress-mode=size" in flags


def test_a_build_says_what_it_took(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    made = tmp_path / "library.so"
    statements = ["rule make", "  command = head -c 1500000 /dev/zero > $out"]
    statements += [f"build {made}: make", ""]
    setup.NinjaBuild.ninja(SimpleNamespace(build_temp=tmp_path), statements, made, "toy kernels")
    assert re.search(r"^kdkernels: toy kernels: \d+ s, 1\.5 MB$", capfd.readouterr().out, re.M)


def test_an_nvcc_ahead_of_torch_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for version, known in ((13, 0), "13.1"), ((12, 9), "12.4"), ((12, 9), "13.0"), ((13, 0), None):
        assert build.ahead_of_torch(version, known) == ""
    text = build.ahead_of_torch((13, 0), "12.8")
    assert "CUDA 13.0" in text and "torch of 12.8" in text and "nvcc of a CUDA 12" in text
    tools = build.Toolkit("nvcc", (13, 0), tmp_path, tmp_path, ("90",))
    monkeypatch.setattr(setup.cuda_build, "find_nvcc", lambda: "nvcc")
    monkeypatch.setattr(setup.cuda_build, "toolkit", lambda nvcc: tools)
    for torch_cuda in ("12.8", "13.0"):
        found = setup.toolchain.Torch(tmp_path, "2.13.0", torch_cuda)
        monkeypatch.setattr(setup, "torch", lambda found=found: found)
        setup.cuda_statements(tmp_path / "_cuda.so")
        assert (setup.cuda_build.ahead_of_torch((13, 0), torch_cuda) != "") == bool(
            capsys.readouterr().err
        )


def test_ptx_is_an_option_of_its_own() -> None:
    assert build.gencode(["80", "100+PTX"]) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_100,code=sm_100",
        "-gencode=arch=compute_100,code=compute_100",
    ]

"""``python -m kdkernels.info``: what this machine will use, and why not more."""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
from typing import Any, NamedTuple

import torch

from . import __version__, _dispatch, _remedies, _toolchain, native


class Part(NamedTuple):
    """One thing that the kernels need, when they are built or when they run."""

    name: str
    found: str
    """What is there; empty where it is missing."""
    remedy: str
    """The command that brings it, or why nothing does here."""


def info() -> dict[str, Any]:
    """Versions, devices, the compiled extension and, for each loss and backend, why it cannot run.

    ``losses[device][loss][backend]`` is a list of reasons; an empty list means that it runs.
    """
    devices = _devices()
    return {
        "versions": {
            "kdkernels": __version__,
            "torch": torch.__version__,
            "triton": _toolchain.version("triton"),
            "python": platform.python_version(),
        },
        "devices": devices,
        "threads": torch.get_num_threads(),
        "requested_backend": os.environ.get("KDKERNELS_BACKEND") or None,
        "parts": [part._asdict() for part in _parts()],
        "extension": _extension(),
        "cuda_extension": _cuda_extension() if "cuda" in devices else None,
        "losses": {device: _dispatch.available(device) for device in devices},
    }


def _parts() -> list[Part]:
    found = [
        Part(name, value, _remedies.remedy(name)) for name, value in _toolchain.needs().items()
    ]
    setuptools, new = _toolchain.setuptools()
    need = f"setuptools {_toolchain.OLDEST_SETUPTOOLS} or newer"
    found.append(Part(need, setuptools if new else "", _remedies.remedy(need)))
    cuda = torch.version.cuda
    without = "not needed: this torch has no CUDA"
    nvcc = _toolchain.find_nvcc() or ""
    found.append(Part("nvcc", nvcc, _remedies.nvcc(cuda) if cuda else without))
    triton = _toolchain.version("triton") if importlib.util.find_spec("triton") else None
    return [*found, Part("triton", triton or "", _remedies.triton())]


def _devices() -> dict[str, list[str]]:
    """Device types that hold tensors here, with the name of each device."""
    found = {"cpu": [f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"]}
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        found["cuda"] = [torch.cuda.get_device_name(index) for index in range(count)]
    xpu = getattr(torch, "xpu", None)
    if xpu is not None and xpu.is_available():
        found["xpu"] = [xpu.get_device_name(index) for index in range(xpu.device_count())]
    return found


def _extension() -> dict[str, Any]:
    module = native.extension()
    if module is None:
        return {"loaded": False, "reason": native.reason(), "remedy": _remedy()}
    return {
        "loaded": True,
        "path": module.__file__,
        "stray": native.stray(module),
        "cpu_capability": module.cpu_capability(),
        "build": dict(module.build_info()),
    }


def _cuda_extension() -> dict[str, Any]:
    module = native.extension("cuda")
    if module is None:
        return {"loaded": False, "reason": native.reason("cuda")}
    return {
        "loaded": True,
        "path": module.__file__,
        "stray": native.stray(module),
        "build": {**module.build_info(), "driver": module.driver()},
        "devices": [_device_info(module, index) for index in range(torch.cuda.device_count())],
    }


def _device_info(module: Any, index: int) -> dict[str, Any]:
    """What the plans know of a GPU, or why it does not say: others may have it for themselves."""
    try:
        return dict(module.device_info(index))
    except RuntimeError as error:
        return {"error": str(error)}


def _remedy() -> list[str]:
    """The steps that bring the extension, each a command."""
    if os.environ.get("KDKERNELS_DISABLE_NATIVE"):
        return ["unset KDKERNELS_DISABLE_NATIVE"]
    if sys.platform == "win32":
        return []
    optional = ("nvcc", "triton")
    steps = [p.remedy for p in _parts() if not p.found and p.name not in optional]
    return [*steps, _remedies.build_command()]


def lines(facts: dict[str, Any]) -> list[str]:
    """The report as text."""
    text = ["  ".join(f"{name} {version or '-'}" for name, version in facts["versions"].items())]
    for device, names in facts["devices"].items():
        text += [f"{device}: {name}" for name in names]
    text.append(f"CPU threads: {facts['threads']}")
    if facts["requested_backend"]:
        text.append(f"KDKERNELS_BACKEND requests {facts['requested_backend']} for every call")
    text += _extension_lines(facts)
    cuda = facts.get("cuda_extension")
    if cuda is not None:
        text += _library_lines("CUDA extension", cuda)
    width = max(len(part["name"]) for part in facts["parts"]) + 2
    text += ["", "to build the kernels from source, and to run those of Triton:"]
    for name, found, remedy in (part.values() for part in facts["parts"]):
        text.append("  " + name.ljust(width) + (found or f"missing; {remedy}"))
    for device, losses in facts["losses"].items():
        text += ["", *_table(device, losses)]
    return text


def _extension_lines(facts: dict[str, Any]) -> list[str]:
    extension = facts["extension"]
    if extension["loaded"]:
        return _library_lines("extension", extension)
    disabled = bool(os.environ.get("KDKERNELS_DISABLE_NATIVE"))
    steps = [f"  to {'enable' if disabled else 'add'} it: {step}" for step in extension["remedy"]]
    state = "disabled" if disabled else "not built"
    return [f"extension: {state}", f"  reason: {extension['reason']}", *steps]


def _library_lines(name: str, library: dict[str, Any]) -> list[str]:
    if not library["loaded"]:
        return [f"{name}: not loaded: {library['reason']}"]
    built = ", ".join(f"{key} {value}" for key, value in library["build"].items())
    capability = library.get("cpu_capability")
    chosen = f", CPU capability {capability}" if capability else ""
    text = [f"{name}: loaded{chosen} ({built})", f"  {library['path']}"]
    return [*text, f"  WARNING: {library['stray']}"] if library["stray"] else text


def _table(device: str, losses: dict[str, dict[str, list[str]]]) -> list[str]:
    """Loss x backend, and each reason for a 'no' once."""
    backends = _dispatch.BACKENDS
    width = max(map(len, ("loss", *losses))) + 2
    text = [f"on {device}:", "  " + "loss".ljust(width) + "".join(b.ljust(12) for b in backends)]
    notes: dict[str, str] = {}
    for loss, by_backend in losses.items():
        chosen = next(backend for backend in backends if not by_backend[backend])
        cells = []
        for backend in backends:
            reasons = "; ".join(by_backend[backend])
            if reasons:
                mark = notes.setdefault(f"{backend}: {reasons}", f"[{len(notes) + 1}]")
                cells.append(f"no {mark}")
            else:
                cells.append("yes *" if backend == chosen else "yes")
        text.append("  " + loss.ljust(width) + "".join(cell.ljust(12) for cell in cells))
    text.append("  * chosen when no backend is requested")
    return text + [f"  {mark} {reason}" for reason, mark in notes.items()]


def main() -> None:
    print("\n".join(lines(info())))


if __name__ == "__main__":
    main()

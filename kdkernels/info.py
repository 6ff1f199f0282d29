"""``python -m kdkernels.info``: what this machine will use, and why not more."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from typing import Any

import torch

from . import __version__, _dispatch, native

COMPILERS = ("g++", "clang++", "c++")


def cpp_compiler() -> str | None:
    """The C++ compiler that a build would use: ``$CXX``, else the first one on the path."""
    named = os.environ.get("CXX")
    if named:
        found = shutil.which(named.split()[0])
        if found:
            return found
    return next((path for path in map(shutil.which, COMPILERS) if path), None)


def info() -> dict[str, Any]:
    """Versions, devices, the compiled extension and, for each loss and backend, why it cannot run.

    ``losses[device][loss][backend]`` is a list of reasons; an empty list means that it runs.
    """
    devices = _devices()
    return {
        "versions": {
            "kdkernels": __version__,
            "torch": torch.__version__,
            "triton": _version("triton"),
            "python": platform.python_version(),
        },
        "devices": devices,
        "threads": torch.get_num_threads(),
        "requested_backend": os.environ.get("KDKERNELS_BACKEND") or None,
        "compiler": cpp_compiler(),
        "extension": _extension(),
        "cuda_extension": _cuda_extension() if "cuda" in devices else None,
        "losses": {device: _dispatch.available(device) for device in devices},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


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
        "cpu_capability": module.cpu_capability(),
        "build": dict(module.build_info()),
    }


def _cuda_extension() -> dict[str, Any]:
    module = native.extension("cuda")
    if module is None:
        return {"loaded": False, "reason": native.reason("cuda")}
    count = torch.cuda.device_count()
    return {
        "loaded": True,
        "build": dict(module.build_info()),
        "devices": [dict(module.device_info(index)) for index in range(count)],
    }


def _remedy() -> list[str]:
    """The steps that bring the extension, each a command."""
    if os.environ.get("KDKERNELS_DISABLE_NATIVE"):
        return ["unset KDKERNELS_DISABLE_NATIVE"]
    steps = [] if cpp_compiler() else [_compiler_command()]
    return [*steps, native.build_command()]


def _compiler_command() -> str:
    managers = {
        "apt-get": "apt-get install -y g++",
        "dnf": "dnf install -y gcc-c++",
        "apk": "apk add g++",
        "brew": "xcode-select --install",
        "conda": "conda install -y -c conda-forge cxx-compiler",
    }
    found = (command for tool, command in managers.items() if shutil.which(tool))
    return next(found, "conda install -y -c conda-forge cxx-compiler")


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
        built = ", ".join(f"{key} {value}" for key, value in cuda.get("build", {}).items())
        state = f"loaded ({built})" if cuda["loaded"] else f"not loaded: {cuda['reason']}"
        text.append(f"CUDA extension: {state}")
    for device, losses in facts["losses"].items():
        text += ["", *_table(device, losses)]
    return text


def _extension_lines(facts: dict[str, Any]) -> list[str]:
    extension = facts["extension"]
    if extension["loaded"]:
        built = ", ".join(f"{key} {value}" for key, value in extension["build"].items())
        return [f"extension: loaded, CPU capability {extension['cpu_capability']} ({built})"]
    disabled = bool(os.environ.get("KDKERNELS_DISABLE_NATIVE"))
    if disabled:
        state = "disabled"
    elif facts["compiler"]:
        state = f"not built; C++ compiler found: {facts['compiler']}"
    else:
        state = "not built, and no C++ compiler found ($CXX, " + ", ".join(COMPILERS) + ")"
    steps = [f"  to {'enable' if disabled else 'add'} it: {step}" for step in extension["remedy"]]
    return [f"extension: {state}", f"  reason: {extension['reason']}", *steps]


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

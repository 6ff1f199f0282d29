"""What the numbers were measured on."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
from pathlib import Path

import torch

import kdkernels


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text())
        if found:
            return found.group(1).strip()
    return platform.processor() or platform.machine()


def busy() -> str:
    """A warning if other processes compete for the cores; empty where that is not known.

    Threads that wait for each other at a barrier then lose whole time slices, and times of
    microseconds read as milliseconds.
    """
    if not hasattr(os, "getloadavg"):
        return ""
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load < 0.5 * cores:
        return ""
    return f"warning: load average {load:.1f} on {cores} cores; other processes distort the times"


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def machine(device: str) -> dict[str, str | int]:
    """The facts that a number depends on."""
    return {
        "device": device,
        "name": device_name(device),
        "capability": torch.backends.cpu.get_cpu_capability() if device == "cpu" else "",
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "kdkernels": kdkernels.__version__,
        "date": datetime.date.today().isoformat(),
    }


def slug(facts: dict[str, str | int]) -> str:
    """A file name for the results of this machine: ``amd-epyc-2-threads``, ``nvidia-h200``."""
    name = str(facts["name"])
    if facts["device"] == "cpu":
        name += f" {facts['threads']} threads"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")

"""Checkpoints: written whole or not at all, and refused where the settings differ."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

# A run that may not start from the saved state, because the settings differ.
MISMATCH = (
    "{path} was made with other settings ({what}).\n"
    "Choose another --output, or start over with --fresh."
)


def save(path: Path, settings: dict[str, Any], history: Any, parts: dict[str, Any]) -> None:
    state = {name: part.state_dict() for name, part in parts.items()}
    write(path, {"settings": settings, "history": vars(history), **state})


def write(path: Path, state: dict[str, Any]) -> None:
    """Write all or nothing: an interrupt leaves the previous file in place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def restore(
    path: Path, settings: dict[str, Any], parts: dict[str, Any], device: torch.device
) -> dict[str, Any]:
    """Load every part; returns the history."""
    state = torch.load(path, map_location=device, weights_only=True)
    saved = state["settings"]
    if saved != settings:
        keys = sorted(k for k in {*saved, *settings} if saved.get(k) != settings.get(k))
        what = "; ".join(f"{k}: {saved.get(k)}, now {settings.get(k)}" for k in keys)
        raise SystemExit(MISMATCH.format(path=path, what=what))
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return dict(state["history"])

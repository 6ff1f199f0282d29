"""Triton's interpreter, made fit for thousands of small launches.

The interpreter replaces the functions of ``triton.language`` by NumPy's. It does so again in every
call of a device function, and reads all names of the modules each time: half of the time of a small
launch. Once for each module and launch is the same.
"""

from __future__ import annotations

import functools
from typing import Any

import triton.language as tl
from triton.runtime import interpreter


class PatchOnce:
    """In place of ``interpreter._patch_lang``; it is the scope that the launch restores, too."""

    def __init__(self, patch: Any) -> None:
        self._patch = patch
        self._scopes: dict[frozenset[str], Any] = {}

    def __call__(self, function: Any) -> PatchOnce:
        modules = _languages(function)
        if modules not in self._scopes:
            self._scopes[modules] = self._patch(function)
        return self

    def restore(self) -> None:
        for scope in reversed(self._scopes.values()):
            scope.restore()
        self._scopes.clear()


@functools.cache
def _languages(function: Any) -> frozenset[str]:
    """The modules of the language that a function sees: those that are replaced."""
    seen = {id(value) for value in function.__globals__.values()}
    return frozenset(lang.__name__ for lang in (tl, tl.core) if id(lang) in seen)


def patch_once_a_launch() -> None:
    """Does nothing where this Triton's interpreter is made otherwise."""
    patch = getattr(interpreter, "_patch_lang", None)
    if patch is not None and hasattr(interpreter, "_LangPatchScope"):
        interpreter._patch_lang = PatchOnce(patch)

"""What type checkers read of ``kdkernels.losses`` and ``.linear``: ``python -m kdkernels._stubs``.

Modules that are bound from functions take what those take, which no static annotation can say of a
base class; the stubs have their constructors written out. A test keeps them true.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType

from . import linear, losses

_HEAD = '''"""Written by ``python -m kdkernels._stubs``: what type checkers read."""

from typing import Any, Literal, overload

from torch import Tensor

from .._ensemble import TeacherLogits
from .._group import ProcessGroup
from .._rowwise import LossParts
'''
PACKAGES = {
    losses: "from ._base import LossModule, RowLoss, SampledLoss, SparseLoss, TokenLoss",
    linear: "from ._teachers import Teacher\nfrom .module import LinearLoss",
}
"""What each stub imports besides."""
_RETURNED = {"return_parts": "LossParts", "return_mass": "TopKMass"}
"""What these flags add to what a function returns; not known of a variable."""


def _results(flags: list[str]) -> Iterator[tuple[dict[str, str], str]]:
    """How each flag may be annotated, and what the function returns then."""
    for given in itertools.product((False, True), repeat=len(flags)):
        more = [_RETURNED[flag] for flag, yes in zip(flags, given, strict=True) if yes]
        types = ["Literal[True]" if yes else "Literal[False] = ..." for yes in given]
        result = f"tuple[Tensor, {', '.join(more)}]" if more else "Tensor"
        yield dict(zip(flags, types, strict=True)), result
    yield dict.fromkeys(flags, "bool" if len(flags) == 1 else "bool = ..."), "Any"


def _arguments(parameters: Iterable[inspect.Parameter], flags: dict[str, str]) -> list[str]:
    lines, keyword = [], False
    for p in parameters:
        if p.kind is p.KEYWORD_ONLY and not keyword:
            keyword = True
            lines.append("*,")
        if p.name in flags:
            lines.append(f"{p.name}: {flags[p.name]},")
        else:
            lines.append(f"{p.name}: {p.annotation}{'' if p.default is p.empty else ' = ...'},")
    return lines


def _overloads(name: str, parameters: Mapping[str, inspect.Parameter]) -> list[str]:
    lines = []
    for flags, result in _results([flag for flag in parameters if flag in _RETURNED]):
        arguments = [f"    {line}" for line in _arguments(parameters.values(), flags)]
        lines += ["@overload", f"def {name}(", *arguments, f") -> {result}: ..."]
    return lines


def stub(package: ModuleType) -> Path:
    return Path(str(package.__file__)).with_suffix(".pyi")


def text(package: ModuleType) -> str:
    """The stub: names as the package exports them, bound modules and functions that may return
    parts written out."""
    bound = {name: x for name, x in vars(package).items() if hasattr(x, "bind")}
    lines = [_HEAD + PACKAGES[package]]
    functions: list[str] = []
    for name, value in sorted(vars(package).items()):
        if name.startswith("_") or inspect.ismodule(value) or name in bound:
            continue
        parameters = {} if inspect.isclass(value) else inspect.signature(value).parameters
        if "return_parts" in parameters:
            functions += _overloads(name, parameters)
            continue
        file = value.__module__.rpartition(".")[2]
        lines.append(f"from .{file} import {name} as {name}")
    lines += ["", *functions]
    for name, module in sorted(bound.items()):
        parameters = inspect.signature(module).parameters
        lines += ["", f"class {name}({module.__bases__[0].__name__}):"]
        lines += [f"    {p.name}: {p.annotation}" for p in parameters.values()]
        arguments = [f"        {line}" for line in _arguments(parameters.values(), {})]
        lines += ["    def __init__(", "        self,", *arguments, "    ) -> None: ..."]
        if "forward" in vars(module):
            forward = inspect.signature(module.forward)
            taken = [p for p in forward.parameters.values() if p.name != "self"]
            arguments = [f"        {line}" for line in _arguments(taken, {})]
            returned = f"    ) -> {forward.return_annotation}: ..."
            lines += ["    def forward(", "        self,", *arguments, returned]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    for one in PACKAGES:
        stub(one).write_text(text(one), encoding="utf-8")

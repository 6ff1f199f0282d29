"""What type checkers read of ``kdkernels.losses``: ``python -m kdkernels._stubs`` writes the stub.

Modules of row losses take what their functions take, which no static annotation can say of a base
class; the stub has their constructors written out. A test keeps it true.
"""

from __future__ import annotations

import inspect
from pathlib import Path

from . import losses
from .registry import SPECS

STUB = Path(losses.__file__).with_suffix(".pyi")
_HEAD = '''"""Written by ``python -m kdkernels._stubs``: what type checkers read."""

from torch import Tensor

from ._base import RowLoss, SampledLoss, TokenLoss
'''


def text() -> str:
    """The stub: names as ``losses/__init__.py`` exports them, bound modules written out."""
    bound = {s.module.__name__: s.module for s in SPECS.values() if hasattr(s.module, "bind")}
    lines = [_HEAD.rstrip()]
    for name, value in sorted(vars(losses).items()):
        if name.startswith("_") or inspect.ismodule(value) or name in bound:
            continue
        file = value.__module__.rpartition(".")[2]
        lines.append(f"from .{file} import {name} as {name}")
    for name, module in sorted(bound.items()):
        parameters = inspect.signature(module).parameters
        lines += ["", f"class {name}({module.__bases__[0].__name__}):"]
        lines += [f"    {p.name}: {p.annotation}" for p in parameters.values()]
        lines += ["    def __init__(", "        self,"]
        keyword = False
        for p in parameters.values():
            if p.kind is p.KEYWORD_ONLY and not keyword:
                keyword = True
                lines.append("        *,")
            lines.append(f"        {p.name}: {p.annotation} = ...,")
        lines.append("    ) -> None: ...")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    STUB.write_text(text(), encoding="utf-8")

"""The package's modules point one way: no cycle among imports, at any level, lazy ones included."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import kdkernels

ROOT = Path(kdkernels.__file__).parent
LEAVES = ("_version", "_dtypes", "_tracing", "_backends", "_calls")
"""Modules that import no other, or only leaves."""
BACKENDS = ("native", "triton", "reference", "composed")


def _name(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _modules() -> dict[str, Path]:
    return {_name(path): path for path in sorted(ROOT.rglob("*.py"))}


def _imports(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """The package's modules that a file imports, inside functions too, but not for types alone."""
    package = name if path.stem == "__init__" else name.rpartition(".")[0]
    found: set[str] = set()
    tree = ast.parse(path.read_text())
    typing_only = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names if alias.name in known)
        if not isinstance(node, ast.ImportFrom):
            continue
        base = node.module or ""
        if node.level:
            up = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*up, *([node.module] if node.module else [])])
        for alias in node.names:
            whole = f"{base}.{alias.name}"
            found.add(whole if whole in known else base)
    return {module for module in found if module in known and module != name}


def _graph() -> dict[str, set[str]]:
    known = _modules()
    graph = {name: _imports(name, path, known) for name, path in known.items()}
    # A package's __init__ that gathers its parts is imported by them only for its own names.
    return {name: {x for x in seen if not name.startswith(f"{x}.")} for name, seen in graph.items()}


def test_no_cycle() -> None:
    graph = _graph()
    assert len(graph) > 30
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail("imports in a circle: " + " -> ".join(error.args[1]))


def test_leaves_and_backends() -> None:
    """Leaves import leaves; backends import neither each other nor what chooses among them."""
    graph = _graph()
    leaves = {f"kdkernels.{name}" for name in LEAVES}
    for leaf in leaves:
        assert graph[leaf] <= leaves, (leaf, graph[leaf] - leaves)
    upper = {f"kdkernels.{name}" for name in ("_dispatch", "_autograd", "_ops", "registry")}
    for name, seen in graph.items():
        backend = next(
            (b for b in BACKENDS if f"kdkernels.{b}" in (name, name.rpartition(".")[0])), ""
        )
        if not backend:
            continue
        assert not seen & upper, (name, seen & upper)
        others = {f"kdkernels.{b}" for b in ("native", "triton") if b != backend}
        assert not seen & others, (name, seen & others)


def test_private_names_stay_in_their_module() -> None:
    """``from x import _y`` of another module's private name is a layer that was left out."""
    found = []
    for name, path in _modules().items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (
                node.level or "kdkernels" in (node.module or "")
            ):
                private = [a.name for a in node.names if a.name.startswith("_")]
                modules = {p.stem for p in path.parent.glob("*.py")} | {
                    p.stem for p in ROOT.glob("*.py")
                }
                extensions = {"_C", "_cuda"}
                found += [f"{name}: {x}" for x in private if x not in modules | extensions]
    assert [x for x in found if "__version__" not in x] == []

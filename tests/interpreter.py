"""Triton's interpreter, made fit for thousands of small launches.

Its kernels are NumPy calls on a few elements, so that nearly all of their time is Python around
them. What is made again in every launch or every operation, and is the same, is made once:

- the functions of ``triton.language`` that are replaced by NumPy's;
- the type of a block, whose shape is built and checked, and every tensor's copy of that shape;
- NumPy's dtype for an element type;
- the shape to which operands are broadcast that have the same one.
"""

from __future__ import annotations

import functools
from typing import Any

import triton.language as tl
from triton.language import core
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter


class PatchOnce:
    """In place of ``interpreter._patch_lang``; it is the scope that the launch restores, too."""

    def __init__(self, patch: Any) -> None:
        self._patch = patch
        self._active: dict[frozenset[str], Any] = {}
        self._known: dict[Any, tuple[list[Any], list[Any]]] = {}
        """By what is active and what comes to it: what was there, and what replaces it."""

    def __call__(self, function: Any) -> PatchOnce:
        modules = _languages(function)
        if modules in self._active:
            return self
        key = (*self._active, modules)
        if key in self._known:
            before, after = self._known[key]
            scope = interpreter._LangPatchScope()
            scope._changes = list(before)
            for of, name, value in after:
                setattr(of, name, value)
        else:
            scope = self._patch(function)
            before = list(scope._changes)
            after = [(of, name, getattr(of, name)) for of, name, _ in before]
            self._known[key] = before, after
        self._active[modules] = scope
        return self

    def restore(self) -> None:
        for scope in reversed(self._active.values()):
            scope.restore()
        self._active.clear()


@functools.cache
def _languages(function: Any) -> frozenset[str]:
    """The modules of the language that a function sees: those that are replaced."""
    seen = {id(value) for value in function.__globals__.values()}
    return frozenset(lang.__name__ for lang in (tl, tl.core) if id(lang) in seen)


def _types_once() -> None:
    """Blocks of one element type and shape share what their first one made, and so do tensors."""
    block, tensor = core.block_type.__init__, core.tensor.__init__
    blocks: dict[Any, dict[str, Any]] = {}
    tensors: dict[Any, tuple[Any, Any]] = {}

    def init_block(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = shape.values if isinstance(shape, core.tuple) else shape
        key = element_ty.name, *[getattr(size, "value", size) for size in sizes]
        known = blocks.get(key)
        if known is None:
            block(self, element_ty, shape)
            known = blocks[key] = {**self.__dict__, "sizes": key[1:]}
        self.__dict__.update(known)

    def init_tensor(self: Any, handle: Any, type: Any) -> None:
        key = getattr(type, "sizes", ())
        known = tensors.get(key)
        if known is None:
            tensor(self, handle, type)
            known = tensors[key] = self.shape, self.numel
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = known

    core.block_type.__init__, core.tensor.__init__ = init_block, init_tensor


def _dtypes_once() -> None:
    find, same = interpreter._get_np_dtype, core.dtype.__eq__
    found: dict[str, Any] = {}

    def dtype(of: Any) -> Any:
        key = of.scalar.name
        if key not in found:
            found[key] = find(of)
        return found[key]

    interpreter._get_np_dtype = dtype
    core.dtype.__eq__ = lambda self, other: self is other or same(self, other)


def _shapes_once() -> None:
    broadcast = TritonSemantic.broadcast_impl_value

    def splat(self: Any, scalar: Any, block: Any) -> Any:
        to = block.with_element_ty(scalar.type.scalar)
        return self.make_tensor(self.builder.create_splat(to, scalar.handle), to)

    def both(self: Any, lhs: Any, rhs: Any) -> Any:
        a, b = getattr(lhs.type, "sizes", None), getattr(rhs.type, "sizes", None)
        if a == b:
            return lhs, rhs
        if a is None:
            return splat(self, lhs, rhs.type), rhs
        if b is None:
            return lhs, splat(self, rhs, lhs.type)
        return broadcast(self, lhs, rhs)

    TritonSemantic.broadcast_impl_value = both


def patch() -> None:
    """Does nothing where this Triton's interpreter is made otherwise."""
    language = getattr(interpreter, "_patch_lang", None)
    if language is None or not hasattr(interpreter, "_LangPatchScope"):
        return
    interpreter._patch_lang = PatchOnce(language)
    _types_once()
    _dtypes_once()
    _shapes_once()

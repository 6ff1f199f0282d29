"""Who is timed, and why somebody is not: eager, compiled eager, each backend, and the floor."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable

import torch
from torch import Tensor

from kdkernels import _dispatch
from kdkernels.info import cpp_compiler
from kdkernels.registry import LossSpec

from .eager import eager
from .problem import Problem

KERNELS = ("native", "triton")
"""Backends of the library that are worth timing, the preferred one first."""

CONTENDERS = ("eager", "compile", *KERNELS, "floor")


def why_not(name: str, spec: LossSpec, device: str) -> list[str]:
    """The reasons why a contender is not timed on this device (empty: it is)."""
    if name in ("eager", "floor"):
        return []
    if name == "compile":
        return _compile_reasons(device)
    if name == "triton" and device == "cpu":
        return ["on the CPU Triton is interpreted, which is for tests and not for timing"]
    if name == "triton" and os.environ.get("TRITON_INTERPRET") == "1":
        return ["TRITON_INTERPRET=1 is set, and an interpreter is not timed"]
    return _dispatch.why_not(spec, name, torch.empty(0, device=device))


def _compile_reasons(device: str) -> list[str]:
    if device == "cpu" and cpp_compiler() is None:
        return ["torch.compile needs a C++ compiler for CPU tensors"]
    return []


def build(name: str, problem: Problem) -> Callable[..., Tensor]:
    """The function ``(student, teacher[, target]) -> loss`` of a contender.

    The floor is ``torch.add(student, teacher)``: it reads both inputs and writes one tensor of the
    same size, which is the traffic of forward + backward and nothing else.
    """
    if name == "floor":
        return _add
    if name == "eager":
        return eager(problem.spec)
    if name == "compile":
        if problem.compiled is None:
            # One compilation a problem: no shapes left over, no limit on recompilations reached.
            torch.compiler.reset()
            problem.compiled = torch.compile(eager(problem.spec), dynamic=False)
        return problem.compiled
    return functools.partial(problem.spec.function, backend=name)


def _add(student: Tensor, teacher: Tensor, *_: Tensor) -> Tensor:
    return torch.add(student, teacher)


def ours(spec: LossSpec, device: str) -> str:
    """The backend of the library that is timed on this device."""
    able = (name for name in KERNELS if not why_not(name, spec, device))
    return next(able, "reference")

"""One problem to solve: a loss at a workload, with its inputs and the answer in float64."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kdkernels.registry import LossSpec

from .inputs import make
from .shapes import Workload

BOUNDS = {
    torch.float64: 1e-10,
    torch.float32: 5e-4,
    torch.float16: 5e-3,
    torch.bfloat16: 1e-2,
}
"""Largest relative error of value and gradient at which a result still counts as the same loss.

Looser than the tests, because the eager forms must pass too; a wrong formula is off by far more.
"""


class Refused(AssertionError):
    """A contender disagrees with the reference, so its time would mean nothing."""


def with_labels(spec: LossSpec, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A loss whose labels come third, also where that is another argument of its function."""
    if list(inspect.signature(spec.function).parameters)[2] == spec.target_name:
        return function

    def loss(student: Tensor, teacher: Tensor, labels: Tensor, **options: Any) -> Tensor:
        return function(student, teacher, **{spec.target_name: labels}, **options)

    return loss


@dataclass(eq=False)
class Problem:
    """Inputs of a loss. The student's are leaves that require grad, as the end of a network."""

    spec: LossSpec
    workload: Workload
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    compiled: Callable[..., Tensor] | None = None
    """The compiled eager loss, shared by the modes."""

    def __post_init__(self) -> None:
        students, constants = make(self.spec, self.workload)
        self.students = tuple(self._place(x).requires_grad_() for x in students)
        self.constants = tuple(self._place(x) for x in constants)

    def _place(self, value: Tensor) -> Tensor:
        return value.to(self.device, self.dtype if value.is_floating_point() else None)

    @property
    def student(self) -> Tensor:
        return self.students[0]

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """The arguments of the loss."""
        return (*self.students, *self.constants)

    def forget_gradients(self) -> None:
        for student in self.students:
            student.grad = None

    @property
    def floor_bytes(self) -> int:
        """Bytes that the floor moves: for each gradient, two tensors read and one written."""
        return 3 * sum(student.numel() * student.element_size() for student in self.students)

    @functools.cached_property
    def answer(self) -> tuple[float, tuple[Tensor, ...]]:
        """Value and gradients of the float64 reference on the same rounded inputs."""
        students = [student.detach().double().requires_grad_() for student in self.students]
        rest = (x.double() if x.is_floating_point() else x for x in self.constants)
        function = self.spec.function
        if self.workload.ignored is not None:
            function = with_labels(self.spec, function)
        loss = function(*students, *rest, backend="reference")
        return loss.item(), torch.autograd.grad(loss, students)

    def check(self, name: str, function: Callable[..., Tensor], mode: str) -> None:
        """Raise ``Refused`` unless what is about to be timed agrees with the float64 reference."""
        bound = BOUNDS[self.dtype]
        value, gradients = self.answer
        where = f"{name} of {self.spec.name} at {self.workload.size}"
        try:
            errors = self._errors(function, mode, value, gradients)
        except Exception as error:  # whoever cannot run stops nobody else from being timed
            raise Refused(f"{where} failed: {type(error).__name__}: {error}") from error
        for what, size in errors.items():
            if not size <= bound:  # written so that NaN is refused
                raise Refused(
                    f"{where} disagrees with the float64 reference: relative error of the {what}"
                    f" is {size:.2e}, allowed {bound:.0e}"
                )

    def _errors(
        self, function: Callable[..., Tensor], mode: str, value: float, expected: Sequence[Tensor]
    ) -> dict[str, float]:
        if mode == "forward":  # kernels have a path of their own without gradients
            with torch.no_grad():
                loss = function(*self.inputs)
            return {"value": _relative(loss.item() - value, value)}
        students = [student.detach().requires_grad_() for student in self.students]
        loss = function(*students, *self.constants)
        gradients = torch.autograd.grad(loss, students)
        errors = {"value": _relative(loss.item() - value, value)}
        infinity = torch.inf
        for index, (got, right) in enumerate(zip(gradients, expected, strict=True)):
            which = f"gradient {index + 1}" if index else "gradient"
            difference = got.double().sub_(right)
            errors[f"{which} (2-norm)"] = _relative(difference.norm().item(), right.norm().item())
            # A few wrong elements hide in the norm of millions.
            errors[f"{which} (largest element)"] = _relative(
                torch.linalg.vector_norm(difference, infinity).item(),
                torch.linalg.vector_norm(right, infinity).item(),
            )
        return errors


def _relative(error: float, size: float) -> float:
    return abs(error) / abs(size) if size else abs(error)

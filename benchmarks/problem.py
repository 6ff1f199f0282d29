"""One problem to solve: a loss at a workload, with its inputs and the answer in float64."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kdkernels.registry import LossSpec

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


@dataclass(eq=False)
class Problem:
    """Inputs of a loss. The student is a leaf that requires grad, as the end of a network."""

    spec: LossSpec
    workload: Workload
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    compiled: Callable[..., Tensor] | None = None
    """The compiled eager loss, shared by the modes."""

    def __post_init__(self) -> None:
        shape = self.workload.shape
        generator = torch.Generator().manual_seed(0)
        teacher = torch.randn(shape, generator=generator) * 3
        student = 0.5 * teacher + torch.randn(shape, generator=generator)
        rows = (shape[0], *shape[2:])
        self.target = torch.randint(shape[1], rows, generator=generator).to(self.device)
        self.teacher = teacher.to(self.device, self.dtype)
        self.student = student.to(self.device, self.dtype).requires_grad_()

    @property
    def arguments(self) -> tuple[Tensor, ...]:
        """What follows the student in the call of the loss."""
        return (self.teacher, self.target) if self.spec.needs_target else (self.teacher,)

    @property
    def floor_bytes(self) -> int:
        """Bytes that forward + backward must move: read student and teacher, write the gradient."""
        return 3 * self.student.numel() * self.student.element_size()

    @functools.cached_property
    def answer(self) -> tuple[float, Tensor]:
        """Value and gradient of the float64 reference on the same rounded inputs."""
        student = self.student.detach().double().requires_grad_()
        rest = (self.teacher.double(), *self.arguments[1:])
        loss = self.spec.function(student, *rest, backend="reference")
        (gradient,) = torch.autograd.grad(loss, student)
        return loss.item(), gradient

    def check(self, name: str, function: Callable[..., Tensor], mode: str) -> None:
        """Raise ``Refused`` unless what is about to be timed agrees with the float64 reference."""
        bound = BOUNDS[self.dtype]
        value, gradient = self.answer
        where = f"{name} of {self.spec.name} at {self.workload.size}"
        try:
            errors = self._errors(function, mode, value, gradient)
        except Exception as error:  # whoever cannot run stops nobody else from being timed
            raise Refused(f"{where} failed: {type(error).__name__}: {error}") from error
        for what, size in errors.items():
            if not size <= bound:  # written so that NaN is refused
                raise Refused(
                    f"{where} disagrees with the float64 reference: relative error of the {what}"
                    f" is {size:.2e}, allowed {bound:.0e}"
                )

    def _errors(
        self, function: Callable[..., Tensor], mode: str, value: float, expected: Tensor
    ) -> dict[str, float]:
        if mode == "forward":  # kernels have a path of their own without gradients
            with torch.no_grad():
                loss = function(self.student, *self.arguments)
            return {"value": _relative(loss.item() - value, value)}
        student = self.student.detach().requires_grad_()
        loss = function(student, *self.arguments)
        (gradient,) = torch.autograd.grad(loss, student)
        difference = gradient.double().sub_(expected)
        infinity = torch.inf
        return {
            "value": _relative(loss.item() - value, value),
            "gradient (2-norm)": _relative(difference.norm().item(), expected.norm().item()),
            # A few wrong elements hide in the norm of millions.
            "gradient (largest element)": _relative(
                torch.linalg.vector_norm(difference, infinity).item(),
                torch.linalg.vector_norm(expected, infinity).item(),
            ),
        }


def _relative(error: float, size: float) -> float:
    return abs(error) / abs(size) if size else abs(error)

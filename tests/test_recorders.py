"""What is recorded computes the loss: ``torch.jit.trace``, and clear errors of what cannot."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from every import every, every_spec, example, gradient

from kdkernels.registry import LossSpec


@every()
@pytest.mark.parametrize("grad", [False, True], ids=["constant", "grad"])
def test_jit_trace_records_the_loss(spec: LossSpec, backend: str | None, grad: bool) -> None:
    """The recorded function gives the loss of other inputs, and its gradient."""
    case = example(spec)
    function = case.function(backend=backend)
    student = case.student.clone().requires_grad_(grad)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit.trace is deprecated, and shapes are constants
        recorded = torch.jit.trace(function, (student,), check_trace=False)
    other = case.student.flip(0) * 1.5
    if spec.name == "tuple_matching" and backend in (None, "reference"):
        other = case.student * 1.5  # which tuples there are is recorded
    torch.testing.assert_close(recorded(other), function(other), rtol=1e-5, atol=1e-6)
    if grad:
        given = gradient(recorded, other)
        torch.testing.assert_close(given, gradient(function, other), rtol=1e-5, atol=1e-6)


@every_spec()
def test_jit_script_says_what_to_do(spec: LossSpec) -> None:
    for scripted in (spec.function, spec.module()):
        with pytest.raises(RuntimeError, match=r"torch\.compile"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.jit.script(scripted)


class _Model(torch.nn.Module):
    """A model that returns its loss, as trainers wrap them."""

    def __init__(self, of: Any) -> None:
        super().__init__()
        self.of = of

    def forward(self, student: torch.Tensor) -> torch.Tensor:
        return self.of(student) * 2


@every_spec()
def test_export_records_the_loss(spec: LossSpec) -> None:
    """``torch.export`` keeps an operator or torch's operations, and gives the loss."""
    case = example(spec)
    program = torch.export.export(_Model(case.of), (case.student,))
    other = case.student * 1.5
    torch.testing.assert_close(program.module()(other), 2 * case.of(other), rtol=1e-5, atol=1e-6)

"""Every public argument has an effect; modules are their functions with arguments held."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import pytest
import torch
from cases import LOSS_IDS, LOSSES, Case, at_temperature, each, option_names, value_and_grad
from inputs import make

import kdkernels
from kdkernels.registry import SPECS, LossSpec

losses = pytest.mark.parametrize("spec", LOSSES, ids=LOSS_IDS)
all_losses = pytest.mark.parametrize("spec", SPECS.values(), ids=LOSS_IDS)


def _perturbed(spec: LossSpec, parameter: inspect.Parameter) -> Any:
    """A value other than the default that must change the result."""
    name, value = parameter.name, parameter.default
    if name in spec.perturb:
        return spec.perturb[name]
    if name == "reduction":
        return "sum"
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return 2  # a class that occurs in the target
    assert isinstance(value, float), f"LossSpec.perturb must say how to change {name}={value!r}"
    return 1.5 * value + 0.25


ARGUMENTS = {
    name: name
    for spec in LOSSES
    for name in inspect.signature(spec.function).parameters
    if name != "backend"  # chooses how, not what: test_dispatch.py
}


@each(
    argument=ARGUMENTS,
    keep=lambda case, name: name in inspect.signature(case.spec.function).parameters,
)
def test_every_argument_matters(case: Case, argument: str) -> None:
    """An argument that is accepted and forgotten is the most silent of bugs."""
    student, teacher, target = make("gaussian", 6, 9, device=case.device)
    target[1] = 2
    options = at_temperature(case.spec, 2.0)
    if case.spec.takes_target:
        options["target"] = target
    changed = dict(options)
    changed_teacher, changed_student = teacher, student
    if argument == "student_logits":
        changed_student = student.flip(0)
    elif argument == "teacher_logits":
        changed_teacher = teacher.flip(0)
    elif argument == case.spec.target_name:
        changed["target"] = target.roll(1) if case.spec.needs_target else target.fill_(-100)
        options["target"] = target.clone() if case.spec.needs_target else target + 101
    else:
        changed[argument] = _perturbed(
            case.spec, inspect.signature(case.spec.function).parameters[argument]
        )
    before = value_and_grad(case, student, teacher, **options)
    after = value_and_grad(case, changed_student, changed_teacher, **changed)
    tolerance = 1e-5  # of a float32 result of size one
    assert (before[0] - after[0]).abs() > 100 * tolerance * before[0].abs()
    assert (before[1] - after[1]).abs().max() > 100 * tolerance * before[1].abs().max()


@all_losses
def test_module_holds_the_arguments_of_its_function_and_nothing_else(spec: LossSpec) -> None:
    options = option_names(spec)
    constructor = inspect.signature(spec.module.__init__).parameters
    assert {n: (p.default, p.kind, p.annotation) for n, p in options.items()} == {
        n: (p.default, p.kind, p.annotation) for n, p in constructor.items() if n != "self"
    }
    assert isinstance(spec.module(), torch.nn.modules.loss._Loss)
    held = {n for n in vars(spec.module()) if not n.startswith("_") and n != "training"}
    assert held == set(options)
    assert all(getattr(spec.module(), n) == p.default for n, p in options.items())
    assert not spec.module().state_dict()
    forward = [*inspect.signature(spec.module.forward).parameters][1:]
    tensors = [n for n in inspect.signature(spec.function).parameters if n not in options]
    assert forward == tensors


@losses
def test_module_equals_function(spec: LossSpec) -> None:
    student, teacher, target = make("gaussian", 6, 9)
    inputs = (student, teacher, target) if spec.needs_target else (student, teacher)
    for sample in spec.samples:
        case = Case(spec, "reference", "cpu")
        expected = value_and_grad(case, student, teacher, target, **sample)
        module = spec.module(**sample, backend="reference")
        for form in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            actual = value_and_grad(form, *inputs)
            assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
            text = repr(form)
            for name, value in sample.items():
                assert f"{name}={value!r}" in text


@losses
def test_every_argument_of_a_module_reaches_its_function(spec: LossSpec) -> None:
    """A module that drops an argument would pass with defaults: change them one by one."""
    student, teacher, target = make("gaussian", 6, 9)
    target[1] = 2
    inputs = (student, teacher, target) if spec.takes_target else (student, teacher)
    names = ("student_logits", "teacher_logits", spec.target_name)
    for name, parameter in option_names(spec).items():
        value = "reference" if name == "backend" else _perturbed(spec, parameter)
        by_function = spec.function(**dict(zip(names, inputs, strict=False)), **{name: value})
        assert torch.equal(spec.module(**{name: value})(*inputs), by_function), name


@all_losses
def test_public_names(spec: LossSpec) -> None:
    function, module = spec.function.__name__, spec.module.__name__
    assert getattr(kdkernels, function) is spec.function
    assert getattr(kdkernels.functional, function) is spec.function
    assert getattr(kdkernels, module) is spec.module
    assert {function, module} <= set(kdkernels.__all__)
    assert function in kdkernels.functional.__all__
    for documented in (spec.function, spec.module):
        assert documented.__doc__
    missing = [n for n in inspect.signature(spec.function).parameters
               if f"{n}:" not in spec.function.__doc__]  # fmt: skip
    assert not missing, f"the docstring does not describe {missing}"


def test_everything_exported_exists() -> None:
    for module in (kdkernels, kdkernels.functional):
        assert not [name for name in module.__all__ if not hasattr(module, name)]

"""Every public argument has an effect; modules are their functions with arguments held."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Mapping
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from cases import (
    FLAGS,
    LOSS_IDS,
    LOSSES,
    Case,
    alone_if_interpreted,
    at_temperature,
    call,
    each,
    named_inputs,
    option_names,
    value_and_grad,
)
from every import every_spec, example
from inputs import make

import kdkernels
from kdkernels.registry import SPECS, LossSpec

losses = pytest.mark.parametrize("spec", LOSSES, ids=LOSS_IDS)
all_losses = pytest.mark.parametrize("spec", SPECS.values(), ids=LOSS_IDS)


def _changed(spec: LossSpec, name: str) -> dict[str, Any]:
    """The argument at a value that must change the result, and others at which it counts at all."""
    value = _perturbed(spec, inspect.signature(spec.function).parameters[name])
    return dict(value) if isinstance(value, Mapping) else {name: value}


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
    # test_dispatch.py; another name of the target; test_row_keywords.py; test_hard_weight.py;
    # test_group.py; test_sharded_classes.py; test_class_dim.py; test_teacher_grad.py;
    # test_resize.py
    if name not in ("backend", "labels", "token_weight", "num_items_in_batch", "return_parts")
    and name not in ("process_group", "tp_group", "class_dim", "teacher_grad", "resize")
}


@each(
    argument=ARGUMENTS,
    keep=lambda case, name: (
        name in inspect.signature(case.spec.function).parameters and alone_if_interpreted(case)
    ),
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
        changed |= _changed(case.spec, argument)
        options |= {name: value for name, value in changed.items() if name != argument}
    before = value_and_grad(case, student, teacher, **options)
    after = value_and_grad(case, changed_student, changed_teacher, **changed)
    tolerance = 1e-5  # of a float32 result of size one
    assert (before[0] - after[0]).abs() > 100 * tolerance * before[0].abs()
    assert (before[1] - after[1]).abs().max() > 100 * tolerance * before[1].abs().max()


@all_losses
def test_module_holds_the_arguments_of_its_function_and_nothing_else(spec: LossSpec) -> None:
    options = option_names(spec)
    constructor = dict(inspect.signature(spec.module).parameters)
    flags = {name for name in FLAGS if constructor.pop(name, None)}  # where the function has them
    assert flags == {*FLAGS} & {*inspect.signature(spec.function).parameters}
    assert {n: (p.default, p.kind, p.annotation) for n, p in options.items()} == {
        n: (p.default, p.kind, p.annotation) for n, p in constructor.items()
    }
    assert isinstance(spec.module(), torch.nn.modules.loss._Loss)
    others = ("training", *FLAGS)
    held = {n for n in vars(spec.module()) if not n.startswith("_") and n not in others}
    assert held == set(options)
    assert all(getattr(spec.module(), n) == p.default for n, p in options.items())
    assert not spec.module().state_dict()
    forward = [*inspect.signature(spec.module.forward).parameters][1:]
    arguments = inspect.signature(spec.function).parameters
    tensors = [n for n in arguments if n not in options and n not in FLAGS]
    labels = spec.target_name == "labels" or (spec in LOSSES and spec.takes_target)
    assert forward == tensors and ("labels" in tensors) == labels


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
    for name in option_names(spec):
        # As above.
        if name in ("process_group", "tp_group", "class_dim", "teacher_grad", "resize"):
            continue
        changed = {name: "reference"} if name == "backend" else _changed(spec, name)
        by_function = spec.function(**dict(zip(names, inputs, strict=False)), **changed)
        assert torch.equal(spec.module(**changed)(*inputs), by_function), name


@pytest.mark.parametrize(
    "spec", [s for s in LOSSES if s.takes_target and s.target_name == "target"], ids=LOSS_IDS
)
def test_labels_is_another_name_of_the_target(spec: LossSpec) -> None:
    """Trainers that pass the class indices by this keyword find them taken."""
    student, teacher, target = make("gaussian", 6, 9)
    target[1] = -100
    expected = call(spec, student, teacher, target=target, backend="reference")
    for form in (spec.function, spec.module()):
        actual = value_and_grad(form, student, teacher, labels=target)
        torch.testing.assert_close(actual[0], expected)
        assert (actual[1][1] == 0).all() and actual[1].any()
        with pytest.raises(TypeError, match="labels must be None where target is given"):
            form(student, teacher, target=target, labels=target)


@all_losses
def test_a_number_is_a_number(spec: LossSpec) -> None:
    """NumPy's scalars, fractions and 0-d tensors are worth what Python's numbers are."""
    tensors = named_inputs(spec)
    inputs = tuple(tensors.values())
    for name, parameter in option_names(spec).items():
        low, high = spec.domains.get(name, (0.0, 10.0))
        if type(parameter.default) is float:
            forms: tuple[Any, ...] = (
                2,
                np.float32(2),
                np.float64(2),
                np.int64(2),
                Fraction(2),
                Decimal(2),
                torch.tensor(2.0),
                torch.tensor(2),
                torch.tensor(2.0, dtype=torch.float64),
            )
            plain: Any = 2.0
            if not low <= 2.0 <= high:
                forms, plain = (1, np.float32(1), np.int64(1), Fraction(1), torch.tensor(1)), 1.0
        elif type(parameter.default) is int:
            forms, plain = (np.int64(2), np.uint8(2), torch.tensor(2)), 2
        else:
            continue
        expected = spec.function(**tensors, **{name: plain})
        for value in forms:
            by_function = spec.function(**tensors, **{name: value})
            by_module = spec.module(**{name: value})(*inputs)
            for actual in (by_function, by_module):
                assert actual.dtype == expected.dtype
                torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)


@all_losses
def test_a_weight_that_is_a_tensor_is_part_of_the_graph(spec: LossSpec) -> None:
    """A 0-d tensor multiplies outside the kernel: no host reads it, and it may be learned."""
    inputs = tuple(named_inputs(spec).values())
    weight = torch.tensor(0.5, requires_grad=True)
    plain = spec.module(loss_weight=1.0)(*inputs)
    (slope,) = torch.autograd.grad(spec.module(loss_weight=weight)(*inputs), weight)
    torch.testing.assert_close(slope, plain)
    with pytest.raises(TypeError, match="loss_weight must be a number or a 0-d Tensor, got"):
        spec.module(loss_weight=torch.ones(2))
    with pytest.raises(ValueError, match="loss_weight must be on the CPU or on the student's"):
        spec.module(loss_weight=torch.ones((), device="meta"))(*inputs)


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


@every_spec()
def test_a_changed_attribute_counts(spec: LossSpec) -> None:
    """Schedules set attributes of a Module between steps."""
    case = example(spec, torch.float64)
    module = spec.module()
    before = module(*case.tensors)
    module.loss_weight = 3.0 * module.loss_weight
    torch.testing.assert_close(module(*case.tensors), 3.0 * before)
    assert "loss_weight" in repr(module)
    module.reduction = "sum"
    after = case.of(case.student, loss_weight=module.loss_weight, reduction="sum")
    torch.testing.assert_close(module(*case.tensors), after)


@all_losses
def test_a_wrong_keyword_names_the_module(spec: LossSpec) -> None:
    with pytest.raises(TypeError, match=rf"^{spec.module.__name__}\(\) got an unexpected keyword"):
        spec.module(temprature=2.0)
    with pytest.raises(TypeError, match=rf"^{spec.module.__name__}\(\) too many positional"):
        spec.module(*[1.0] * 20)

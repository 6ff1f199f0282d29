"""Every bad input of every loss raises the exact type, ``name must be <expected>, got <got>``."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import (
    LOSS_IDS,
    LOSSES,
    Case,
    call,
    each,
    named_inputs,
    option_names,
    value_and_grad,
)
from inputs import make

from kdkernels import _checks
from kdkernels.registry import SPECS, LossSpec

losses = pytest.mark.parametrize("spec", LOSSES, ids=LOSS_IDS)
NAN, INF = float("nan"), float("inf")

NOT_FINITE = [
    (NAN, ValueError, "finite, got nan"),
    (INF, ValueError, "finite, got inf"),
    (-INF, ValueError, "finite, got -inf"),
]
NOT_A_NUMBER = [
    ("4", TypeError, "a number, got str"),
    (None, TypeError, "a number, got NoneType"),
    (True, TypeError, "a number, got bool"),
    (4j, TypeError, "a number, got complex"),
    (
        torch.ones(2),
        TypeError,
        "a number or a 0-d Tensor, got a Tensor of shape (2,), torch.float32",
    ),
    (10**400, ValueError, "finite, got a number beyond any float"),
    (1e13, ValueError, "at most 1e+12 in magnitude, got 10000000000000.0"),
]
LEARNED = [
    (
        torch.ones((), requires_grad=True),
        ValueError,
        "a constant (call .detach() on it, or run the teacher under torch.no_grad()),"
        " got a tensor that requires grad",
    ),
    (
        torch.ones((), device="meta"),
        TypeError,
        "a number (read a tensor with .item(), for which the host waits), got a Tensor on meta",
    ),
]
NUMBER = [*NOT_FINITE, *NOT_A_NUMBER]
NON_NEGATIVE = [
    *NUMBER,
    (-1, ValueError, ">= 0, got -1.0"),
    (-1e-9, ValueError, ">= 0, got -1e-09"),
]
POSITIVE = [
    *NUMBER,
    (0, ValueError, "> 0, got 0.0"),
    (-0.0, ValueError, "> 0, got -0.0"),
    (-2, ValueError, "> 0, got -2.0"),
]
TEMPERATURE = [
    *POSITIVE,
    *LEARNED,
    (1e30, ValueError, "at most 1e+12 in magnitude, got 1e+30"),
    (1e7, ValueError, "in [1e-06, 1e+06], got 10000000.0"),
    (1e-7, ValueError, "in [1e-06, 1e+06], got 1e-07"),
]
GROUP = "None or a torch.distributed.ProcessGroup of this process"
BY_NAME: dict[str, list[tuple[Any, type[Exception], str]]] = {
    "temperature": TEMPERATURE,
    "tau": TEMPERATURE,
    "alpha": NON_NEGATIVE,
    "beta": NON_NEGATIVE,
    "gamma": NON_NEGATIVE,
    "eps": NON_NEGATIVE,
    "eta": NON_NEGATIVE,
    "estimator": [
        (value, ValueError, f"'k1', 'k2' or 'k3', got {value!r}")
        for value in ("k4", None, 2, ["k2"])
    ],
    "kind": [
        (value, ValueError, f"'log' or 'hybrid', got {value!r}")
        for value in ("Log", None, 1, ["log"])
    ],
    "resize": [
        (value, ValueError, f"None or 'bilinear', got {value!r}")
        for value in ("nearest", 1, True, ["bilinear"])
    ],
    "loss_weight": NUMBER,
    **{
        name: [
            (value, TypeError, f"{GROUP}, got {type(value).__name__}")
            for value in ("gloo", torch.distributed.GroupMember.NON_GROUP_MEMBER, object)
        ]
        for name in ("process_group", "tp_group")
    },
    "backend": [
        (value, ValueError, f"'native', 'triton', 'reference' or None, got {value!r}")
        for value in ("cuda", "", ["native"], 0, False)
    ],
}
BY_ANNOTATION: dict[str, list[tuple[Any, type[Exception], str]]] = {
    "float": NUMBER,
    "bool": [
        (1, TypeError, "a bool, got int"),
        (None, TypeError, "a bool, got NoneType"),
        ("yes", TypeError, "a bool, got str"),
    ],
    "int | None": [
        (1.5, TypeError, "an int, got float"),
        (True, TypeError, "an int, got bool"),
        (torch.tensor(True), TypeError, "an int, got Tensor"),
        (torch.tensor(1.0), TypeError, "an int, got Tensor"),
        (2**63, ValueError, f"an int of 64 bits, got {2**63}"),
        (-(2**70), ValueError, f"an int of 64 bits, got {-(2**70)}"),
    ],
}
REDUCTION = [
    ("avg", ValueError, "'avg'"),
    (None, ValueError, "None"),
    (1, ValueError, "1"),
    (["mean"], ValueError, "['mean']"),
]


def _bad_values(spec: LossSpec) -> list[tuple[str, Any, type[Exception], str]]:
    bad = []
    for name, parameter in option_names(spec).items():
        rows = BY_NAME.get(name) or BY_ANNOTATION.get(parameter.annotation, [])
        if name in spec.domains:
            low, high = spec.domains[name]
            text = f"in [{low:g}, {high:g}], got "
            rows = [*NUMBER, *((x, ValueError, f"{text}{x}") for x in (low - 1e-9, high + 0.5))]
            if "Tensor" in parameter.annotation:  # may be one number a row
                rows = [row for row in rows if getattr(row[0], "ndim", 0) == 0]
        if name == "temperature" and spec.by_row:  # a tensor may be one: test_temperatures.py
            rows = [row for row in rows if not isinstance(row[0], torch.Tensor)]
        if name == "reduction":
            allowed = (
                "'mean', 'batchmean', 'sum' or 'none'"
                if spec.by_row
                else ("'mean', 'batchmean' or 'sum'")
            )
            rows = [(value, kind, f"{allowed}, got {got}") for value, kind, got in REDUCTION]
        assert rows, f"no bad value is known for {name}: {parameter.annotation}"
        bad += [(name, *row) for row in rows]
    return bad


OPTIONS = [
    pytest.param(spec, *row, id=f"{spec.name}-{row[0]}-{row[1]!r:.12}")
    for spec in LOSSES
    for row in _bad_values(spec)
]


def _exact(name: str, text: str) -> str:
    return re.escape(f"{name} must be {text}") + "$"


@pytest.mark.parametrize(("spec", "name", "value", "kind", "text"), OPTIONS)
def test_bad_options(
    spec: LossSpec, name: str, value: Any, kind: type[Exception], text: str
) -> None:
    """The function and the constructor of the module raise the same."""
    student, teacher, target = make("gaussian", 4, 5)
    options: dict[str, Any] = {name: value}
    if spec.takes_target:
        options["target"] = target
    with pytest.raises(kind, match=_exact(name, text)) as from_function:
        call(spec, student, teacher, **options)
    with pytest.raises(kind, match=_exact(name, text)) as from_module:
        spec.module(**{name: value})
    assert type(from_function.value) is type(from_module.value) is kind


BAD_LOGITS: dict[str, tuple[Callable[..., tuple[Any, Any]], type[Exception], str]] = {
    "student_type": (
        lambda s, t: ([1.0], t),
        TypeError,
        "student_logits must be a Tensor, got list",
    ),
    "teacher_type": (
        lambda s, t: (s, None),
        TypeError,
        "teacher_logits must be a Tensor, got NoneType",
    ),
    "classes": (
        lambda s, t: (s, t[:, :3]),
        ValueError,
        "teacher_logits must be of the student's shape (4, 5), got (4, 3)",
    ),
    "broadcastable": (
        lambda s, t: (s, t[:1]),
        ValueError,
        "teacher_logits must be of the student's shape (4, 5), got (1, 5)",
    ),
    "rank_1": (
        lambda s, t: (s[0], t[0]),
        ValueError,
        "student_logits must be (N, C), (B, S, V) or (N, C, H, W), got shape (5,)",
    ),
    "rank_5": (
        lambda s, t: (s[:, :, None, None, None], t[:, :, None, None, None]),
        ValueError,
        "student_logits must be (N, C), (B, S, V) or (N, C, H, W), got shape (4, 5, 1, 1, 1)",
    ),
    "no_classes": (
        lambda s, t: (s[:, :0], t[:, :0]),
        ValueError,
        f"student_logits must be {_checks.TWO_CLASSES}, got shape (4, 0)",
    ),
    "one_class": (
        lambda s, t: (s[:, :1], t[:, :1]),
        ValueError,
        f"student_logits must be {_checks.TWO_CLASSES}, got shape (4, 1)",
    ),
    "student_dtype": (
        lambda s, t: (s.long(), t),
        TypeError,
        "student_logits must be float64, float32, float16 or bfloat16, got torch.int64",
    ),
    "teacher_dtype": (
        lambda s, t: (s, t.to(torch.complex64)),
        TypeError,
        "teacher_logits must be float64, float32, float16 or bfloat16, got torch.complex64",
    ),
    "device": (
        lambda s, t: (s, t.to("meta")),
        ValueError,
        "teacher_logits must be on the student's device cpu, got meta",
    ),
}


@losses
@pytest.mark.parametrize("bad", BAD_LOGITS)
def test_bad_logits(spec: LossSpec, bad: str) -> None:
    student, teacher, target = make("gaussian", 4, 5)
    change, kind, text = BAD_LOGITS[bad]
    if spec.activation == "sigmoid":
        text = text.replace(_checks.TWO_CLASSES, _checks.ONE_CLASS)
        if bad == "one_class":
            assert call(spec, *change(student, teacher)).isfinite()
            return
    with pytest.raises(kind, match=re.escape(text) + "$"):
        call(spec, *change(student, teacher), target)


NOT_DENSE: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], str]] = {
    "sparse": (torch.Tensor.to_sparse, ".to_dense() on it), got a torch.sparse_coo tensor"),
    "csr": (torch.Tensor.to_sparse_csr, ".to_dense() on it), got a torch.sparse_csr tensor"),
    "mkldnn": (torch.Tensor.to_mkldnn, ".to_dense() on it), got a torch._mkldnn tensor"),
    "nested": (
        lambda x: torch.nested.as_nested_tensor([*x]),
        ".to_padded_tensor(0.0) on it, and mask with a target), got a nested tensor",
    ),
    "jagged": (
        lambda x: torch.nested.as_nested_tensor([*x], layout=torch.jagged),
        ".to_padded_tensor(0.0) on it, and mask with a target), got a nested tensor",
    ),
    "quantised": (
        lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.quint8),
        ".dequantize() on it), got torch.quint8",
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", NOT_DENSE)
@pytest.mark.parametrize("spec", SPECS.values(), ids=LOSS_IDS)
def test_tensors_that_are_not_strided_say_what_to_do(spec: LossSpec, kind: str) -> None:
    """Each input of each loss, by function and by module; targets too."""
    convert, text = NOT_DENSE[kind]
    inputs = named_inputs(spec)
    for name, value in inputs.items():
        if not value.is_floating_point() and kind not in ("sparse", "nested"):
            continue  # torch makes no such tensor of class indices
        if (value.dim() != 2 and kind == "csr") or (value.dim() < 2 and kind == "jagged"):
            continue
        changed = {**inputs, name: convert(value)}
        for form in (spec.function, spec.module()):
            with pytest.raises(TypeError, match=rf"^{name} must be .*" + re.escape(text) + "$"):
                form(**changed)


BAD_TARGETS: dict[str, tuple[Callable[..., Any], type[Exception], str]] = {
    "type": (lambda y: y.tolist(), TypeError, "a Tensor of class indices, got list"),
    "shape": (lambda y: y[:3], ValueError, "of shape (4,), got (3,)"),
    "rank": (lambda y: y[:, None], ValueError, "of shape (4,), got (4, 1)"),
    "float": (lambda y: y.float(), TypeError, "integer class indices, got torch.float32"),
    "bool": (lambda y: y > 0, TypeError, "integer class indices, got torch.bool"),
    "device": (lambda y: y.to("meta"), ValueError, "on the student's device cpu, got meta"),
}


@pytest.mark.parametrize("bad", BAD_TARGETS)
@pytest.mark.parametrize("spec", [s for s in LOSSES if s.takes_target], ids=LOSS_IDS)
def test_bad_targets(spec: LossSpec, bad: str) -> None:
    student, teacher, target = make("gaussian", 4, 5)
    change, kind, text = BAD_TARGETS[bad]
    if bad == "bool" and not spec.needs_target:
        pytest.skip("a bool mask is no error: test_row_keywords.py")
    if bad == "float" and not spec.needs_target:
        text = text.replace(" indices", " indices or a bool mask")
    with pytest.raises(kind, match=_exact(spec.target_name, text)):
        call(spec, student, teacher, target=change(target))


@each([s for s in LOSSES if s.needs_target], wrong=(5, -1, -101, 2**40, -(2**40)))
def test_target_out_of_range(case: Case, wrong: int) -> None:
    """An error where reading the target is free; NaN for that row on a GPU."""
    student, teacher, target = make("gaussian", 4, 5, device=case.device)
    target[2] = wrong
    if case.device != "cpu":
        loss = case(student, teacher, target, reduction="none")
        assert loss.isnan().tolist() == [False, False, True, False]
        return
    text = _exact("class indices", f"in [0, 5) or ignore_index=-100, got {wrong}")
    for reduction in ("mean", "none"):
        with pytest.raises(ValueError, match=text):
            case(student.requires_grad_(), teacher, target, reduction=reduction)
    target[2] = 0
    assert torch.isfinite(case(student, teacher, target))  # the next call is unharmed


@each([s for s in LOSSES if s.takes_target and not s.needs_target])
def test_a_target_used_only_as_a_mask_is_not_checked(case: Case) -> None:
    student, teacher, _ = make("gaussian", 4, 5, device=case.device)
    target = torch.tensor([9, -100, -7, 0], device=case.device)
    _, gradient = value_and_grad(case, student, teacher, target=target)
    assert gradient.any(1).tolist() == [True, False, True, True]


@pytest.mark.parametrize("spec", [s for s in LOSSES if s.needs_target], ids=LOSS_IDS)
def test_a_missing_target_raises(spec: LossSpec) -> None:
    student, teacher, _ = make("gaussian", 4, 5)
    with pytest.raises(TypeError, match=_exact("target", "a Tensor of class indices, got None")):
        spec.function(student, teacher, target=None)
    with pytest.raises(TypeError, match="target"):
        spec.function(student, teacher)


@losses
def test_unknown_arguments_raise(spec: LossSpec) -> None:
    student, teacher, target = make("gaussian", 4, 5)
    with pytest.raises(TypeError, match=rf"^{spec.function.__name__}\(\) got an .* 'unknown'$"):
        call(spec, student, teacher, target, unknown=1)
    with pytest.raises(TypeError, match="unknown"):
        spec.module(unknown=1)
    positional = inspect.signature(spec.function).parameters.values()
    count = sum(p.kind is not p.KEYWORD_ONLY for p in positional)
    with pytest.raises(TypeError, match="positional"):
        spec.function(*[student] * (count + 1))

"""Argument checks, written once: every loss raises the same errors with the same words.

All messages read ``name must be <expected>, got <got>``. Checks look only at metadata (shape,
dtype, device, flags), so they cost no kernel launch and no synchronisation and are traceable by
``torch.compile``.
"""

from __future__ import annotations

import math
import numbers
import operator
from typing import Any

import torch
from torch import Tensor

from ._dtypes import FLOATS, INTEGERS
from ._tracing import keepable

TWO_CLASSES = (
    "of at least two classes (a binary problem, or labels that do not exclude each other:"
    " sigmoid_kd_loss and sigmoid_dist_loss)"
)
ONE_CLASS = "of at least one class"
REDUCTIONS = {"none": 0, "mean": 1, "batchmean": 1, "sum": 2}
"""Reduction names and the code the kernels know them by; ``batchmean`` is ``mean``."""
NO_INDEX = -(2**63)
"""What ``ignore_index=None`` is for the kernels: no row is ignored."""
LARGEST = 1e12
"""Largest magnitude of an option: products of a few of them stay inside float32."""
COLDEST, HOTTEST = 1e-6, 1e6
"""Range of temperatures: squares, and logits times or over one, stay inside float32."""


def fail(name: str, expected: str, got: Any) -> ValueError:
    return ValueError(f"{name} must be {expected}, got {got}")


def fail_type(name: str, expected: str, got: Any) -> TypeError:
    return TypeError(f"{name} must be {expected}, got {got}")


def tensor(name: str, value: Any, expected: str = "a Tensor") -> None:
    """Check that a value is a tensor whose elements lie in memory in strides."""
    if not isinstance(value, Tensor):
        raise fail_type(name, expected, type(value).__name__)
    if value.layout is not torch.strided or value.is_nested:
        raise _not_strided(name, value)


def _not_strided(name: str, value: Tensor) -> TypeError:
    if value.is_nested:
        remedy, kind = "call .to_padded_tensor(0.0) on it, and mask with a target", "nested"
    else:
        remedy, kind = "call .to_dense() on it", str(value.layout)
    return fail_type(name, f"a dense Tensor ({remedy})", f"a {kind} tensor")


def dtype(name: str, value: Tensor) -> None:
    """Check that a tensor has one of the dtypes of logits and features."""
    if value.dtype not in FLOATS:
        expected = "float64, float32, float16 or bfloat16"
        if value.is_quantized:
            expected += " (call .dequantize() on it)"
        raise fail_type(name, expected, value.dtype)


def allocated(name: str, value: Tensor) -> None:
    """Check that a tensor's memory is there; torch itself would read through a null pointer."""
    if torch.compiler.is_compiling() or type(value) not in (Tensor, torch.nn.Parameter):
        return
    try:
        size = value.untyped_storage().nbytes()
    except (RuntimeError, NotImplementedError):  # inside torch.func's transforms
        return
    if size == 0 and value.numel() and not value._is_zerotensor():
        raise not_allocated(name)


def not_allocated(name: str) -> ValueError:
    return fail(name, "a Tensor with memory", "one whose storage was freed")


def logits(student: Tensor, teacher: Tensor, least: int = 2, teacher_grad: bool = False) -> int:
    """Check a pair of logits and return the dimension that holds the classes.

    (N, C) and (B, S, V) keep the classes last; (N, C, H, W) keeps them in dim 1, as
    ``torch.nn.functional.cross_entropy`` does. ``least`` classes there must be. The teacher is a
    constant unless ``teacher_grad`` wants its gradient.
    """
    if not isinstance(student, Tensor) or student.layout is not torch.strided:
        tensor("student_logits", student)
    if not isinstance(teacher, Tensor) or teacher.layout is not torch.strided:
        tensor("teacher_logits", teacher)
    try:
        shape, others = student.shape, teacher.shape
    except RuntimeError:  # nested tensors have none
        tensor("student_logits", student)
        tensor("teacher_logits", teacher)
        raise
    if shape != others:
        expected = f"of the student's shape {tuple(shape)}"
        if len(shape) == 4 == len(others) and shape[:2] == others[:2]:
            expected += " (KD takes maps of two sizes: resize='bilinear')"
        raise fail("teacher_logits", expected, tuple(others))
    rank = len(shape)
    if rank == 2:
        class_dim = 1
    elif rank == 3:
        class_dim = 2
    elif rank == 4:
        class_dim = 1
    else:
        raise fail("student_logits", "(N, C), (B, S, V) or (N, C, H, W)", f"shape {tuple(shape)}")
    if shape[class_dim] < least:
        expected = TWO_CLASSES if least > 1 else ONE_CLASS
        raise fail("student_logits", expected, f"shape {tuple(shape)}")
    if student.dtype not in FLOATS:
        dtype("student_logits", student)
    if teacher.dtype not in FLOATS:
        dtype("teacher_logits", teacher)
    if not (student.is_cpu and teacher.is_cpu) and student.device != teacher.device:
        raise fail("teacher_logits", f"on the student's device {student.device}", teacher.device)
    if teacher.requires_grad and not teacher_grad:
        constant("teacher_logits", teacher, ", or give teacher_grad=True for its gradient")
    return class_dim


def constant(name: str, value: Tensor, other: str = "") -> None:
    """Check that a teacher's tensor is a constant; ``other`` says what else there is to do."""
    if value.requires_grad and torch.is_grad_enabled():
        raise fail(
            name,
            f"a constant (call .detach() on it, or run the teacher under torch.no_grad(){other})",
            "a tensor that requires grad",
        )


def target(
    value: Any, student: Tensor, class_dim: int, name: str = "target", mask: bool = False
) -> None:
    """Check the class indices: one integer for each row of the logits, on the same device.

    Where they are but a ``mask`` they may be bools too.
    """
    tensor(name, value, "a Tensor of class indices")
    _one_a_row(name, value, student, class_dim)
    if value.dtype not in INTEGERS and not (mask and value.dtype == torch.bool):
        expected = "integer class indices" + (" or a bool mask" if mask else "")
        raise fail_type(name, expected, value.dtype)


def token_weight(value: Any, student: Tensor, class_dim: int, name: str = "token_weight") -> None:
    """Check the weights: one number for each row of the logits, a constant, on the same device."""
    tensor(name, value)
    _one_a_row(name, value, student, class_dim)
    dtype(name, value)
    constant(name, value)
    allocated(name, value)


def _one_a_row(name: str, value: Tensor, student: Tensor, class_dim: int) -> None:
    shape = student.shape
    rows = shape[:class_dim] + shape[class_dim + 1 :]
    if value.shape != rows:
        raise fail(name, f"of shape {tuple(rows)}", tuple(value.shape))
    if value.device != student.device:
        raise fail(name, f"on the student's device {student.device}", value.device)


def on_device(name: str, value: Tensor, device: torch.device) -> Tensor:
    """A 0-d tensor that lies where the student's device can read it without the host."""
    if not value.is_cpu and value.device != device:
        raise fail(name, f"on the CPU or on the student's device {device}", value.device)
    return keepable(value)


def row_temperature(value: Tensor, student: Tensor, class_dim: int) -> None:
    """Check a temperature that is a tensor: 0-d, or one number for each row of the logits."""
    name = "temperature"
    tensor(name, value)
    if value.dim():
        _one_a_row(name, value, student, class_dim)
        dtype(name, value)
        return
    scalar(name, value)
    if value.device != student.device and not value.is_cpu:
        raise fail(name, f"on the student's device {student.device}", value.device)


def temperature_range(value: Tensor) -> None:
    """Check temperatures of a CPU tensor (reads the data)."""
    bad = ~((value >= COLDEST) & (value <= HOTTEST))
    if bad.any():
        raise fail("temperature", f"in [{COLDEST:g}, {HOTTEST:g}]", float(value[bad].flatten()[0]))


def items(value: Any, reduction: str) -> Any:
    """``num_items_in_batch``: a number > 0, or a 0-d tensor, which nothing reads on the host."""
    if REDUCTIONS[reduction] != 1:
        raise fail("reduction", "'mean' where num_items_in_batch is given", repr(reduction))
    if isinstance(value, Tensor):
        scalar("num_items_in_batch", value)
        constant("num_items_in_batch", value)
        return torch.where(value == 0, 1, value)  # no items: the sum over them is 0, and stays so
    return positive("num_items_in_batch", value)


def target_range(value: Tensor, classes: int, ignore_index: int) -> None:
    """Check the class indices of a CPU tensor against the classes (reads the data)."""
    value = value.long()  # a comparison in a narrow type wraps the number of classes
    bad = ((value < 0) | (value >= classes)) & (value != ignore_index)
    if bad.any():
        raise target_out_of_range(classes, ignore_index, int(value[bad][0]))


def target_out_of_range(classes: int, ignore_index: int, got: Any) -> ValueError:
    return fail("class indices", f"in [0, {classes}) or ignore_index={ignore_index}", got)


def reduction(value: Any) -> int:
    """Return the code of a reduction name."""
    code = REDUCTIONS.get(value) if isinstance(value, str) else None
    if code is None:
        raise fail("reduction", "'mean', 'batchmean', 'sum' or 'none'", repr(value))
    return code


def choice(name: str, value: Any, choices: tuple[str, ...]) -> str:
    """One of some words."""
    if value not in choices:
        *most, last = map(repr, choices)
        expected = f"{', '.join(most)} or {last}" if most else last
        raise fail(name, expected, repr(value))
    return str(value)


def number(name: str, value: Any) -> float:
    """A finite number: Python's, NumPy's, or a 0-d tensor that the host can read."""
    if not isinstance(value, (float, int)) or isinstance(value, bool):
        value = _to_number(name, value)
    elif not isinstance(value, float):
        value = _to_float(name, value)
    if not -LARGEST <= value <= LARGEST:  # math.isfinite would break the compiler's graph
        if not -math.inf < value < math.inf:
            raise fail(name, "finite", value)
        raise fail(name, f"at most {LARGEST:g} in magnitude", value)
    return value


def _to_number(name: str, value: Any) -> float:
    if isinstance(value, Tensor):
        scalar(name, value)
        if not value.is_cpu:
            raise fail_type(
                name,
                "a number (read a tensor with .item(), for which the host waits)",
                f"a Tensor on {value.device}",
            )
        constant(name, value)
        return float(value.item())
    real = isinstance(value, numbers.Real) or not isinstance(value, numbers.Complex)
    if not isinstance(value, numbers.Number) or isinstance(value, bool) or not real:
        raise fail_type(name, "a number", type(value).__name__)
    return _to_float(name, value)


def _to_float(name: str, value: Any) -> float:
    try:
        return float(value)
    except OverflowError:
        raise fail(name, "finite", "a number beyond any float") from None


def scalar(name: str, value: Tensor) -> None:
    """Check a tensor that stands for a number."""
    tensor(name, value)
    if value.dim() or value.dtype not in FLOATS | INTEGERS:
        raise fail_type(
            name,
            "a number or a 0-d Tensor",
            f"a Tensor of shape {tuple(value.shape)}, {value.dtype}",
        )


def weight(value: Any) -> Any:
    """``loss_weight``: a number, or a 0-d tensor, which nothing reads on the host."""
    if isinstance(value, Tensor):
        scalar("loss_weight", value)
        return value
    return number("loss_weight", value)


def positive(name: str, value: Any) -> float:
    value = number(name, value)
    if value <= 0.0:
        raise fail(name, "> 0", value)
    return value


def temperature(value: Any, name: str = "temperature") -> float:
    value = positive(name, value)
    if not COLDEST <= value <= HOTTEST:
        raise fail(name, f"in [{COLDEST:g}, {HOTTEST:g}]", value)
    return value


def non_negative(name: str, value: Any) -> float:
    value = number(name, value)
    if value < 0.0:
        raise fail(name, ">= 0", value)
    return value


def fraction(name: str, value: Any) -> float:
    value = number(name, value)
    if not 0.0 <= value <= 1.0:
        raise fail(name, "in [0, 1]", value)
    return value


def flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        if getattr(getattr(value, "dtype", None), "kind", "") == "b" and not value.shape:
            return bool(value)  # NumPy's
        raise fail_type(name, "a bool", type(value).__name__)
    return value


def integer(name: str, value: Any) -> int:
    if type(value) is not int:
        value = _to_int(name, value)
    if not -(2**63) <= value < 2**63:
        raise fail(name, "an int of 64 bits", value)
    return value


def at_least_one(name: str, value: Any) -> int:
    """Return a number of things of which there must be one."""
    number = integer(name, value)
    if number < 1:
        raise fail(name, ">= 1", value)
    return number


def _to_int(name: str, value: Any) -> int:
    """NumPy's integers and what else is an integer by its own account; no bool, no GPU tensor."""
    boolean = isinstance(value, bool) or getattr(value, "dtype", None) == torch.bool
    if not boolean and not (isinstance(value, Tensor) and not value.is_cpu):
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise fail_type(name, "an int", type(value).__name__)


def given(target: Any, labels: Any) -> Any:
    """The class indices, by whichever of their two names they were given."""
    if labels is None:
        return target
    if target is not None:
        raise fail_type("labels", "None where target is given (they are one argument)", "both")
    return labels


def batch_reduction(value: Any) -> int:
    """Return the code of a reduction name for a loss that couples the rows."""
    code = REDUCTIONS.get(value) if isinstance(value, str) else None
    if not code:
        raise fail("reduction", "'mean', 'batchmean' or 'sum'", repr(value))
    return code

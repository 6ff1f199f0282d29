"""Who looks on while a loss is computed: compilers, recorders, transforms.

Three questions, asked on every call, so each is a few attribute look-ups:

- ``traced``: someone must see operators instead of a call by address.
- ``transformed``: someone differentiates or vectorises Python itself (``torch.func``, forward-mode
  derivatives); only the reference, plain PyTorch, can be seen through by those.
- ``recorded``: ``torch.jit.trace`` and the ONNX exporter that is built on it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

_PLAIN_TYPES = (Tensor, torch.nn.Parameter)
_PIVOTS = (0.1234567, 1.1234567, 17.1234567)
"""A constant is known to lie on one side of each; of a symbol that is not known."""


def plain(tensor: Tensor) -> bool:
    """Whether a tensor is no subclass, so that its address and values are its own."""
    return type(tensor) in _PLAIN_TYPES


def traced(*tensors: Tensor) -> bool:
    """Whether someone looks on who must see operators: the compiler, a mode that records or fakes,
    a recorder of the jit, a subclass of Tensor. Addresses and values are hidden from them, or not
    there at all."""
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
    ):
        return True
    for tensor in tensors:  # noqa: SIM110 - `any` would take twice the time, on every call
        if type(tensor) not in _PLAIN_TYPES:
            return True
    return False


def readable(*tensors: Tensor) -> bool:
    """Whether the host may read values: of the CPU, where nobody looks on."""
    return tensors[0].device.type == "cpu" and not traced(*tensors) and not transformed()


def transformed() -> bool:
    """Whether a ``torch.func`` transform or a level of forward-mode derivatives is active."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def recorded() -> bool:
    """Whether ``torch.jit.trace`` records."""
    return not torch.compiler.is_compiling() and torch._C._get_tracing_state() is not None


def symbolic_numbers(numbers: Sequence[float]) -> Tensor | None:
    """The numbers as one float64 tensor where a compiler holds one of them as a symbol.

    A number that changes from call to call (a scheduled temperature) becomes a symbol after its
    first change. An operator's float argument would make it a constant again, and every new value
    a compilation; a product with a tensor keeps it a value of the graph. Numbers that never change
    stay constants (None), which a CUDA graph can hold.
    """
    if not torch.compiler.is_compiling():
        return None
    from torch.fx.experimental.symbolic_shapes import statically_known_true as known

    if all([known(x < pivot) or known(x >= pivot) for x in numbers for pivot in _PIVOTS]):
        return None
    one = torch.ones((), dtype=torch.float64, device="cpu")
    return torch.stack([one * x for x in numbers])


def operand(number: float) -> float | Tensor:
    """A number for an operation that would make a constant of it under a compiler, and so compile
    again for its next value: a power, a bound. There it becomes a 0-d tensor."""
    if not torch.compiler.is_compiling():
        return number
    return torch.ones((), dtype=torch.float64, device="cpu") * number


def keepable(constant: Tensor) -> Tensor:
    """A copy of a tensor of inference mode, which autograd does not keep; a compiler cannot ask."""
    if not torch.compiler.is_compiling() and constant.is_inference():
        return constant.clone()
    return constant

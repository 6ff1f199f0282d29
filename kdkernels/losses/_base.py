"""What the losses share: their common keywords, and modules that are bound from functions."""

from __future__ import annotations

import copy
import functools
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, ParamSpec

from torch import Tensor
from torch.nn.modules.loss import _Loss

from .. import _checks, _dispatch, _group
from .._ensemble import TeacherLogits
from .._rowwise import row_loss
from ..reference._rows import weighted

P = ParamSpec("P")
Check = Callable[[str, Any], Any]
"""The checked value of an option, from its name and what was given."""


def weighed(function: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Let a loss's ``loss_weight`` be a 0-d tensor, which multiplies the loss where it is computed.

    The kernels take numbers, and to read one from a GPU the host would have to wait.
    """

    @functools.wraps(function)
    def call(*args: P.args, **options: P.kwargs) -> Tensor:
        if "loss_weight" in options and isinstance(options["loss_weight"], Tensor):
            return _weigh(function, options["loss_weight"], *args, **options)
        return function(*args, **options)

    return call


def _weigh(function: Callable[..., Tensor], weight: Tensor, *args: Any, **options: Any) -> Tensor:
    _checks.weight(weight)
    options["loss_weight"] = 1.0
    loss = function(*args, **options)
    return weighted(loss, _checks.on_device("loss_weight", weight, loss.device).to(loss.dtype))


class LossModule(_Loss):
    """A loss module: holds what its function takes besides the tensors of ``forward``, and nothing
    else. ``bind`` says which function that is (``registry.register`` calls it)."""

    _function: ClassVar[Callable[..., Any]]
    _checks_of: ClassVar[Mapping[str, Check]]
    _bound: ClassVar[inspect.Signature]
    __signature__: ClassVar[inspect.Signature]

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "__init__" in cls.__dict__:  # a user's own constructor
            own = list(inspect.signature(cls.__init__).parameters.values())
            cls.__signature__ = inspect.Signature(own[1:])

    @classmethod
    def bind(cls, function: Callable[..., Any], checks: Mapping[str, Check]) -> None:
        """``checks`` are those of the function's own options."""
        given = inspect.signature(cls.forward).parameters
        parameters = inspect.signature(function).parameters.values()
        cls._function = staticmethod(function)
        cls._checks_of = {**_CHECKS, **checks}
        cls._bound = inspect.Signature([p for p in parameters if p.name not in given])
        cls.__signature__ = cls._bound

    def __init__(self, *args: Any, **options: Any) -> None:
        try:
            bound = self._bound.bind(*args, **options)
        except TypeError as error:
            raise TypeError(f"{type(self).__name__}() {error}") from None
        bound.apply_defaults()
        given = {name: self._checks_of[name](name, x) for name, x in bound.arguments.items()}
        super().__init__(reduction=given["reduction"])
        for name, value in given.items():
            setattr(self, name, value)

    def _held(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._bound.parameters}

    def __deepcopy__(self, memo: dict[int, Any]) -> LossModule:
        """Of a model that holds its loss, say: the copies share the groups, which have no copy."""
        for group in map(self.__dict__.get, ("process_group", "tp_group")):
            memo[id(group)] = group
        new = self.__class__.__new__(self.__class__)
        memo[id(self)] = new
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return new

    def extra_repr(self) -> str:
        return ", ".join(f"{key}={value!r}" for key, value in self._held().items())


def optional(check: Check) -> Check:
    """Of an option that may be None."""
    return lambda name, value: None if value is None else check(name, value)


def _backend(name: str, value: Any) -> Any:
    _dispatch.known(value)
    return value


def number_temperature(name: str, value: Any) -> float:
    """A temperature that may not be a tensor."""
    return _checks.temperature(value, name)


def by_row(name: str, value: Any) -> Any:
    """A reduction of a loss that has one value a row."""
    _checks.reduction(value)
    return value


def of_batch(name: str, value: Any) -> Any:
    """A reduction of another loss."""
    _checks.batch_reduction(value)
    return value


def _temperature(name: str, value: Any) -> Any:
    """A tensor is checked where the logits are known."""
    return value if isinstance(value, Tensor) else _checks.temperature(value, name)


_CHECKS: dict[str, Check] = {
    "reduction": by_row,
    "loss_weight": lambda name, value: _checks.weight(value),
    "backend": optional(_backend),
    "temperature": _temperature,
    "hard_weight": _checks.number,
    "return_parts": _checks.flag,
    "return_mass": _checks.flag,
    "teacher_grad": _checks.flag,
    "ignore_index": optional(_checks.integer),
    "standardize": _checks.flag,
    "class_dim": optional(_checks.integer),
    "process_group": lambda name, value: _group.check(value),
    "tp_group": lambda name, value: _group.check(value, name),
}


class TokenLoss(LossModule):
    """A loss of tokens: ``labels`` are a mask."""

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: TeacherLogits,
        labels: Tensor | None = None,
        *,
        token_weight: Tensor | None = None,
        num_items_in_batch: float | Tensor | None = None,
    ) -> Tensor:
        return self._function(
            student_logits,
            teacher_logits,
            labels=labels,
            token_weight=token_weight,
            num_items_in_batch=num_items_in_batch,
            **self._held(),
        )


class SampledLoss(LossModule):
    """A loss of sampled tokens: their ids and log-probabilities are the teacher."""

    def forward(
        self,
        student_logits: Tensor,
        sampled_ids: Tensor,
        teacher_logprob: Tensor,
        labels: Tensor | None = None,
        *,
        token_weight: Tensor | None = None,
        num_items_in_batch: float | Tensor | None = None,
    ) -> Tensor:
        return self._function(
            student_logits,
            sampled_ids,
            teacher_logprob,
            labels=labels,
            token_weight=token_weight,
            num_items_in_batch=num_items_in_batch,
            **self._held(),
        )


class SparseLoss(LossModule):
    """A loss of tokens against a sparse teacher: K ids a row with their log-probabilities."""

    def forward(
        self,
        student_logits: Tensor,
        teacher_ids: Tensor,
        teacher_logprobs: Tensor,
        labels: Tensor | None = None,
        *,
        log_rest: Tensor | None = None,
        token_weight: Tensor | None = None,
        num_items_in_batch: float | Tensor | None = None,
    ) -> Any:
        return self._function(
            student_logits,
            teacher_ids,
            teacher_logprobs,
            labels=labels,
            log_rest=log_rest,
            token_weight=token_weight,
            num_items_in_batch=num_items_in_batch,
            **self._held(),
        )


class RowLoss(LossModule):
    """A loss of classifiers, whose class indices are called ``target`` or ``labels``."""

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: TeacherLogits,
        target: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        token_weight: Tensor | None = None,
        num_items_in_batch: float | Tensor | None = None,
    ) -> Tensor:
        return self._function(
            student_logits,
            teacher_logits,
            target=target,
            labels=labels,
            token_weight=token_weight,
            num_items_in_batch=num_items_in_batch,
            **self._held(),
        )


# What the row losses' docstrings share, in the order of the arguments.
_ARGUMENTS = {
    "student_logits": """(N, C), (B, S, V) with classes last, or (N, C, H, W); float64, float32,
        float16 or bfloat16; any strides.""",
    "teacher_logits": """same shape and device; own dtype and strides; a constant. Of several,
        a list or :class:`kdkernels.teacher.EnsembleTeacher`, the probabilities are averaged.""",
    "temperature": """T > 0, in units of the logits; a number, or a tensor, 0-d or of the shape of
        the rows, which nothing reads on the host of a GPU. KD gives a learned one (CTKD) its
        gradient; elsewhere it is a constant.""",
    "ignore_index": """rows with this label contribute exact zeros, even if they hold NaN. None
        ignores no row.""",
    "reduction": """``'mean'`` (alias ``'batchmean'``) over the rows that are not ignored,
        ``'sum'``, or ``'none'`` (one value a row). Never over classes.""",
    "loss_weight": "multiplies the loss inside the kernel; a 0-d tensor multiplies the result.",
    "hard_weight": """adds ``hard_weight * cross_entropy(student_logits, labels)`` in the same pass:
        at temperature 1, of the same rows, with their ``token_weight`` and denominator. It needs
        class indices, and ``loss_weight`` does not multiply it.""",
    "token_weight": """one number a row, of the shape of the rows, which multiplies its loss; a
        constant. The mean's denominator stays the number of rows.""",
    "return_parts": """gives ``(loss, parts)``: ``parts.distillation`` and ``parts.hard``, whose sum
        is the loss, and ``parts.entropy``, that of the student's softened distribution in nats, one
        value a row (0 where it is ignored); all detached, from the same pass.""",
    "teacher_grad": """gives the teacher its gradient too, for mutual learning (Zhang et al., CVPR
        2018; 1706.00384); the loss stays as it is. A second call of the kernels makes it, of the
        loss with the roles exchanged; of DKD and AEKT two calls do, on copies of the logits without
        their targets, and of sigmoid KD torch's operations. Not of several teachers, nor of DKD and
        AEKT beside ``tp_group``. False: a teacher that requires grad raises.""",
    "num_items_in_batch": """the denominator of ``'mean'`` where a step's batch comes in parts: a
        number, or a 0-d tensor, which nothing reads on the host.""",
    "standardize": """logit standardisation (Sun et al., CVPR 2024): each row of both inputs is
        ``(x - mean) / (std + 1e-7)`` first.""",
    "class_dim": """the dimension of the classes in logits of any shape, such as 1 for (N, C, L) and
        (N, C, D, H, W), 0 for (C,); targets and weights have that shape without it. None: 1 of
        (N, C) and (N, C, H, W), the last of (B, S, V).""",
    "process_group": """``'mean'`` is over the rows of all ranks of this torch.distributed group, on
        which one number is summed, without the host. The loss is W times the rank's sum over that
        number of rows, with W ranks: the average over the ranks of the losses is the mean, and that
        of their gradients, which DistributedDataParallel takes, is its gradient. A rank may have
        no rows. Every rank must call. None: the rows of this process alone.""",
    "tp_group": """the classes are those of all ranks of this torch.distributed group, which hold
        the same rows: logits are (rows, V_r) on rank r, whose classes follow those of rank r - 1;
        the V_r may differ, or be 0. Class indices are global. The loss is the same on every rank,
        and each rank's gradient is its part of that of one process, not W times it. 40 bytes a rank
        are exchanged first, which the host reads, then numbers of each row: 24 bytes for KD and
        reverse KL, none in the backward pass, 24 (40 with a target) for the others and 8 W (16 W)
        backward, 8 (K + W) for K ids; 16 for a cross-entropy or the entropy. Every rank must call,
        and call backward. None: all classes are here.""",
    "backend": "``'native'``, ``'triton'``, ``'reference'``; None chooses.",
}
_MASK = """optional, only a mask: class indices, (N,), (B, S) or (N, H, W), of which
        ``ignore_index`` is ignored, or bools, of which True counts."""
_OTHER_NAME = "another name of ``target``, for those who pass it by that keyword."


def row_function(options: type) -> Callable[[Callable[P, Tensor]], Callable[P, Tensor]]:
    """Write out the common keywords of a row loss: in its signature, and in its docstring.

    ``options`` is the dictionary's type that its last parameter unpacks. The docstring of the loss
    ends with its own arguments, if there are any.
    """
    taken = options.__annotations__
    keywords = [p for p in inspect.signature(row_loss).parameters.values() if p.name in taken]

    def write_out(function: Callable[P, Tensor]) -> Callable[P, Tensor]:
        own = list(inspect.signature(function).parameters.values())[:-1]
        signature = inspect.Signature([*own, *keywords], return_annotation="Tensor")
        function.__signature__ = signature  # type: ignore[attr-defined]
        function.__doc__ = _documented(function.__doc__, list(signature.parameters))
        return function

    return write_out


def _documented(text: str | None, names: list[str]) -> str | None:
    if text is None:  # python -OO
        return None
    said, _, given = inspect.cleandoc(text).partition("\n\nArgs:\n")
    about = dict(_ARGUMENTS)
    for entry in re.split(r"\n(?=    \w)", given):
        name, _, description = entry.strip().partition(": ")
        about[name] = description
    about.setdefault("target", _MASK)
    about.setdefault("labels", _OTHER_NAME if "target" in names else _MASK)
    lines = [f"    {name}: {about[name]}" for name in names]
    return "\n".join([said, "", "Args:", *lines, "", _RESULT])


_RESULT = """Returns:
    float32 (float64 for float64 inputs); 0-d, or one value a row for ``'none'``.

Raises:
    ValueError, TypeError: ``name must be <expected>, got <got>``."""

"""Random calls of every loss of the registry, judged by formulas written apart from the project.

    python tests/fuzz.py --minutes 10                  every backend that runs here but Triton
    TRITON_INTERPRET=1 python tests/fuzz.py --backends triton
    python tests/fuzz.py --every-capability            each instruction set in turn
    python tests/fuzz.py --seed 1234567 --cases 1      one case again: failures print their seed
    make fuzz FUZZ_ARGS='--minutes 60'                 the first three, one after the other
    make fuzz-sanitized                                likewise on a build with ASan and UBSan

A case is a loss, inputs of any values, dtypes and layouts in memory, options at 0, usual and
extreme, a reduction, a mask, an upstream gradient, a backend and an entry point. Judged are the
value and the gradient, their dtypes and shapes, what stays untouched, the bits of a second pass and
of a row on its own, ignored rows and bad rows. A fifth of the cases has one bad argument, which
must be refused by name in the grammar ``name must be <expected>, got <got>``.

A result may err as its dtype explains: by K times what the formula moves when every scaled logit
moves by one rounding error, and by a few roundings of its own size.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import inspect
import os
import random
import re
import subprocess
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# The checkout's package, unless PYTHONPATH names another build of it.
sys.path.insert(0, str(Path(__file__).resolve().parent))
if not os.environ.get("PYTHONPATH"):
    sys.path.insert(1, str(Path(__file__).resolve().parent.parent))

import fuzz_formulas as formulas
import numpy as np
import torch
from fuzz_inputs import BAD_VALUES, Draw, NotSuitable
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kdkernels import _dispatch
from kdkernels.registry import SPECS, LossSpec

K = 32.0
GRAMMAR = re.compile(r"(\w+) must be .+, got .+", re.DOTALL)
ENTRIES = ("function", "function", "module", "operator")


class Wrong(AssertionError):
    """A promise that did not hold."""


@dataclass
class Case:
    seed: int
    spec: LossSpec
    backend: str
    entry: str
    tensors: dict[str, Tensor]
    options: dict[str, Any]
    plain: dict[str, Any] = field(default_factory=dict)
    """The options as Python's numbers, defaults included."""
    bad: str = ""
    """The argument that must be refused."""

    def __call__(self, **changed: Any) -> Tensor:
        tensors = {**self.tensors, **{k: v for k, v in changed.items() if k in self.tensors}}
        options = {**self.options, **{k: v for k, v in changed.items() if k not in self.tensors}}
        options.setdefault("backend", self.backend)
        if self.entry == "module":
            return self.spec.module(**options)(**tensors)
        with _Watched() if self.entry == "operator" else contextlib.nullcontext():
            return self.spec.function(**tensors, **options)

    def __str__(self) -> str:
        def describe(x: Any) -> str:
            if not isinstance(x, Tensor):
                return repr(x)
            return f"{str(x.dtype).removeprefix('torch.')}{tuple(x.shape)}{x.stride()}"

        with contextlib.suppress(Exception):
            shown = {**self.tensors, **self.options}
            arguments = ", ".join(f"{name}={describe(value)}" for name, value in shown.items())
            return f"{self.spec.name} on {self.backend} by {self.entry}: {arguments}"
        return f"{self.spec.name} on {self.backend} by {self.entry}"


class _Watched(TorchDispatchMode):
    """A mode that changes nothing: where one is active, the losses are operators."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def backends_of(spec: LossSpec, wanted: Sequence[str]) -> list[str]:
    return [b for b in wanted if not _dispatch.why_not(spec, b, torch.empty(0))]


def make(seed: int, wanted: Sequence[str], names: Sequence[str] = ()) -> Case:
    draw = Draw(random.Random(seed), small="triton" in wanted)
    spec = SPECS[draw.pick(names or [*SPECS])]
    backend = draw.pick(backends_of(spec, wanted) or ["reference"])
    parameters = inspect.signature(spec.function).parameters
    tensors = draw.inputs(spec)
    options, plain = draw.options(spec, tensors)
    case = Case(seed, spec, backend, draw.pick(ENTRIES), tensors, options, plain)
    if draw.chance(0.2):
        case.bad = draw.pick([n for n in parameters if n in tensors or n in BAD_VALUES])
        draw.spoil(case.tensors, case.options, case.bad, parameters)
    elif "labels" in parameters and "target" in tensors and draw.chance(0.2):
        case.tensors["labels"] = case.tensors.pop("target")
    return case


def judge(case: Case) -> None:
    """Raise unless a case keeps every promise."""
    if case.bad:
        return refused(case)
    before = {name: (x._version, x.clone()) for name, x in case.tensors.items()}
    leaves = differentiable(case)
    loss, gradients, upstream = run(case, leaves)
    for name, (version, copy) in before.items():
        if case.tensors[name]._version != version or not same(case.tensors[name], copy):
            raise Wrong(f"{name} was written into")
    soft = ("target", "labels")  # whose probabilities do not widen the loss
    wide = any(x.dtype == torch.float64 for n, x in case.tensors.items() if n not in soft)
    if loss.dtype != (torch.float64 if wide else torch.float32):
        raise Wrong(f"the loss is {loss.dtype}")
    for name, gradient in gradients.items():
        if gradient.dtype != leaves[name].dtype or gradient.shape != leaves[name].shape:
            raise Wrong(f"the gradient of {name} is {gradient.dtype}, {tuple(gradient.shape)}")
    if case.spec.name in formulas.ROWS:
        by_rows(case, loss, gradients, upstream)
    else:
        by_batch(case, loss, gradients, upstream)
    again, others, _ = run(case, leaves, upstream)
    if not same(loss, again) or not all(same(gradients[n], others[n]) for n in gradients):
        raise Wrong("a second call has other bits")


def refused(case: Case) -> None:
    try:
        loss = case()
    except (ValueError, TypeError) as error:
        match = GRAMMAR.fullmatch(str(error))
        if not match or match[1] not in {case.bad, *case.spec.module().__dict__, *case.tensors}:
            raise Wrong(f"{case.bad} is refused as {type(error).__name__}: {error}") from error
        if match[1] != case.bad and case.bad not in case.tensors:
            raise Wrong(f"{case.bad} is bad, and {match[1]} is blamed: {error}") from error
        return
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        raise Wrong(f"{case.bad} is refused as {text:.300}") from error
    raise Wrong(f"{case.bad} is bad and was taken, the loss is {loss}")


def differentiable(case: Case) -> dict[str, Tensor]:
    """The student's tensors, which take gradients."""
    if case.spec.name == "iekd":
        return {n: case.tensors[n] for n in ("inheritance_factor", "exploration_factor")}
    name = next(iter(case.tensors))
    return {name: case.tensors[name]}


def run(
    case: Case, leaves: dict[str, Tensor], upstream: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    leaves = {name: x.detach().requires_grad_() for name, x in leaves.items()}
    loss = case(**leaves)
    if upstream is None:
        draw = Draw(random.Random(case.seed + 1))
        factor = draw.pick([1.0, 1.0, -2.5, 0.25, 0.0, 1024.0])
        upstream = torch.full_like(loss, factor)
        if loss.dim():
            generator = torch.Generator().manual_seed(case.seed)
            upstream = upstream * (torch.rand(loss.shape, generator=generator) - 0.25).to(loss)
    inputs = list(leaves.values())
    first = torch.autograd.grad(loss, inputs, upstream, retain_graph=True)
    second = torch.autograd.grad(loss, inputs, upstream)
    if not all(same(a, b) for a, b in zip(first, second, strict=True)):
        raise Wrong("a second backward pass has other bits")
    with torch.no_grad():
        alone = case()
    # Without a gradient a sum may take another order.
    alike = torch.allclose(alone, loss, rtol=1e-4, atol=1e-6, equal_nan=True)
    if not alike and not bool((alone.isinf() | loss.isinf()).any()):
        raise Wrong(f"without a graph the loss is {alone}, with one {loss.detach()}")
    return loss.detach(), dict(zip(leaves, first, strict=True)), upstream


def same(a: Tensor, b: Tensor) -> bool:
    """Equal bits, whatever those of a NaN."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    a, b = (x.masked_fill(x.isnan(), torch.nan).resolve_neg().contiguous() for x in (a, b))
    return torch.equal(a.view(kind), b.view(kind))


# Rows.


def class_dim(logits: Tensor) -> int:
    return 1 if logits.dim() in (2, 4) else 2


def flat(logits: Tensor) -> np.ndarray[Any, Any]:
    rows = logits.detach().double().resolve_neg().movedim(class_dim(logits), -1)
    return rows.reshape(-1, rows.shape[-1]).numpy().astype(formulas.WIDE)


def by_rows(case: Case, loss: Tensor, gradients: dict[str, Tensor], upstream: Tensor) -> None:
    spec, options = case.spec, dict(case.plain)
    student, teacher = case.tensors["student_logits"], case.tensors["teacher_logits"]
    index = case.tensors.get("target", case.tensors.get("labels"))
    s, t = flat(student), flat(teacher)
    count, classes = s.shape
    valid = np.ones(count, bool)
    target = np.zeros(count, np.int64)
    soft = index is not None and index.is_floating_point()
    if soft:
        probabilities = flat(index)
    elif index is not None:
        target = index.reshape(-1).numpy().astype(np.int64)
        valid = target != options["ignore_index"]
        target = np.where(valid & (target >= 0) & (target < classes), target, 0)
    formula, cross_entropy = formulas.ROWS[spec.name], formulas.hard
    if soft:
        formula, cross_entropy = (
            functools.partial(formulas.expected, f, probabilities) for f in (formula, cross_entropy)
        )

    wide = loss.dtype == torch.float64
    hard = formulas.WIDE(options.pop("hard_weight", 0.0))
    # Autograd of the plain formula takes no pivot; the kernels do.
    info = torch.finfo(torch.float64 if wide else torch.float32)
    # An error of the formula's own, over this unit, is a size: ``close`` allows K eps / 2 of one.
    unit = K * formulas.WIDE(info.eps) / 2
    options = {**options, "unit": unit, "tiny": info.tiny, "pivot": case.backend != "reference"}
    flushed, least = (1e-307, 5e-324) if wide else (1e-37, 1.4e-45)

    def exact(move: Callable[[Any], Any], floor: float = flushed) -> tuple[Any, Any, Any]:
        with np.errstate(all="ignore"):
            value, slope, size = formula(s, t, target, {**options, "floor": floor}, move)
            if hard:
                added = cross_entropy(s, t, target, hard, move)
                value, slope, size = value + added[0], slope + added[1], size + added[2]
        ours = valid[:, None]
        return np.where(valid, value, 0), np.where(ours, slope, 0), np.where(ours, size, 0)

    value, slope, terms = exact(lambda x: x)
    moves = [exact(rounding(wide, seed, case.backend == "reference")) for seed in range(6)]
    factor = upstream.reshape(-1).double().numpy().astype(formulas.WIDE)
    mean = options["reduction"] in ("mean", "batchmean")
    share = max(int(valid.sum()), 1) if mean else 1
    actual = loss.reshape(-1).double().numpy()
    gradient = flat(gradients["student_logits"])
    # A subnormal probability may count as 0 or not, which decides whether the row is infinite.
    kept, kept_slope, _ = exact(lambda x: x, least)
    either = np.isinf(kept) & np.isfinite(value)
    if hard:  # which may be infinite by itself
        either |= np.isnan(kept_slope).any(-1) & ~np.isnan(slope).any(-1)
    # A factor that underflows on the way costs what the factors behind it make of it.
    weights = max(1.0, *(abs(float(options.get(n, 1.0))) for n in ("alpha", "beta")))
    weights *= abs(float(options["loss_weight"])) * max(options["temperature"], 1.0) ** 2
    weights += abs(float(hard))
    lost = formulas.WIDE(info.smallest_normal) * weights / K
    value = np.where(either & ~np.isfinite(actual), kept, value)
    slope = np.where((either & ~np.isfinite(gradient).all(1))[:, None], kept_slope, slope)
    of_mixture = lost * classes * formulas.held(spec.name, options)
    noise = np.stack([abs(v - value) for v, _, _ in moves]).max(0) + lost + of_mixture
    # Powers of subnormal probabilities are normal numbers, four times too large at worst.
    both = np.isfinite(kept) & np.isfinite(value)
    noise = noise + np.where(both, 4 * abs(np.where(both, kept - value, 0)), 0) / K
    # Pairwise sums of n terms, those of the divergence and of the probabilities: half a rounding
    # each for every level. Equal distributions differ by the formula's own rounding, squared.
    size = np.where(np.isfinite(value), abs(value), 0)
    if hard:  # two sums, which may cancel
        with np.errstate(all="ignore"):
            entropy = np.where(valid, abs(cross_entropy(s, t, target, hard, lambda x: x)[0]), 0)
        size = size + 2 * np.where(np.isfinite(entropy), entropy, 0)
    own = (32 * formulas.WIDE(np.finfo(formulas.WIDE).eps)) ** 2 * weights
    noise = noise + (formulas.WIDE(info.eps) * np.log2(classes) * size + own) / K
    if soft and wide:  # logarithms of float64, which are good enough for float32's near equality
        noise = noise + formulas.WIDE(info.eps) * np.log2(classes) * weights / K * 4
    if options["reduction"] == "none":
        close(actual, value, noise, loss.dtype, "loss")
        if (actual[~valid] != 0).any():
            raise Wrong("an ignored row has a loss")
    else:
        with np.errstate(all="ignore"):
            total = value.sum() / share
        finite = np.where(np.isfinite(noise), noise, 0)
        size = size.sum()
        extra = finite.sum() / share + formulas.WIDE(torch.finfo(loss.dtype).eps) * size / share / K
        close(actual, np.array([total]), np.array([extra]), loss.dtype, "loss")
    # An infinite loss, whose weight may be 0, of which the formula leaves the gradient open: any.
    switched_off = (options["loss_weight"] == 0) & ~np.isnan(value)
    free = (np.isinf(value) | bool(hard) | switched_off)[:, None] & np.isnan(slope)
    # Where the product of all factors of a row is no number, so may the gradient be, though the
    # differences of probabilities behind them are small: the backward pass has the factors first.
    over = weights * abs(factor) / share / min(options["temperature"], 1.0) > info.max
    free = free | (over[:, None] & ~np.isfinite(gradient))
    slope = np.where(free, np.nan, slope)
    gradient = np.where(free, np.nan, gradient)
    with np.errstate(all="ignore"):
        expected = slope * factor[:, None] / share
        moved = np.stack([abs((g - slope) * factor[:, None] / share) for _, g, _ in moves])
    noise = np.where(np.isfinite(moved), moved, 0).max((0, 2), initial=0)[:, None]
    working = formulas.WIDE(info.eps)
    size = np.where(np.isfinite(expected), abs(expected), 0).max(1, initial=0)[:, None]
    terms = np.where(np.isfinite(terms), terms, 0) * abs(factor[:, None]) / share
    lost = lost / min(options["temperature"], 1.0)  # of the slopes by logits
    noise = noise + working * (size / K + terms / 2) + lost * abs(factor[:, None])
    if spec.steps is not None:  # up to three gradients, each of which is rounded, and their sum
        noise = noise + 1.5 * formulas.WIDE(torch.finfo(student.dtype).eps) * terms / K
    close(gradient, expected, noise, student.dtype, "gradient")
    if (gradient[~valid] != 0).any():
        raise Wrong("an ignored row has a gradient")
    if count and case.backend != "reference":
        alone(case, valid)


def rounding(wide: bool, seed: int, from_top: bool) -> Callable[[Any], Any]:
    """Moves every scaled logit by one rounding error, its own or that of its distance from the top.

    The reference subtracts the row's largest logit first, the target's too.
    """
    generator = np.random.default_rng(seed)
    eps = formulas.WIDE(np.finfo(np.float64 if wide else np.float32).eps)

    def move(x: Any) -> Any:
        size = np.maximum(abs(x), 1)
        if from_top:
            below = x.max(-1, keepdims=True, initial=-np.inf) - x
            size = np.maximum(size, np.where(np.isfinite(below), below, 0))
        step = eps * size * generator.normal(size=x.shape)
        return np.where(np.isfinite(x), x + np.where(np.isfinite(step), step, 0), x)

    return move


def close(actual: Any, truth: Any, noise: Any, dtype: torch.dtype, what: str) -> None:
    """Compare with K times the noise, and with the last digits of the dtype."""
    info = torch.finfo(dtype)
    actual = np.asarray(actual, formulas.WIDE)
    beyond = np.isfinite(truth) & (abs(truth) >= info.max * (1 - 4 * info.eps))
    most = np.isfinite(truth) & (abs(truth) + K * noise >= info.max)
    actual = np.where(beyond | (most & ~np.isfinite(actual) & ~np.isnan(actual)), truth, actual)
    for name, test in (("NaN", np.isnan), ("+inf", np.isposinf), ("-inf", np.isneginf)):
        wrong = test(actual) != test(truth)
        if wrong.any():
            place = tuple(np.argwhere(wrong)[0])
            raise Wrong(f"{what}: {actual[place]} at {place}, not {truth[place]} ({name})")
    finite = np.isfinite(truth)
    difference = np.where(finite, actual - np.where(finite, truth, 0), 0)
    noise = np.where(np.isfinite(noise), noise, 0)
    tiny = info.smallest_normal * (info.eps if dtype == torch.float16 else 1)
    bound = K * noise + 4 * info.eps * abs(np.where(finite, truth, 0)) + 2 * tiny
    wrong = ~(abs(difference) <= bound)
    if wrong.any():
        ratio = np.where(wrong, abs(difference) / np.broadcast_to(bound, difference.shape), 0)
        place = np.unravel_index(int(ratio.argmax()), ratio.shape)
        raise Wrong(
            f"{what}: {float(actual[place])!r} at {tuple(map(int, place))}, truth "
            f"{float(truth[place])!r}, error {float(ratio[place]):.3g} times the bound"
        )


def alone(case: Case, valid: Any) -> None:
    """A row's bits do not depend on its batch: some of the rows by themselves, in another order."""
    student, teacher = (
        case.tensors[n].movedim(class_dim(case.tensors[n]), -1).flatten(0, -2).contiguous()
        for n in ("student_logits", "teacher_logits")
    )
    draw = Draw(random.Random(case.seed + 2))
    rows = torch.tensor([draw.rng.randrange(len(student)) for _ in range(draw.pick([1, 2, 5, 9]))])
    name = "labels" if "labels" in case.tensors else "target"
    index = case.tensors.get(name)

    def bits(rows: Tensor) -> tuple[Tensor, Tensor]:
        changed = {
            "student_logits": student[rows].requires_grad_(),
            "teacher_logits": teacher[rows],
        }
        if index is not None and index.is_floating_point():  # probabilities
            changed[name] = index.movedim(class_dim(index), -1).flatten(0, -2)[rows]
        elif index is not None:
            changed[name] = index.flatten()[rows]
        part = Case(case.seed, case.spec, case.backend, case.entry, changed, {**case.options})
        part.options.pop("reduction", None)
        loss = part(reduction="none")
        return loss.detach(), torch.autograd.grad(loss.sum(), changed["student_logits"])[0]

    whole, part = bits(torch.arange(len(student))), bits(rows)
    if not all(same(a[rows], b) for a, b in zip(whole, part, strict=True)):
        raise Wrong(f"rows {rows.tolist()} have other bits on their own")


# Batches.


def by_batch(case: Case, loss: Tensor, gradients: dict[str, Tensor], upstream: Tensor) -> None:
    spec = case.spec
    formula = formulas.BATCHES[spec.name]
    left = {"backend"}
    if "ignore_index" not in inspect.signature(formula).parameters:
        left.add("ignore_index")
    options = {k: v for k, v in case.plain.items() if k not in left}
    reduction = options["reduction"]
    options["reduction"] = "mean" if reduction == "batchmean" else reduction
    names = [*gradients]

    def exact(k: int | None) -> tuple[Any, list[Any]]:
        generator = torch.Generator().manual_seed(k or 0)
        tensors = {}
        for name, x in case.tensors.items():
            if x.is_floating_point():
                y = x.detach().double().contiguous()
                if spec.family == "correlation":
                    y = y.movedim(class_dim(y), -1).flatten(0, -2)
                if k is not None:
                    eps = torch.finfo(loss.dtype).eps
                    unit = options.get("tau", options.get("temperature", 0.0))
                    step = torch.rand(y.shape, generator=generator, dtype=y.dtype) * 2 - 1
                    step = eps * step * y.abs().clamp(min=unit)
                    y = torch.where(y.isfinite() & step.isfinite(), y + step, y)
                x = y.clone().requires_grad_(name in names)
            tensors[name] = x
        if k is not None and spec.family == "correlation":
            options["move"] = lambda x: rounded(x, torch.finfo(loss.dtype).eps, k)
        value = formula(*tensors.values(), **options)
        inputs = [tensors[n] for n in names]
        slopes = torch.autograd.grad(value, inputs, upstream.to(value.dtype), allow_unused=True)
        arrays = [
            np.zeros(x.shape) if g is None else g.numpy()
            for x, g in zip(inputs, slopes, strict=True)
        ]
        return value.detach().numpy().reshape(-1), arrays

    wide = lambda x: np.asarray(x, formulas.WIDE)  # noqa: E731
    bad = counted = np.zeros(0, np.bool_)
    if spec.family == "correlation":
        s, t = (flat(case.tensors[n]) for n in ("student_logits", "teacher_logits"))
        counted = np.ones(len(s), np.bool_)
        if "labels" in case.tensors:
            counted = case.tensors["labels"].flatten().long().numpy() != options["ignore_index"]
            if (flat(gradients["student_logits"])[~counted] != 0).any():
                raise Wrong("an ignored row has a gradient")
        bad_rows = formulas.bad_rows if spec.activation == "softmax" else formulas.nan_rows
        bad = counted & (bad_rows(s) | bad_rows(t))
    if bad.any():
        if not loss.isnan() or not np.isnan(flat(gradients["student_logits"])[bad]).all():
            raise Wrong(f"a bad row, and the loss is {loss}")
        return
    value, slopes = exact(None)
    if not (np.isfinite(value).all() and all(np.isfinite(x).all() for x in slopes)):
        raise NotSuitable("the plain formula is not finite")
    moves = [exact(k) for k in range(4)]
    working = torch.finfo(loss.dtype).eps
    with np.errstate(all="ignore"):
        noise = np.stack([abs(wide(v) - wide(value)) for v, _ in moves]).max(0)
    scale = abs(options["loss_weight"]) * size_of_terms(options)
    if reduction == "sum":
        scale *= sum(next(iter(case.tensors.values())).shape)
    # Terms of order one cancel in a correlation, a similarity or a distance.
    close(
        wide(loss.reshape(-1).double().numpy()),
        wide(value),
        # In float64 the formula is no more exact than the kernel.
        12 * noise + working * (scale * 2 + abs(wide(value)) / 2),
        loss.dtype,
        "loss",
    )
    for i, name in enumerate(names):
        x = case.tensors[name]
        actual = gradients[name].double()
        if spec.family == "correlation":
            actual = actual.movedim(class_dim(x), -1).flatten(0, -2)
        truth = wide(slopes[i])
        with np.errstate(all="ignore"):
            move = np.stack([abs(wide(m[1][i]) - truth) for m in moves])
        move = np.where(np.isfinite(move), move, 0)
        noise = 12 * move.max(initial=0) + working * abs(truth).max(initial=0) / 2
        terms = scale * float(upstream.abs().amax()) if upstream.numel() else 0.0
        far = options["tau"] if spec.family == "correlation" else max(spread(x), 1e-30)
        if spec.family == "sparse":
            far = min(options["temperature"], 1.0)
            if working < 1e-10:  # the formula's: its log-probabilities are of this size
                far /= max(8 * spread(x) / options["temperature"], 1.0)
        rows = int(counted.sum()) if spec.family == "correlation" else len(truth)
        noise += working * terms / max(rows, 1) / 4 / far
        found = wide(actual.numpy())
        # The reference's backward pass has the coefficients before the squares of norms.
        if case.backend == "reference" and terms > float(torch.finfo(loss.dtype).max) ** 0.5:
            found = np.where(np.isfinite(found), found, truth)
        close(found, truth, noise, x.dtype, f"gradient of {name}")


def rounded(x: Tensor, eps: float, seed: int) -> Tensor:
    """Probabilities with a rounding error each, the same for equal ones.

    Less their mean, which is rounded apart, they do not sum to 0 any more, so that correlations of
    1 and -1 err too: by eps over the distance from the mean, which moved logits do not show.
    """
    bits = x.detach().view(torch.int64) * (2 * seed + 0x5851F42D4C957F2D)
    bits = (bits ^ (bits >> 29)) * 0x14057B7EF767814F
    return x * (1 + eps * ((bits >> 11).double() / 2**52))


def spread(x: Tensor) -> float:
    """How far a loss of features must move its input to change; logits move by the temperature."""
    if x.numel() == 0:
        return 1.0
    return float(x.double().square().mean().sqrt().clamp(max=1.0))


def size_of_terms(options: dict[str, Any]) -> float:
    names = [k for k in options if k in ("beta", "gamma") or k.endswith("_weight")]
    if "divergence" in options:  # whose beta is no weight
        names = []
    weights = [abs(float(options[k])) for k in names if k != "loss_weight"] or [1.0]
    return sum(weights) * float(options.get("tau", 1.0)) ** 2


# Driver.


def attempt(seed: int, wanted: Sequence[str], names: Sequence[str] = ()) -> str | None:
    """What is wrong with a seed's case, or None."""
    case: Case | None = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            case = make(seed, wanted, names)
            judge(case)
    except NotSuitable:
        return None
    except Exception as error:
        text = (
            f"{error}" if isinstance(error, Wrong) else "".join(traceback.format_exception(error))
        )
        return f"seed {seed}: {text}\n    {case}"
    return None


def seeds(first: int) -> Iterator[int]:
    while True:
        yield first
        first += 1


def fuzz(
    first: int, wanted: Sequence[str], until: Callable[[int], bool], names: Sequence[str] = (),
    most: int = 20,
) -> tuple[int, list[str]]:  # fmt: skip
    """Judge cases from a seed on; returns their number and what was wrong, each kind once."""
    found: dict[str, str] = {}
    kinds: Counter[str] = Counter()
    count = 0
    for seed in seeds(first):
        if until(count) or len(found) >= most:
            break
        count += 1
        text = attempt(seed, wanted, names)
        if text:
            kind = re.sub(r"[-\d.e+]+", "#", text)[:120]
            kinds[kind] += 1
            found.setdefault(kind, text)
    return count, [f"{text}\n    ({kinds[kind]} like it)" for kind, text in found.items()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--cases", type=int, help="stop after this many, whatever the minutes")
    parser.add_argument("--seed", type=int, help="of the first case; else by the clock")
    parser.add_argument("--backends", nargs="+", default=["native", "reference"])
    parser.add_argument("--losses", nargs="+", default=[])
    parser.add_argument("--every-capability", action="store_true")
    arguments = parser.parse_args()
    if arguments.every_capability:
        return every_capability()
    torch.set_num_threads(1)
    first = arguments.seed if arguments.seed is not None else int(time.time()) * 1000
    print(f"fuzz: backends {arguments.backends}, first seed {first}", flush=True)
    end = time.monotonic() + 60 * arguments.minutes
    limit = arguments.cases if arguments.cases is not None else float("inf")
    count, found = fuzz(
        first, arguments.backends, lambda n: n >= limit or time.monotonic() > end, arguments.losses
    )
    print("\n".join(found))
    print(f"fuzz: {count} cases, {len(found)} kinds of failure")
    return bool(found)


def every_capability() -> int:
    from kdkernels import native

    extension = native.extension()
    names = extension.cpu_capabilities() if extension else [""]
    rest = [x for x in sys.argv[1:] if x != "--every-capability"]
    failed = 0
    # From the plainest; the one that is chosen is the last that this machine has.
    last = names.index(extension.cpu_capability()) if extension else 0
    for name in names[last + 1 :]:
        print(f"fuzz: this machine has no {name}", flush=True)
    for name in names[: last + 1]:
        print(f"fuzz: instruction set {name or 'none'}", flush=True)
        environment = {**os.environ, "KDKERNELS_CPU_CAPABILITY": name} if name else {**os.environ}
        failed |= subprocess.run([sys.executable, __file__, *rest], env=environment).returncode
    return failed


if __name__ == "__main__":
    sys.exit(main())

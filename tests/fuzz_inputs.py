"""Random arguments for fuzz.py: values, dtypes, layouts in memory, options, and bad ones."""

from __future__ import annotations

import inspect
import math
import random
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdkernels.registry import LossSpec

INF, NAN = float("inf"), float("nan")
FLOATS = (torch.float32, torch.float32, torch.float64, torch.float16, torch.bfloat16)
INTEGERS = (torch.int64, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
SOFT_CLASSES = 40
"""Most classes of targets that are probabilities: the formula has a term for each."""


class NotSuitable(Exception):
    """Nothing to judge in this case."""


# Options: usual and extreme values by name, and what must be refused.

TEMPERATURES = (1.0, 2.0, 4.0, 0.5, 0.1, 0.01, 20.0, 1000.0, 1e6, 1e-6, 1 / 3)
WEIGHTS = (1.0, 0.0, 0.5, 2.0, 8.0, 1e-6, 1e3, 1e12)
NOT_PLAIN = (
    "backend", "labels", "target", "token_weight", "num_items_in_batch", "return_parts",
    "return_mass", "log_rest",
    "process_group", "tp_group", "class_dim", "teacher_grad", "resize",
)  # fmt: skip
"""Arguments that are no options, and tensors."""
FRACTIONS = (0.5, 0.0, 1.0, 0.1, 0.9, 1e-3, 0.999)
GOOD: dict[str, Sequence[Any]] = {
    "temperature": TEMPERATURES,
    "tau": (1.0, 4.0, 0.5, 2.0, 0.1),
    "loss_weight": (1.0, 0.0, -1.0, 0.25, 1000.0, 1e-12, 1e12),
    "hard_weight": (0.0, 0.0, 0.0, 0.0, 1.0, 0.5, -1.0, 1e-6, 1e3),
    "eps": (1e-8, 1e-6, 1e-2, 1.0, 0.0),
    "kappa": (1.0, 0.0, 0.5, 2.0, 3),
    "ratio_max": (10.0, 1.5, 1.0, 0.1, 100.0),
    "margin": (0.2, 1.0, 2.0, 0.0),
    "p": (2.0, 1.0, 3.0, 4.0, 1.5, 8.0),
    "similarity": ("l1", "cosine"),
    "kind": ("log", "hybrid"),
    "estimator": ("k1", "k2", "k3"),
    "divergence": ("kl", "reverse_kl", "jsd", "tv"),
    "tail": ("bucket", "renormalize", "teacher", "drop"),
    "eta": (3.0, 1.0, 0.0, 0.5, 4),
    "standardize": (False, False, False, True),
    "ignore_index": (-100, 0, 1, 2, -1, 255, 10**6, 2**63 - 1, -(2**63)),
}
NOT_A_NUMBER: Sequence[Any] = (
    "4", None, True, [1.0], 4j, NAN, INF, -INF, 10**400, np.array([1.0, 2.0]), np.bool_(True),
    torch.ones(2, 1, 2, 1, 2),  # no rows are of this shape
    torch.ones((), dtype=torch.complex64), torch.tensor(NAN), Decimal("Infinity"), 1e13, -1e300,
)  # fmt: skip
NEGATIVE: Sequence[Any] = (-1.0, -1e-30, -1, np.float32(-2), torch.tensor(-1.0))
NOT_POSITIVE: Sequence[Any] = (*NEGATIVE, 0, 0.0, -0.0, np.int64(0))
NOT_A_TEMPERATURE: Sequence[Any] = (
    *NOT_POSITIVE, 1e-7, 1e30, 1e7, torch.ones((), device="meta"), torch.tensor(1e7),
)  # fmt: skip
BAD_VALUES: dict[str, Sequence[Any]] = {
    "temperature": (*NOT_A_NUMBER, *NOT_A_TEMPERATURE),
    "tau": (*NOT_A_NUMBER, *NOT_A_TEMPERATURE),
    "ratio_max": (*NOT_A_NUMBER, *NOT_POSITIVE),
    "hard_weight": NOT_A_NUMBER,
    "loss_weight": tuple(x for x in NOT_A_NUMBER if not isinstance(x, Tensor) or x.dim()),
    "p": (*NOT_A_NUMBER, *NOT_POSITIVE, 0.5),
    **{
        name: (*NOT_A_NUMBER, *NEGATIVE)
        for name in (
            "alpha", "beta", "gamma", "eps", "eta", "kappa", "margin", "distance_weight",
            "angle_weight",
            "inheritance_weight", "exploration_weight",
        )
    },
    "forward_weight": (*NOT_A_NUMBER, *NEGATIVE),
    "reduction": ("avg", None, 1, ["mean"], "", "Mean", b"mean", {}),
    "ignore_index": (
        1.5, "1", True, 2**70, -(2**63) - 1, torch.tensor(1.0), [1], np.float64(1)
    ),
    "class_dim": ("1", 1.5, True, 2**70, [1], 99, -99, torch.tensor(1.0)),
    "standardize": (1, 0, None, "yes", [], 1.0, torch.tensor(1)),
    "resize": ("nearest", "", 1, True, ["bilinear"], b"bilinear", "Bilinear"),
    "teacher_grad": (1, 0, None, "yes", [], 1.0, torch.tensor(1)),
    "backend": ("cuda", "", ["native"], 0, False, b"native", {}, ("native",)),
    "process_group": ("gloo", 0, -100, ["gloo"], object()),
    "tp_group": ("gloo", 0, -100, ["gloo"], object()),
    "similarity": ("L1", None, 1, ["l1"], ""),
    "kind": ("Log", None, 1, ["log"], ""),
    "estimator": ("K2", None, 2, ["k2"], ""),
    "divergence": ("KL", None, 2, ["kl"], ""),
    "tail": ("Drop", None, 2, ["drop"], ""),
}  # fmt: skip


class Draw:
    """Random choices from one seed."""

    def __init__(self, rng: random.Random, small: bool = False) -> None:
        self.rng = rng
        self.small = small
        self.generator = torch.Generator().manual_seed(rng.getrandbits(60))

    def pick(self, values: Sequence[Any]) -> Any:
        return values[self.rng.randrange(len(values))]

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def dtypes(self, count: int) -> list[torch.dtype]:
        first = self.pick(FLOATS)
        return [first if i == 0 or self.chance(0.7) else self.pick(FLOATS) for i in range(count)]

    # Inputs.

    def inputs(self, spec: LossSpec) -> dict[str, Tensor]:
        parameters = inspect.signature(spec.function).parameters
        if "student_logits" in parameters and "teacher_logits" in parameters:
            return self.logits(spec)
        return self.features(spec)

    def sizes(self) -> tuple[int, int]:
        rows = self.pick((0, 1, 1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 31, 33, 64, 100))
        classes = self.pick((2, 2, 3, 4, 5, 7, 8, 9, 10, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100,
                             127, 129, 200, 257, 511, 513, 1000, 4096, 4097))  # fmt: skip
        if self.small:
            return min(rows, 9), min(classes, 40)
        if rows * classes > 40000:
            rows = max(40000 // classes, 1)
        return rows, classes

    def logits(self, spec: LossSpec) -> dict[str, Tensor]:
        rows, classes = self.sizes()
        if classes <= 3 and spec.least_classes == 1:
            classes = 1
        target = torch.randint(classes, (rows,), generator=self.generator)
        student, teacher = self.values(rows, classes, target, spec)
        kinds = self.dtypes(2)
        shape = self.shape_of_rows(rows)
        made = {}
        for name, x, dtype in (
            ("student_logits", student, kinds[0]),
            ("teacher_logits", teacher, kinds[1]),
        ):
            x = x.to(dtype).reshape(*shape, classes)
            x = x.movedim(-1, 1) if x.dim() == 4 else x
            made[name] = self.lay_out(x)
        if spec.needs_target and classes <= SOFT_CLASSES and self.chance(0.3):
            soft = self.probabilities(target, classes).reshape(*shape, classes)
            soft = (soft.movedim(-1, 1) if soft.dim() == 4 else soft).to(self.pick(FLOATS))
            made[spec.target_name] = self.lay_out(soft, negate=False)
        elif spec.needs_target or (spec.takes_target and self.chance(0.5)):
            kind = self.pick(INTEGERS)
            if kind.itemsize == 1 and classes > 127:
                kind = torch.int64
            made[spec.target_name] = self.lay_out(target.to(kind).reshape(shape), negate=False)
        return made

    def probabilities(self, target: Tensor, classes: int) -> Tensor:
        """Targets that are no class: of two labels, smoothed, any, or not normalised."""
        rows = len(target)
        one = torch.zeros(rows, classes, dtype=torch.float64).scatter_(1, target[:, None], 1.0)
        kind = self.pick(("pair", "pair", "smoothed", "any", "indices", "zeros"))
        if kind == "pair":
            share = torch.rand(rows, 1, generator=self.generator, dtype=torch.float64)
            return share * one + (1 - share) * one.roll(self.pick((1, 2)), 0)
        if kind == "smoothed":
            rate = self.pick((0.1, 0.5, 1e-3, 1.0))
            return one * (1 - rate) + rate / classes
        if kind == "any":
            made = self.normal(rows, classes) * self.pick((0.1, 1.0, 10.0))
            return made.softmax(-1) * self.pick((1.0, 1.0, 3.0))
        return one * (kind == "indices")

    def shape_of_rows(self, rows: int) -> tuple[int, ...]:
        """(N,), (B, S) or (N, H, W)."""
        rank = self.pick((1, 1, 2, 3))
        shape = []
        for _ in range(rank - 1):
            size = self.pick([d for d in (1, 2, 3, 4, 5, 7) if rows % d == 0])
            shape.append(size)
            rows //= size
        shape.append(rows)
        self.rng.shuffle(shape)
        return tuple(shape)

    def values(
        self, rows: int, classes: int, target: Tensor, spec: LossSpec
    ) -> tuple[Tensor, Tensor]:
        rest = "near near equal offset peaked huge zeros ties tiny constant masked masked bad"
        family = self.pick(["gaussian"] * 4 + rest.split())
        s = self.normal(rows, classes) * self.pick((0.1, 1.0, 3.0, 10.0))
        t = self.normal(rows, classes) * self.pick((0.1, 1.0, 3.0, 10.0))
        if family == "near":
            t = s + self.normal(rows, classes) * self.pick((1e-2, 1e-3, 1e-5, 1e-7))
        elif family == "equal":
            t = s.clone()
        elif family == "offset":
            s, t = s + self.pick((1000.0, -1000.0)), t + self.pick((1000.0, 100.0, -100.0))
        elif family == "peaked":
            height = self.pick((20.0, 60.0, 104.0, 200.0, 1000.0))
            for x, shift in ((s, self.pick((0, 0, 1))), (t, 0)):
                x.scatter_add_(
                    1, ((target + shift) % classes)[:, None], torch.full((rows, 1), height).double()
                )
        elif family == "huge":
            s, t = s * self.pick((1e3, 1e4)), t * 1e3
        elif family == "zeros":
            s = torch.zeros_like(s)
        elif family == "ties":
            s, t = s.round(), t.round()
        elif family == "tiny":
            s, t = s * 1e-6, t * 1e-6
        elif family == "constant":
            s[:] = s[:, :1]
            t[::2] = 0.5
        elif family == "masked":
            for x in (s, t):
                mask = torch.rand(x.shape, generator=self.generator) < self.pick((0.1, 0.5, 0.95))
                if self.chance(0.3):
                    mask[:, : classes // 2] = True
                mask[
                    torch.arange(rows), torch.randint(classes, (rows,), generator=self.generator)
                ] = False
                x.masked_fill_(mask, -INF)
            if self.chance(0.5):
                t.masked_fill_(s == -INF, -INF)
                s, t = (torch.where((x == -INF).all(1, keepdim=True), 0.0, x) for x in (s, t))
        elif family == "bad" and rows:
            for _ in range(self.pick((1, 2, 3))):
                row = self.pick((s, t))[self.rng.randrange(rows)]
                kind = self.pick(("nan", "inf", "all", "mixed"))
                if kind in ("all", "mixed"):
                    row.fill_(-INF)
                if kind != "all":
                    row[self.rng.randrange(classes)] = INF if kind == "inf" else NAN
        return s, t

    def features(self, spec: LossSpec) -> dict[str, Tensor]:
        """Shapes by the loss's name, which the formulas need too."""
        batch = self.pick((1, 2, 3, 4, 6, 9))
        width, other = self.pick((3, 4, 5, 8, 17)), self.pick((1, 2, 5, 16))
        height, breadth = self.pick((1, 2, 3, 5)), self.pick((1, 3, 4, 7))
        if spec.family == "sampled":
            return self.sampled()
        if spec.family == "sparse":
            return self.sparse()
        if spec.name == "iekd":
            shape = self.pick(((batch, width), (batch, width, height, breadth)))
            shapes: dict[str, tuple[int, ...]] = dict.fromkeys(
                ("inheritance_factor", "exploration_factor", "teacher_factor"), shape
            )
        elif spec.name == "attention":
            tail = (height, breadth)
            shapes = {
                "student_features": (batch, width, *tail),
                "teacher_features": (batch, other, *tail),
            }
        elif spec.name in ("hint", "pkd"):
            four = (batch + 3, width, height, breadth)  # of two values nothing is left
            shape = (
                four if spec.name == "pkd" else self.pick((four, (batch, width), (batch, 3, width)))
            )
            shapes = {"student_features": shape, "teacher_features": shape}
        elif spec.name in ("rkd", "tuple_matching"):
            width, other = max(width, 2), max(other, 2)
            shapes = {"student_embeddings": (batch, width), "teacher_embeddings": (batch, other)}
        elif spec.name == "local_classifier":
            classes = self.pick((2, 3, 7, 20))
            shapes = {
                "student_logits": (batch, classes),
                "teacher_embeddings": (batch, other),
                "centers": (classes, other),
            }
        else:
            raise AssertionError(f"fuzz_inputs.py has no shapes for the loss {spec.name}")
        scale = self.pick((1.0, 1.0, 0.1, 10.0))
        made = {}
        for (name, shape), dtype in zip(shapes.items(), self.dtypes(len(shapes)), strict=True):
            x = self.normal(*shape) * scale
            if self.chance(0.1) and spec.name in ("iekd", "attention", "hint"):
                x[0] = 0
            made[name] = self.lay_out(x.to(dtype))
        if spec.takes_target:
            classes = (
                shapes["student_logits"][1] if "student_logits" in shapes else self.pick((2, 3))
            )
            target = torch.randint(classes, (batch,), generator=self.generator)
            made["target"] = self.lay_out(target.to(self.pick(INTEGERS)), negate=False)
        return made

    def sampled(self) -> dict[str, Tensor]:
        rows, classes = self.sizes()
        ids = torch.randint(classes, (rows,), generator=self.generator)
        shape, kinds = self.shape_of_rows(rows), self.dtypes(2)
        student = self.normal(rows, classes) * self.pick((0.1, 1.0, 3.0))
        student = student.to(kinds[0]).reshape(*shape, classes)
        kind = torch.int64 if classes > 127 else self.pick(INTEGERS)
        logprob = -self.normal(rows).abs() * self.pick((0.1, 1.0, 5.0))
        return {
            "student_logits": self.lay_out(student.movedim(-1, 1) if len(shape) == 3 else student),
            "sampled_ids": self.lay_out(ids.to(kind).reshape(shape), negate=False),
            "teacher_logprob": self.lay_out(logprob.to(kinds[1]).reshape(shape)),
        }

    def sparse(self) -> dict[str, Tensor]:
        """Some entries are absent, whose ids mean nothing."""
        rows, classes = self.sizes()
        # Of all ids there is no rest, unless the probabilities' rounding makes one.
        k = min(self.pick((1, 2, 3, 5, 8, 17, 64)), classes - 1)
        teacher = self.normal(rows, classes) * self.pick((0.1, 1.0, 3.0, 10.0))
        logprobs, ids = teacher.log_softmax(-1).topk(k)
        kind = torch.int64 if classes > 127 else self.pick(INTEGERS)
        kinds = self.dtypes(2)
        if self.chance(0.3):
            absent = torch.rand(ids.shape, generator=self.generator) < self.pick((0.2, 0.9))
            logprobs = logprobs.masked_fill(absent, -INF)
        shape = self.shape_of_rows(rows)
        given = self.lay_out(logprobs.to(kinds[1]).reshape(*shape, k))
        ids = ids.to(kind).reshape(given.shape).masked_fill(given == -INF, 0)
        student = self.normal(rows, classes) * self.pick((0.1, 1.0, 3.0))
        student = student.to(kinds[0]).reshape(*shape, classes)
        return {
            "student_logits": self.lay_out(student.movedim(-1, 1) if len(shape) == 3 else student),
            "teacher_ids": self.lay_out(ids, negate=False),
            "teacher_logprobs": given,
        }

    def lay_out(self, x: Tensor, negate: bool = True) -> Tensor:
        """The same values elsewhere: permuted, padded, strided, shifted, negated, repeated."""
        if self.chance(0.4) or x.numel() == 0:
            return x.contiguous()
        if self.chance(0.08) and x.is_floating_point():
            dim = self.rng.randrange(x.dim())
            return x.narrow(dim, 0, 1).clone().expand(x.shape)
        order = [*range(x.dim())]
        if self.chance(0.6):
            self.rng.shuffle(order)
        pads = [
            (self.pick((0, 0, 1, 3)), self.pick((0, 0, 1, 2)), self.pick((1, 1, 1, 2)))
            for _ in order
        ]
        if self.chance(0.4):
            pads = [(0, 0, 1) for _ in order]
        shape = [
            before + x.shape[d] * step + after
            for d, (before, after, step) in zip(order, pads, strict=True)
        ]
        offset = self.pick((0, 0, 1, 3))
        fill = NAN if x.is_floating_point() else -7 if x.dtype.is_signed else 249
        size = 1
        for n in shape:
            size *= n
        base = torch.full((offset + size,), fill, dtype=x.dtype)[offset:].view(shape)
        view = base[
            tuple(
                slice(before, before + x.shape[d] * step, step)
                for d, (before, _, step) in zip(order, pads, strict=True)
            )
        ]
        inverse = sorted(range(x.dim()), key=lambda i: order[i])
        view = view.permute(inverse)
        if negate and self.chance(0.05):
            return torch._neg_view(view.copy_(-x))
        return view.copy_(x)

    # Options.

    def options(
        self, spec: LossSpec, tensors: Mapping[str, Tensor]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Options as they are given, in any type of number, and plain with the defaults."""
        given, plain = {}, {}
        for name, parameter in inspect.signature(spec.function).parameters.items():
            if name in tensors or parameter.default is parameter.empty or name in NOT_PLAIN:
                continue
            plain[name] = parameter.default
            if self.chance(0.35):
                continue
            if name == "reduction":
                choices = ("mean", "batchmean", "sum", "none")
                none = spec.by_row or spec.name == "local_classifier"
                given[name] = plain[name] = self.pick(choices if none else choices[:3])
                continue
            low, high = spec.domains.get(name, (-math.inf, math.inf))
            choices = GOOD.get(name, WEIGHTS)
            if (low, high) == (0.0, 1.0):
                choices = FRACTIONS
            value = self.pick(choices)
            if name == "hard_weight" and spec.target_name not in tensors:
                continue
            given[name] = plain[name] = value
            if name == "ignore_index":
                given[name] = self.pick((value, np.int64(value)))
            elif isinstance(value, (int, float)) and not isinstance(value, bool):
                plain[name] = float(value)
                given[name] = self.number(float(value))
        if plain.get("tail") == "drop" or (
            plain.get("tail") == "teacher"
            and (plain["divergence"] == "reverse_kl" or plain["beta"] == 1.0)
        ):
            given["divergence"] = plain["divergence"] = "kl"
        if spec.name == "alpha_beta" and plain["alpha"] + plain["beta"] < 0.5:
            given["beta"] = plain["beta"] = 0.5
        if "ignore_index" in plain and spec.target_name in tensors:
            self.mask(tensors[spec.target_name], plain["ignore_index"])
        return given, plain

    def number(self, value: float) -> Any:
        """The same number in another type, where that holds it."""
        forms: list[Any] = [value] * 4 + [np.float64(value), Fraction(value), Decimal(value)]
        forms.append(torch.tensor(value, dtype=torch.float64))
        if float(np.float32(value)) == value:
            forms.append(np.float32(value))
        if value == int(value) and abs(value) < 2**31:
            forms += [int(value), np.int32(value)]
        return self.pick(forms)

    def mask(self, target: Tensor, ignore_index: int) -> None:
        """Some rows ignored, or all, where the dtype of the target holds the index."""
        if target.is_floating_point():  # probabilities
            return
        info = torch.iinfo(target.dtype)
        if info.min <= ignore_index <= info.max and self.chance(0.6):
            chosen = torch.rand(target.shape, generator=self.generator) < self.pick((0.2, 0.5, 1.1))
            target.masked_fill_(chosen, ignore_index)

    # Bad arguments.

    def spoil(
        self,
        tensors: dict[str, Tensor],
        options: dict[str, Any],
        name: str,
        parameters: Mapping[str, inspect.Parameter],
    ) -> None:
        """Make one argument one that must be refused."""
        if name not in tensors:
            values = BAD_VALUES[name]
            default = parameters[name].default
            options[name] = self.pick([v for v in values if v is not default])
            return
        x = tensors[name]
        first = next(iter(tensors))
        kinds: list[Callable[[], Any]] = [
            lambda: None if name not in ("target", "labels") else 3,
            lambda: x.tolist(),
            lambda: x.to("meta") if name != first else "x",
            lambda: x[..., None, None, None],
            lambda: x.to(torch.complex64),
            lambda: x > 0 if x.is_floating_point() else x.tolist(),
            lambda: freed(x, self.chance(0.5)) if x.numel() else x.tolist(),
        ]
        if x.numel() == 0:
            kinds.pop(2)
        with_layout = [torch.Tensor.to_sparse]
        if x.is_floating_point():
            kinds += [lambda: x.int()]
            if x.dtype == torch.float32 and x.numel():
                with_layout.append(torch.Tensor.to_mkldnn)
            if name != first and not name.startswith("exploration"):
                kinds.append(lambda: x.detach().clone().requires_grad_())
        else:
            kinds += [lambda: x.float(), lambda: torch.cat([x, x[:1]]) if len(x) else x[None]]
        kinds += [lambda: self.pick(with_layout)(x.contiguous())]
        tensors[name] = self.pick(kinds)()


def freed(x: Tensor, offset: bool) -> Tensor:
    """A tensor whose memory was given back, as sharded training does."""
    x = torch.stack([x, x])[1] if offset else x.clone()
    x.untyped_storage().resize_(0)
    return x

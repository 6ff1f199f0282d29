"""What is timed on a GPU: shapes with names, who takes part, and the step that is measured."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels import _dispatch
from kdkernels.registry import SPECS

from .eager import eager
from .gpu_clock import Clock, Step
from .gpu_truth import Truth, errors, truth
from .problem import BOUNDS

Loss = Callable[..., Tensor]
Inputs = tuple[Tensor, ...]
BF16, FP32 = torch.bfloat16, torch.float32
OURS = ("native", "triton")
TEMPERATURE = 4.0
COLD = 16 << 20
"""Bytes of a step from which on the second level cache must not serve its repetitions."""
ROTATED = 512 << 20
"""Bytes that the steps walk through before they come back to the same logits."""
FLOAT_COPIES = {"kd": 10, "dkd": 18, "aekt": 20, "dist": 16}
"""Tensors of the logits' size in float32 that the eager form holds at its peak, at least."""


@dataclass(frozen=True)
class Shape:
    """Logits with a name; ``tiny`` takes their place in a rehearsal."""

    name: str
    size: tuple[int, ...]
    tiny: tuple[int, ...]
    small: bool = False
    """Launch-bound: the time of the host counts, and CUDA graphs are worth a comparison."""


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("256x100", (256, 100), (8, 10), small=True),
        Shape("1024x1000", (1024, 1000), (16, 100), small=True),
        Shape("4096x32000", (4096, 32000), (6, 320)),
        Shape("8192x128256", (8192, 128256), (6, 1288)),
        Shape("8192x262144", (8192, 262144), (5, 2048)),
        Shape("4x1048576", (4, 1048576), (2, 4096)),
        Shape("2000000x150", (2_000_000, 150), (40, 15)),
        Shape("16x19x512x1024", (16, 19, 512, 1024), (2, 5, 4, 6)),
    )
}


@dataclass(frozen=True)
class Case:
    """A loss at a shape and dtype."""

    shape: Shape
    loss: str
    dtype: torch.dtype
    rivals: tuple[str, ...] = ("eager",)
    quick: bool = False

    @property
    def name(self) -> str:
        return f"{self.loss} {self.shape.name} {str(self.dtype).removeprefix('torch.')}"

    def size(self, rehearsal: bool) -> tuple[int, ...]:
        return self.shape.tiny if rehearsal else self.shape.size


def _cases() -> Iterator[Case]:
    """The most important first: what the budget does not allow is left out at the end."""
    at = SHAPES
    llm = ("eager", "compile", "liger")
    yield Case(at["8192x128256"], "kd", BF16, (*llm, "liger_jsd"), True)
    yield Case(at["8192x128256"], "dkd", BF16, quick=True)
    yield Case(at["2000000x150"], "dist", FP32, ("eager", "compile"), True)
    yield Case(at["2000000x150"], "dist", BF16, quick=True)
    everyone = ("eager", "compile", "graphs")
    for name in ("256x100", "1024x1000"):
        for loss in ("kd", "dkd", "dist"):
            yield Case(at[name], loss, FP32, everyone, name == "256x100")
    yield Case(at["4x1048576"], "kd", FP32, ("eager", "compile"), True)
    yield Case(at["4x1048576"], "dkd", FP32)
    yield Case(at["4096x32000"], "kd", BF16, ("eager", "compile"))
    yield Case(at["4096x32000"], "dkd", BF16)
    yield Case(at["4096x32000"], "dist", BF16)
    yield Case(at["8192x262144"], "kd", BF16)
    yield Case(at["8192x262144"], "dkd", BF16)
    yield Case(at["16x19x512x1024"], "dist", FP32)
    yield Case(at["16x19x512x1024"], "kd", FP32)
    yield Case(at["8192x128256"], "dist", BF16)
    yield Case(at["4x1048576"], "dist", FP32)


CASES = tuple(_cases())


def passes(loss: str) -> int:
    """Times that the logits' bytes must move: read, read, write; DIST reads both again."""
    return 5 if loss == "dist" else 3


def floor_bytes(loss: str, elements: int, itemsize: int) -> int:
    return passes(loss) * elements * itemsize


@dataclass(eq=False)
class Problem:
    """The inputs of a case, several sets of them where a cache would serve a single one."""

    case: Case
    clock: Clock
    sets: list[Inputs] = field(default_factory=list)

    def __post_init__(self) -> None:
        generator = torch.Generator(self.clock.device).manual_seed(0)
        size = self.case.size(self.clock.rehearsal)
        step = floor_bytes("kd", math.prod(size), self.case.dtype.itemsize)
        count = 1 if step < COLD else max(1, min(8, -(-ROTATED // step)))
        self.sets = [self._inputs(size, generator) for _ in range(count)]

    def _inputs(self, size: tuple[int, ...], generator: torch.Generator) -> Inputs:
        how = {"generator": generator, "device": self.clock.device, "dtype": self.case.dtype}
        teacher = torch.randn(size, **how).mul_(3)
        student = torch.randn(size, **how).add_(teacher, alpha=0.5).requires_grad_()
        if not SPECS[self.case.loss].needs_target:
            return student, teacher
        rows = (size[0], *size[2:])
        target = torch.randint(size[1], rows, generator=generator, device=self.clock.device)
        return student, teacher, target

    @property
    def gradient_bytes(self) -> int:
        student = self.sets[0][0]
        return student.numel() * student.element_size()

    @functools.cached_property
    def answer(self) -> Truth:
        student, teacher, *target = self.sets[0]
        return truth(self.case.loss, student, teacher, target[0] if target else None)

    def check(self, function: Loss) -> dict[str, float]:
        """A contender's errors against the float64 reference; raises where one is too large."""
        student, *rest = self.sets[0]
        leaf = student.detach().requires_grad_()
        loss = function(leaf, *rest)
        (gradient,) = torch.autograd.grad(loss, leaf)
        return self.judge(loss.detach(), gradient)

    def judge(self, loss: Tensor, gradient: Tensor) -> dict[str, float]:
        found = errors(loss, gradient, self.answer)
        bound = BOUNDS[self.case.dtype]
        for what, size in found.items():
            if not size <= bound:  # written so that NaN is refused
                raise AssertionError(f"relative error of the {what} is {size:.2e}, not {bound:.0e}")
        return found

    def step(self, function: Loss, mark: Step | None = None) -> Step:
        """Forward and backward on the next set of inputs; ``mark`` comes before."""
        position = 0

        def body() -> None:
            nonlocal position
            inputs = self.sets[position]
            position = (position + 1) % len(self.sets)
            if mark is not None:
                mark()
            inputs[0].grad = None
            function(*inputs).backward()

        return body

    def forget(self) -> None:
        for inputs in self.sets:
            inputs[0].grad = None


def why_not(name: str, case: Case, clock: Clock) -> str:
    """Why a contender is not timed; empty where it is."""
    if name in OURS:
        if name == "triton" and clock.rehearsal:
            return "Triton's interpreter is not timed"
        return "; ".join(
            _dispatch.why_not(SPECS[case.loss], name, torch.empty(0, device=clock.device))
        )
    if name.startswith("liger"):
        try:
            import liger_kernel.transformers  # noqa: F401
        except Exception as error:
            return f"liger_kernel does not import here ({type(error).__name__})"
        return ""
    if name in ("eager", "compile", "graphs"):
        copies = FLOAT_COPIES[case.loss] if name == "eager" else 4
        needed = copies * 4 * math.prod(case.size(clock.rehearsal))
        if needed > clock.free_bytes():
            return f"needs about {needed >> 30} GiB, {clock.free_bytes() >> 30} are free"
    return ""


def build(name: str, case: Case, clock: Clock) -> tuple[Loss, Step | None]:
    """A contender's function, and what it wants called before each step."""
    if name in OURS:
        return functools.partial(SPECS[case.loss].function, backend=name), None
    form = eager(SPECS[case.loss])
    if name == "eager":
        return form, None
    if name.startswith("liger"):
        return (liger_kl if name == "liger" else liger_jsd)(), None
    if clock.rehearsal:
        return torch.compile(form, backend="aot_eager", dynamic=False), None
    if name == "graphs":
        # Its outputs live until the next step, which must be told to begin.
        mark = torch.compiler.cudagraph_mark_step_begin
        return torch.compile(form, dynamic=False, mode="reduce-overhead"), mark
    return torch.compile(form, dynamic=False), None


def captured(problem: Problem, clock: Clock) -> tuple[Step, dict[str, float]]:
    """The native step as a replayed CUDA graph, and its errors: what reduce-overhead is beside."""
    student, *rest = problem.sets[0]
    function, _ = build("native", problem.case, clock)
    leaf = student.detach().requires_grad_()
    results: list[Tensor] = []

    def body() -> None:
        loss = function(leaf, *rest)
        results[:] = [loss.detach(), *torch.autograd.grad(loss, leaf)]

    if clock.rehearsal:
        body()
        return body, problem.judge(*results)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            body()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        body()
    graph.replay()
    found = problem.judge(*results)

    def replay() -> None:
        graph.replay()

    return replay, found


def liger_kl() -> Loss:
    """Liger's KL kernel where its users put it: after eager softmaxes. The same value as KD."""
    from liger_kernel.transformers import LigerKLDIVLoss

    kernel = LigerKLDIVLoss(reduction="batchmean")

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        log_q = F.log_softmax(student / TEMPERATURE, -1, dtype=torch.float32)
        p = F.softmax(teacher / TEMPERATURE, -1, dtype=torch.float32)
        return kernel(log_q, p) * TEMPERATURE**2

    return loss


def liger_jsd() -> Loss:
    """Liger's generalised JSD (beta 0.5): another divergence, of the same traffic."""
    from liger_kernel.transformers import LigerJSD

    kernel = LigerJSD(beta=0.5)

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        log_q, log_p = (
            F.log_softmax(x / TEMPERATURE, -1, dtype=torch.float32) for x in (student, teacher)
        )
        return kernel(log_q, log_p)

    return loss


UNCHECKED = {"liger_jsd": "another divergence than KD, timed as a reference and not checked"}

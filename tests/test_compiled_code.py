"""What torch.compile makes of a loss: the gradient takes its factor in place, with its neighbours.

A step's memory traffic is that of its code, so the code is read, as Inductor writes it for the CPU.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code

from kdkernels import functional, native

pytestmark = pytest.mark.skipif(
    native.extension() is None or not (shutil.which("g++") or shutil.which("clang++")),
    reason="needs the compiled kernels, and a C++ compiler for torch.compile",
)
N, C = 24, 1000
SIZE = f"empty_strided_cpu(({N}, {C})"


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


TEACHER, LABELS = _random(N, C, seed=1), torch.arange(N) % 4


def _topk(s: Tensor, t: Tensor) -> Tensor:
    logprobs, ids = t.log_softmax(-1).topk(8)
    return functional.topk_kd_loss(s, ids, logprobs)


LOSSES: dict[str, Callable[..., Tensor]] = {
    "divergence": lambda s, t: functional.kd_loss(s, t, 2.0, labels=LABELS),
    "decoupled": lambda s, t: functional.dkd_loss(s, t, LABELS),
    "correlation": functional.dist_loss,
    "factor": functional.iekd_loss,
    "sparse": _topk,
}
"""One of each family of logits and factors; a tuple's gradient is that of distances."""
RECOMPUTES = {"sparse": ("topk_gradient", "row_backward")}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    """Its caches know nothing of how an operator is differentiated."""
    torch._dynamo.reset()
    with (
        torch._inductor.config.patch(force_disable_caches=True),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        yield
    torch._dynamo.reset()


def _code(step: Callable[..., Tensor], *leaves: Tensor) -> list[str]:
    """The sources of forward and backward."""
    compiled = torch.compile(step, fullgraph=True)
    _, code = run_and_get_code(lambda: compiled(*leaves).backward())
    assert len(code) == 2
    return code


def _operators(code: str) -> list[str]:
    return re.findall(r"= torch\.ops\.kdkernels\.(\w+)\.default\(", code)


@pytest.mark.parametrize(
    ("family", "dtype"),
    [*((family, torch.float32) for family in LOSSES), ("divergence", torch.bfloat16)],
    ids=str,
)
def test_the_gradient_is_scaled_in_its_own_memory(family: str, dtype: torch.dtype) -> None:
    """No operator, no second gradient and no copy: the product, fused with what stands before."""
    leaf, other = (_random(N, C, seed=seed).to(dtype).requires_grad_() for seed in (2, 3))
    teacher = TEACHER.to(dtype)
    students = [leaf, other] if family == "factor" else [leaf]

    def step(*given: Tensor) -> Tensor:
        return LOSSES[family](*(2 * x for x in given), teacher)

    forward, backward = _code(step, *students)
    assert _operators(forward), "the loss is not in the graph"
    assert sorted(_operators(backward)) == sorted(RECOMPUTES.get(family, ()))
    assert SIZE not in backward, "a second tensor of the gradient's size"
    in_place = re.findall(r"^ +(buf\d+) = \w+; del \w+  # reuse$", backward, re.MULTILINE)
    assert len(in_place) == len(students)
    kernels = re.findall(r"^ +cpp_fused_(\w+)\((.*)\)$", backward, re.MULTILINE)
    large = [args for _, args in kernels if any(b in args.split(", ") for b in in_place)]
    assert len(large) == 1, "the factor and what stands before the loss are one sweep"
    if family != "sparse":  # whose gradient is recomputed with its factor
        assert "tangents_1" in large[0]


def test_a_product_before_the_loss_takes_the_scaled_gradient_as_it_lies() -> None:
    weight = _random(C, 16, seed=2).bfloat16().requires_grad_()
    hidden, teacher = _random(N, 16, seed=3).bfloat16(), TEACHER.bfloat16()

    def step(w: Tensor) -> Tensor:
        return functional.kd_loss(hidden @ w.T, teacher, 2.0)

    _, backward = _code(step, weight)
    assert not _operators(backward) and SIZE not in backward
    assert re.search(
        r"(buf\d+) = \w+; del \w+  # reuse\n(.*\n)+? +cpp_fused_mul_0\(\1, tang", backward
    )


def test_the_gradient_of_tuples_is_scaled_with_that_of_their_distances() -> None:
    leaf = _random(N, 8, seed=2).requires_grad_()

    def step(s: Tensor) -> Tensor:
        return functional.tuple_matching_loss(s, TEACHER[:, :8], LABELS)

    forward, backward = _code(step, leaf)
    assert _operators(forward) == ["tuple_matching"] and not _operators(backward)
    takes = re.findall(r"^ +cpp_fused_(\w+)\(.*tangents_1.*\)$", backward, re.MULTILINE)
    assert len(takes) == 1 and "sqrt" in takes[0], "the factor has a sweep of its own"

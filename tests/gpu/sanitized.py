"""A few small steps that reach every CUDA kernel once, to be run under compute-sanitizer.

    compute-sanitizer --tool memcheck python tests/gpu/sanitized.py

Nothing but torch and the package is imported. ``PYTORCH_NO_CUDA_MEMORY_CACHING=1`` gives each
tensor its own allocation, so that a byte beside it is an error. ``--cpu`` tries the program itself.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor

from kdkernels import functional as F

Step = Callable[[], Tensor]
F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
ROWS: list[tuple[tuple[int, ...], torch.dtype]] = [
    ((37, 19), F32),
    ((21, 257), BF16),
    ((9, 1000), F16),
    ((5, 1032), F32),
    ((3, 5003), BF16),
    ((5, 21848), F32),
    ((3, 40008), BF16),
    ((3, 9001), F32),
    ((5, 33), F64),
]
"""On an H200: three kinds of ``lanes``, ``cluster`` of whole packs and of others, ``general``."""
UNLIKE = [((3, 5000), BF16), ((3, 9000), F32)]
"""Likewise ``block`` and ``stream``: the teacher's rows begin one element off."""
SPLIT = ((2, 131080), F32)
CORRELATIONS: list[tuple[tuple[int, ...], torch.dtype]] = [
    ((40, 19), F32),
    ((21, 1000), BF16),
    ((9, 2057), F16),
    ((17, 4096), F32),
    ((9, 40), F64),
    ((256, 17000), BF16),
    ((160, 27001), BF16),
]
"""``columns``, ``staged``, ``stream``; ``slices`` by clusters, of whole packs and not."""


def words(size: tuple[int, ...], dtype: torch.dtype) -> str:
    return f"{'x'.join(map(str, size))} {str(dtype).removeprefix('torch.')}"


def pair(size: tuple[int, ...], dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Made on the host, so that initcheck sees the copies and not torch's random kernels."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(size, generator=generator).to(dtype) for _ in range(2))
    target = torch.randint(size[1], (size[0], *size[2:]), generator=generator)
    target.view(-1)[1 % target.numel()] = -100
    return student.to(device).requires_grad_(), teacher.to(device), target.to(device)


def one_off(x: Tensor) -> Tensor:
    """The same rows, one element behind a multiple of 16 bytes."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


def steps(device: str, quick: bool) -> Iterator[tuple[str, Tensor, Step]]:
    """Name, leaf and loss of each step."""
    for size, dtype in [*ROWS, *UNLIKE, *([] if quick else [SPLIT])]:
        name = words(size, dtype)
        student, teacher, target = pair(size, dtype, device)
        if (size, dtype) in UNLIKE:
            teacher = one_off(teacher)
        valid = target.clamp(min=0)
        yield (
            f"kd {name}",
            student,
            functools.partial(F.kd_loss, student, teacher, backend="native"),
        )
        yield (
            f"dkd {name}",
            student,
            functools.partial(F.dkd_loss, student, teacher, target, backend="native"),
        )
        yield (
            f"aekt {name}, sum",
            student,
            functools.partial(
                F.aekt_loss, student, teacher, valid, reduction="sum", backend="native"
            ),
        )
        yield (
            f"kd {name}, none",
            student,
            functools.partial(F.kd_loss, student, teacher, reduction="none", backend="native"),
        )
    for size, dtype in CORRELATIONS:
        student, teacher, _ = pair(size, dtype, device)
        name = words(size, dtype)
        yield (
            f"dist {name}",
            student,
            functools.partial(F.dist_loss, student, teacher, backend="native"),
        )
    student, teacher, target = pair((2, 19, 5, 7), F32, device)
    yield "kd image", student, functools.partial(F.kd_loss, student, teacher, backend="native")
    yield "dist image", student, functools.partial(F.dist_loss, student, teacher, backend="native")
    standard = functools.partial(F.dkd_loss, standardize=True, backend="native")
    yield "dkd standardized", student, functools.partial(standard, student, teacher, target)
    yield from embeddings(device)


def embeddings(device: str) -> Iterator[tuple[str, Tensor, Step]]:
    for size in ((5, 33), (3, 4, 8, 8), (2, 20000)):
        made = torch.randn((3, *size), generator=torch.Generator().manual_seed(0)).to(device)
        leaf = made[0].clone().requires_grad_()
        for similarity in ("l1", "cosine"):
            yield (
                f"iekd {similarity} {size}",
                leaf,
                functools.partial(
                    F.iekd_loss, leaf, made[1], made[2], similarity=similarity, backend="native"
                ),
            )
    student, teacher, _ = pair((40, 17), F32, device)
    labels = (torch.arange(40) % 4).to(device)
    yield (
        "tuples",
        student,
        functools.partial(F.tuple_matching_loss, student, teacher, labels, backend="native"),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--cpu", action="store_true", help="try the program on the CPU")
    parser.add_argument("--quick", action="store_true", help="leave the longest rows out")
    options = parser.parse_args()
    if not options.cpu and not torch.cuda.is_available():
        print("sanitized: no CUDA device", file=sys.stderr)
        return 1
    count = 0
    for name, leaf, loss_of in steps("cpu" if options.cpu else "cuda", options.quick):
        loss = loss_of()
        # A factor other than 1, so that the stored gradient is scaled.
        upstream = torch.full(loss.shape, -2.5, dtype=loss.dtype).to(loss.device)
        (gradient,) = torch.autograd.grad(loss, leaf, upstream)
        if not bool(torch.isfinite(gradient.cpu()).all()):
            print(f"sanitized: {name} has a gradient that is not finite", file=sys.stderr)
            return 2
        count += 1
        print(name, flush=True)
    print(f"sanitized: {count} steps ran")
    return 0


if __name__ == "__main__":
    sys.exit(main())

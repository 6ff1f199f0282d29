"""``python -m benchmarks.linear_head``: losses through the output layer, time and peak memory.

Forward and backward, hidden states and weight of the student with gradients, each contender in a
fresh process. Its peak is what the process holds at most beyond its inputs. The teacher is hidden
states and a layer of the same size (``hidden x head``), logits, or the 64 likeliest tokens.
Times are the best of some steps; compare them within one run.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels import linear_kd_loss, linear_logprob
from kdkernels.teacher import LinearTeacher, top_k

from .alone import MIB, alone, mark
from .machine import busy, device_name

SHAPES = ((2048, 512, 50257), (4096, 256, 32000))
"""Tokens, width, vocabulary."""

Loss = Callable[[Tensor, Tensor, Any], Tensor]


def _kl(logits: Tensor, teacher: Tensor) -> Tensor:
    log_q, log_p = logits.log_softmax(-1), teacher.log_softmax(-1)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1).mean()


def eager(hidden: Tensor, weight: Tensor, teacher: Any) -> Tensor:
    """KL of the teacher's hidden states through its layer, as trainers write it."""
    with torch.no_grad():
        of_teacher = F.linear(*teacher) if isinstance(teacher, tuple) else teacher
    return _kl(F.linear(hidden, weight), of_teacher)


def torch_head(hidden: Tensor, weight: Tensor, teacher: Tensor) -> Tensor:
    """torch's own fused head: cross-entropy with the teacher's probabilities, which differs from
    KL by a constant."""
    return F.linear_cross_entropy(hidden, weight, teacher)  # type: ignore[attr-defined]


def ours(hidden: Tensor, weight: Tensor, teacher: Any) -> Tensor:
    return linear_kd_loss(hidden, weight, teacher)


def eager_logprob(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    """With a weight of its own for each token, as policy gradients have it."""
    found = F.linear(hidden, weight).log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    return (found * ids).sum()


def our_logprob(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    return (linear_logprob(hidden, weight, ids).logprob * ids).sum()


def _step(name: str, shape: tuple[int, int, int], dtype: str, steps: int) -> float:
    """The best seconds of a step; what a peak is measured against is marked before the first."""
    rows, width, vocab = shape
    kind = getattr(torch, dtype)
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*size, generator=generator) * scale).to(kind)

    hidden = normal(rows, width).requires_grad_()
    weight = normal(vocab, width, scale=0.05).requires_grad_()
    teacher: Any = (normal(rows, width), normal(vocab, width, scale=0.05))
    loss, form = CONTENDERS[name]
    if form == "logits":
        teacher = F.linear(*teacher)
        if loss is torch_head:
            teacher = teacher.softmax(-1)
    elif form == "ids":
        teacher = torch.randint(vocab, (rows,), generator=generator)
    elif form == "top":
        teacher = top_k(F.linear(*teacher), 64)
    elif loss is ours:
        teacher = LinearTeacher(*teacher)
    if name.startswith("torch.compile"):
        loss = torch.compile(loss)
        loss(hidden, weight, teacher).backward()  # to compile is not the step
        hidden.grad = weight.grad = None
    best = float("inf")
    mark()
    for _ in range(steps):
        hidden.grad = weight.grad = None
        start = time.perf_counter()
        loss(hidden, weight, teacher).backward()
        best = min(best, time.perf_counter() - start)
    return best


CONTENDERS: dict[str, tuple[Loss, str]] = {
    "eager, hidden x head": (eager, "linear"),
    "torch.compile, hidden x head": (eager, "linear"),
    "kdkernels, hidden x head": (ours, "linear"),
    "eager, logits": (eager, "logits"),
    "torch.compile, logits": (eager, "logits"),
    "F.linear_cross_entropy, probabilities": (torch_head, "logits"),
    "kdkernels, logits": (ours, "logits"),
    "kdkernels, top 64": (ours, "top"),
    "eager, log-probabilities": (eager_logprob, "ids"),
    "torch.compile, log-probabilities": (eager_logprob, "ids"),
    "kdkernels, log-probabilities": (our_logprob, "ids"),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--only", default="", help="contenders whose name has this in it")
    parser.add_argument("--shapes", default="", help="as 2048x512x50257,4096x256x32000")
    parser.add_argument("--json", type=Path, help="a file for the numbers")
    options = parser.parse_args()
    if warning := busy():
        print(warning)
    shapes = [tuple(map(int, s.split("x"))) for s in options.shapes.split(",") if s] or SHAPES
    found: list[dict[str, Any]] = []
    for shape in shapes:
        print("x".join(map(str, shape)), options.dtype, f"{options.threads} threads", flush=True)
        print(f"  {'':<38}{'s':>8}{'of eager':>10}{'peak, MiB':>11}{'eager over':>12}")
        first: dict[str, tuple[float, int]] = {}
        for name in CONTENDERS:
            if options.only not in name:
                continue
            if "linear_cross_entropy" in name and not hasattr(F, "linear_cross_entropy"):
                print(f"  {name:<38}  not in torch {torch.__version__}")
                continue
            arguments = (name, shape, options.dtype, options.steps)
            seconds, peak = alone(_step, *arguments, threads=options.threads)
            of_time, of_peak = first.setdefault(CONTENDERS[name][1], (seconds, peak))
            print(
                f"  {name:<38}{seconds:>8.2f}{seconds / of_time:>10.2f}"
                f"{peak / MIB:>11.0f}{of_peak / max(peak, 1):>12.1f}",
                flush=True,
            )
            found.append({"name": name, "shape": shape, "seconds": seconds, "peak": peak})
    if options.json:
        facts = {"device": device_name("cpu"), "torch": torch.__version__, **vars(options)}
        facts.pop("json")
        options.json.write_text(json.dumps({"facts": facts, "results": found}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

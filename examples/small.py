"""What the small recipes share: command line, training loop with a progress bar, table, figure."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import plots
import torch
from data import generator
from optimizing import cosine
from tables import grid, paired, spread
from torch import Tensor, nn
from tqdm import tqdm

Loss = Callable[[Tensor, Tensor], Tensor]
"""Of a batch of images and its labels."""


def batches(images: Tensor, labels: Tensor, size: int, seed: int) -> Iterator[tuple[Tensor, ...]]:
    """Without end, reshuffled at each turn; the same for every method of a seed."""
    dice = generator("batches", seed)
    while True:
        for rows in torch.randperm(len(labels), generator=dice).split(size):
            if len(rows) == min(size, len(labels)):
                yield images[rows], labels[rows]


def fit(
    nets: nn.Module, loss: Loss, images: Tensor, labels: Tensor, *, steps: int, seed: int,
    bar: tqdm[None] | None = None, batch: int = 50, lr: float = 3e-3,
) -> None:  # fmt: skip
    """Train on what ``loss`` says; gradients are clipped, the learning rate is a cosine."""
    optimizer = torch.optim.AdamW(nets.parameters(), lr=lr, weight_decay=1e-2)
    factor = functools.partial(cosine, steps=steps, warmup=steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    source = batches(images, labels, batch, seed)
    nets.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss(*next(source)).backward()
        nn.utils.clip_grad_norm_(nets.parameters(), 2.0)
        optimizer.step()
        schedule.step()
        if bar is not None:
            bar.update()
    nets.eval()


def seeded(build: Callable[[], nn.Module], *keys: object) -> nn.Module:
    """A network whose first weights depend on the keys alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(*keys).initial_seed())
        return build()


def compare(
    name: str,
    methods: Sequence[str],
    run: Callable[[str, int, int, tqdm[None]], float],
    unit: str,
    argv: Sequence[str] | None,
    *,
    steps: int,
    seeds: int = 5,
) -> dict[str, list[float]]:
    """Run every method on every seed; print the table and write the figure.

    ``run(method, seed, steps, bar)`` trains for some steps and gives a score, of which more is
    better.
    """
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[*range(seeds)])
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--output", type=Path, default=Path("runs") / name)
    parser.add_argument("--threads", type=int, default=1, help="more gain nothing here")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    args.seeds = list(dict.fromkeys(args.seeds))  # a seed is counted once
    total = len(methods) * len(args.seeds) * args.steps
    found: dict[str, list[float]] = {}
    # disable=None: where the output is no terminal.
    with tqdm(total=total, desc=name, unit="step", disable=None, leave=False) as bar:
        for method in methods:
            found[method] = [run(method, seed, args.steps, bar) for seed in args.seeds]
    first, *others = methods
    gains = {m: [a - b for a, b in zip(found[m], found[first], strict=True)] for m in others}
    scores = {m: "{:.2f} ± {:.2f}".format(*spread(x)) for m, x in found.items()}
    rows = [(m, score, paired(gains.get(m))) for m, score in scores.items()]
    print("\n".join(grid(("method", unit, f"gain over {first}, paired (seeds)"), rows)))

    def draw(path: Path) -> None:
        figure, axis = plots.plt.subplots(figsize=(7, 4.2), layout="constrained")
        colours = dict(zip(methods, plots.COLOURS, strict=False))
        title = f"{name}: gain over {first}, {len(args.seeds)} seeds"
        plots.gains(axis, list(gains.items()), colours.__getitem__, title, unit, "{:+.2f}")
        plots.save(figure, path)

    plots.write(draw, args.output / f"{name}.png")
    print(f"figure: {args.output / f'{name}.png'}")
    return found

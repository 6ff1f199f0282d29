"""Training under torchrun: on 2 and 4 processes the steps are those of one.

Of images without augmentation and with networks whose norms do not look at the batch: batch norm is
over a process's own images.
"""

from __future__ import annotations

import functools
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import needs_processes, run_on_ranks
from torch import nn
from trainer import EXAMPLES, TINY, digits, distill, engine, models, plan, recipes

for needed in ("tokenizers", "matplotlib", "tqdm"):
    pytest.importorskip(needed, reason=f"{needed}: pip install -e '.[examples]'")

sys.path.insert(0, str(EXAMPLES))
try:
    import lm_data
    import lm_engine
    import lm_models
    import lm_teachers
    from lm_methods import Method
    from world import World
finally:
    sys.path.remove(str(EXAMPLES))

CONTEXT, VOCABULARY, STEPS = 8, 64, 50
CASES = (
    ("ce", ""),
    ("kl:temperature=2", "dense"),
    ("jsd", "dense"),
    ("kl", "topk"),
    ("kl", "head"),
)


def _job(method: str, form: str, folder: Path) -> lm_engine.Job:
    generator = torch.Generator().manual_seed(1)
    stream = torch.randint(VOCABULARY, (400,), generator=generator)
    teacher = None
    if form:
        network = lm_models.build("16x1", VOCABULARY, CONTEXT, 5).double().requires_grad_(False)
        cache = None
        if form == "topk":
            folder = folder / str(dist.get_rank())
            cache = lm_teachers.cached(network, stream, CONTEXT, 8, 1.0, folder, "the network")
        teacher = lm_teachers.Teacher(network, form, cache)
    return lm_engine.Job(
        name="student",
        method=Method.parse(method),
        seed=0,
        model=lm_models.build("8x1", VOCABULARY, CONTEXT, 3).double(),
        stream=stream,
        held=lm_data.windows(stream, CONTEXT),
        context=CONTEXT,
        steps=STEPS,
        batch=6,  # four processes have one sequence or two
        lr=1e-2,
        weight_decay=0.1,
        evaluate_every=STEPS,
        backend=None,
        settings={},
        teacher=teacher,
    )


def _of_main(world: World, model: nn.Module, fit: Callable[[], Any]) -> Any:
    """What the main process trains alone, and its history, on every process."""
    history = [fit() if world.main else None]
    dist.broadcast_object_list(history)
    for x in model.parameters():
        dist.broadcast(x.detach(), 0)
    return history[0]


def _check(method: str, form: str) -> None:
    """The same numbers, so that the same seeds give them on any number of processes."""
    world = World(torch.device("cpu"), dist.get_rank(), dist.get_world_size())
    with tempfile.TemporaryDirectory() as folder:
        alone, shared = (_job(method, form, Path(folder)) for _ in range(2))
        before = [x.detach().clone() for x in alone.model.parameters()]
        wanted = _of_main(world, alone.model, lambda: lm_engine.fit(alone, Path(folder) / "alone"))
        shared = replace(shared, world=world)
        paths: list[object] = [folder]
        dist.broadcast_object_list(paths)  # checkpoints are read from one folder
        found = lm_engine.fit(shared, Path(str(paths[0])) / "shared")
        world.barrier()
    assert abs(found.loss[-1] - wanted.loss[-1]) < 1e-5
    assert abs(found.final - wanted.final) < 1e-5
    pairs = zip(before, alone.model.parameters(), shared.model.parameters(), strict=True)
    for start, one, other in pairs:
        assert (one - start).abs().max() > 1e-2
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5)


def _cases() -> Iterator[tuple[str, Callable[[], None]]]:
    for method, form in CASES:
        yield f"{method} {form}", functools.partial(_check, method, form)


@needs_processes
def test_language_models_learn_the_same_on_any_number_of_processes() -> None:
    run_on_ranks(4, _cases)


def _without_batches(network: nn.Module) -> None:
    """Every batch norm of a network becomes one over the channels of an image."""
    for name, layer in list(network.named_children()):
        if isinstance(layer, nn.BatchNorm2d):
            setattr(network, name, nn.GroupNorm(1, layer.num_features))
        else:
            _without_batches(layer)


def _image_job(world: World, *extra: str) -> engine.Job:
    args = distill.parse([*TINY, "--epochs", "25", "--batch", "16", *extra])
    data = replace(digits(), shift=0, flip=False)
    teacher = models.build("8x1", data, seed=5).double().requires_grad_(False)
    method = recipes.Method.parse("dist")
    job = plan.student_job(args, world, data, "same", method, 0, teacher, "weak")
    _without_batches(job.model)
    job.model.double()
    images = {name: getattr(job.data, name).double() for name in ("images", "test_images")}
    return replace(job, data=replace(job.data, **images))


def _check_dist(global_batch: bool) -> None:
    extra = ["--global-batch-dist"] * global_batch
    one = World(torch.device("cpu"))
    world = World(torch.device("cpu"), dist.get_rank(), dist.get_world_size())
    alone, shared = _image_job(one, *extra), _image_job(world, *extra)
    with tempfile.TemporaryDirectory() as folder:
        wanted = _of_main(
            world, alone.model, lambda: engine.fit(alone, one, Path(folder) / "alone")
        )
        paths: list[object] = [folder]
        dist.broadcast_object_list(paths)
        found = engine.fit(shared, world, Path(str(paths[0])) / "shared")
        world.barrier()
    pairs = zip(alone.model.parameters(), shared.model.parameters(), strict=True)
    gap = max(float((x - y).detach().abs().max()) for x, y in pairs)
    if global_batch:
        assert gap < 1e-5 and abs(found.loss[-1] - wanted.loss[-1]) < 1e-5
    else:
        assert gap > 1e-3  # the columns of a process's own images


def _image_cases() -> Iterator[tuple[str, Callable[[], None]]]:
    for global_batch in (True, False):
        yield f"global batch {global_batch}", functools.partial(_check_dist, global_batch)


@needs_processes
def test_dist_over_all_images_is_that_of_one_process() -> None:
    run_on_ranks(2, _image_cases)

"""The data of the reference trainer: splits that share no image, balance, shares of processes."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from trainer import digits, distill


def test_validation_keeps_the_test_split_out() -> None:
    data = digits()
    held = data.validation()
    assert len(held.targets) + len(held.test_targets) == len(data.targets)
    rows = {image.numpy().tobytes() for image in held.images}
    assert not rows & {image.numpy().tobytes() for image in held.test_images}
    assert not rows & {image.numpy().tobytes() for image in data.test_images}


def test_disjoint_labels_share_no_image() -> None:
    data = digits()
    low, high = data.only(range(5)), data.only(range(5, 10))
    assert (low.classes, high.classes) == (5, 5)
    assert len(low.targets) + len(high.targets) == len(data.targets)
    assert high.targets.add(5).equal(data.targets[data.targets >= 5])
    assert high.test_images.equal(data.test_images[data.test_targets >= 5])
    assert high.subset(20, seed=1).targets.bincount().tolist() == [4] * 5


def test_subset_is_balanced() -> None:
    data = digits()
    counts = data.subset(50, seed=3).targets.bincount()
    assert counts.tolist() == [5] * 10
    assert data.subset(50, seed=3).targets.equal(data.subset(50, seed=3).targets)


def test_processes_share_an_epoch() -> None:
    """Two processes see disjoint halves of what one sees."""
    data = digits()
    data = type(data)(**{**vars(data), "shift": 0})

    def images(rank: int, world: int) -> list[bytes]:
        batches = data.epoch(100, seed=1, epoch=2, rank=rank, world=world)
        return [image.numpy().tobytes() for batch, _ in batches for image in batch]

    both = images(0, 2), images(1, 2)
    assert sorted(both[0] + both[1]) == sorted(images(0, 1))


def test_cifar100_without_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "torchvision" else find(name)
    )
    with pytest.raises(SystemExit, match=r"not installed.*\n.*pip install torchvision"):
        distill.main(["--dataset", "cifar100", "--output", str(tmp_path)])

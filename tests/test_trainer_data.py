"""The data of the reference trainer: splits that share no image, balance, shares of processes."""

from __future__ import annotations

import gzip
import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from trainer import World, digits, distill, loaders, plan, recipes, setups


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


def test_checkpoints_belong_to_their_data() -> None:
    """The same numbers of other images, or of other test images, have another stamp."""
    data = digits()
    assert data.stamp() == digits().stamp()
    for name in ("images", "targets", "test_images", "test_targets"):
        assert replace(data, **{name: getattr(data, name).flip(0)}).stamp() != data.stamp()
    args = distill.parse(["--dataset", "digits", "--device", "cpu"])
    known = [plan.Plan(args, World.join("cpu"), d, "same") for d in (data, data.validation())]
    method = recipes.Method.parse("kd")
    for kind in (lambda p: p.teacher("weak"), lambda p: p.student(method, 0, None, "weak")):
        a, b = (kind(p).settings for p in known)
        assert {k for k in a if a[k] != b[k]} == {"data"}


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


def write_fashion(folder: Path, pack: bool, labels: int = 30) -> None:
    """Four idx files of 30 and 20 noise images."""
    folder.mkdir(parents=True, exist_ok=True)
    noise = torch.Generator().manual_seed(0)
    for name in loaders.FASHION:
        count = 30 if name.startswith("train") else 20
        shape = [count, 28, 28] if "images" in name else [count if count == 20 else labels]
        values = torch.randint(256, shape, dtype=torch.uint8, generator=noise)
        values = values if "images" in name else torch.arange(shape[0], dtype=torch.uint8) % 10
        header = bytes([0, 0, 8, len(shape)]) + b"".join(n.to_bytes(4, "big") for n in shape)
        raw = header + values.numpy().tobytes()
        path = folder / (name + ".gz" * pack)
        path.write_bytes(gzip.compress(raw) if pack else raw)


@pytest.mark.parametrize("layout", ["", "FashionMNIST/raw"])
@pytest.mark.parametrize("pack", [True, False])
def test_fashion_mnist_is_found(
    layout: str, pack: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Debian's folder and torchvision's, packed and not, by option and by environment."""
    write_fashion(tmp_path / layout, pack)
    data = loaders.fashion_mnist(str(tmp_path))
    assert data.images.shape == (30, 1, 28, 28) and data.test_images.shape == (20, 1, 28, 28)
    assert data.targets.tolist() == [*range(10)] * 3
    folder = loaders.fashion_folder(str(tmp_path))
    assert folder is not None
    train, test = (loaders.idx(folder / loaders.FASHION[i]).double() for i in (0, 2))
    expected = (test - train.mean()) / train.std()  # the training images' mean and deviation
    torch.testing.assert_close(data.test_images[:, 0].double(), expected, rtol=1e-4, atol=1e-4)
    monkeypatch.setenv(loaders.ROOT, str(tmp_path))
    assert distill.parse([]).dataset == "fashion-mnist"
    assert distill.parse([]).methods == list(setups.SETUPS["fashion-mnist"].methods)


def test_fashion_mnist_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Asked for, it is an error; not asked for, digits take its place. Both say how to get it."""
    monkeypatch.setenv(loaders.ROOT, str(tmp_path))
    assert distill.parse([]).dataset == "digits"
    nowhere = ["--output", str(tmp_path / "runs"), "--data-root", str(tmp_path / "no")]
    with pytest.raises(SystemExit, match=r"not found under .*no\.\n.*\n.*dataset-fashion-mnist"):
        distill.main([*nowhere, "--dataset", "fashion-mnist"])
    few = ["--seeds", "0", "--methods", "ce", "--epochs", "1", "--device", "cpu"]
    assert distill.main([*nowhere, *few]) == 0
    text = capsys.readouterr().out
    assert "digits instead" in text and "apt install dataset-fashion-mnist" in text


def test_broken_idx_files(tmp_path: Path) -> None:
    write_fashion(tmp_path, pack=False, labels=7)
    path = tmp_path / loaders.FASHION[1]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(SystemExit, match="must hold 7 values, got 6"):
        loaders.idx(path)
    for content in (b"<html>", b"\0\0\x08", b"\0\0\x08\3\0"):
        path.write_bytes(content)
        with pytest.raises(SystemExit, match=f"be an idx file of bytes, got {content[:4].hex()}"):
            loaders.idx(path)


@pytest.mark.parametrize("dataset", list(setups.SETUPS))
def test_setups_hold_together(dataset: str) -> None:
    setup = setups.SETUPS[dataset]
    assert {"medium"} <= set(setup.teachers) <= {"weak", "medium", "strong"}
    assert list(setup.splits) == ["same", "overlap", "disjoint"]
    for name, split in setup.splits.items():
        common = set(split.teacher or ()) & set(split.student or ())
        assert (split.teacher is None) == (split.student is None) == (name == "same")
        assert bool(common) == (name == "overlap")
        assert set(split.teacher or ()) != set(split.student or ()) or name == "same"
    for text in setup.methods:
        recipes.Method.parse(text)
    assert set(recipes.CHOSEN.get(dataset, {})) <= {"*", *recipes.RECIPES}
    for name, options in recipes.CHOSEN.get(dataset, {}).items():
        for option, value in options.items():
            assert recipes.change(f"{option}={value}", name) == (option, value)

"""The data sets: where they lie, what to say when they do not, and how their images are scaled."""

from __future__ import annotations

import functools
import gzip
import importlib.util
import os
from pathlib import Path

import torch
from data import Data
from torch import Tensor

ROOT = "KDKERNELS_DATA"
"""The environment variable that stands for ``--data-root``."""

FASHION = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
DEBIAN = Path("/usr/share/datasets/fashion-mnist")

GET_FASHION = (
    "Fashion-MNIST's four idx files (31 MB) come with Debian's and Ubuntu's package:\n"
    "    apt install dataset-fashion-mnist\n"
    "or with torchvision.datasets.FashionMNIST(DIR, download=True) and --data-root DIR"
)


def digits() -> Data:
    """scikit-learn's bundled handwritten digits: 1797 real 8x8 images, 10 classes, no download.

    The split is fixed and stratified: 1000 images to train on, 797 to test on.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1)
    targets = torch.tensor(bunch.target, dtype=torch.int64)
    train, test = train_test_split(
        range(len(targets)), train_size=1000, random_state=0, stratify=bunch.target
    )
    scale = images[train].mean(), images[train].std()
    images = (images - scale[0]) / scale[1]
    return Data(images[train], targets[train], images[test], targets[test], 10, shift=1, flip=False)


def fashion_folder(root: str | None) -> Path | None:
    """The folder that holds all four files, packed or not; None if there is none.

    A root that is given, or named by the environment, is the only place where it is looked for.
    """
    root = root or os.environ.get(ROOT)
    places = [DEBIAN, Path("data")] if root is None else [Path(root)]
    for place in places:
        for folder in (place, place / "FashionMNIST" / "raw", place / "raw"):
            if all(_packed(folder / name) for name in FASHION):
                return folder
    return None


def _packed(path: Path) -> Path | None:
    """The file itself, or as gzip packed it."""
    candidates = (path, path.with_name(path.name + ".gz"))
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def idx(path: Path) -> Tensor:
    """An idx file of bytes: two zeros, type 8, the number of sizes, the sizes, the values."""
    found = _packed(path)
    assert found is not None
    raw = gzip.decompress(found.read_bytes()) if found.suffix == ".gz" else found.read_bytes()
    if raw[:3] != b"\x00\x00\x08" or len(raw) < 4 or len(raw) <= 4 + 4 * raw[3]:
        raise SystemExit(f"distill.py: {found} must be an idx file of bytes, got {raw[:4].hex()}")
    begin = 4 + 4 * raw[3]
    shape = [int.from_bytes(raw[at : at + 4], "big") for at in range(4, begin, 4)]
    values = torch.frombuffer(bytearray(raw), dtype=torch.uint8, offset=begin)
    if values.numel() != torch.Size(shape).numel():
        raise SystemExit(
            f"distill.py: {found} must hold {torch.Size(shape).numel()} values, "
            f"got {values.numel()}"
        )
    return values.reshape(shape)


def fashion_mnist(root: str | None) -> Data:
    """Fashion-MNIST: 60000 training and 10000 test images of 28x28, 10 classes of clothing."""
    folder = fashion_folder(root)
    if folder is None:
        place = root or os.environ.get(ROOT)
        where = f" under {place}" if place else ""
        raise SystemExit(f"distill.py: Fashion-MNIST was not found{where}.\n{GET_FASHION}")
    images, targets, test_images, test_targets = (idx(folder / name) for name in FASHION)
    images, test_images = (part.float().unsqueeze(1) for part in (images, test_images))
    mean, std = images.mean(), images.std()
    images.sub_(mean).div_(std)
    test_images.sub_(mean).div_(std)
    return Data(
        images,
        targets.long(),
        test_images,
        test_targets.long(),
        10,
        shift=2,
        flip=False,
        stride=2,
    )


def cifar100(root: str | None) -> Data:
    """CIFAR-100 through torchvision: 50000 training and 10000 test images, 100 classes."""
    if importlib.util.find_spec("torchvision") is None:
        raise SystemExit(
            "distill.py: --dataset cifar100 needs torchvision, which is not installed.\n"
            "Install the build that matches your torch:  pip install torchvision"
        )
    root = root or os.environ.get(ROOT)
    if root is None:
        raise SystemExit(
            "distill.py: --dataset cifar100 needs --data-root DIR, the folder that holds (or will\n"
            "receive) the data; the first use downloads it there, about 170 MB."
        )
    import numpy
    from torchvision.datasets import CIFAR100

    def load(train: bool) -> tuple[Tensor, Tensor]:
        part = CIFAR100(root, train=train, download=True)
        images = torch.from_numpy(numpy.asarray(part.data)).permute(0, 3, 1, 2).float().div_(255)
        return images, torch.tensor(part.targets, dtype=torch.int64)

    (images, targets), (test_images, test_targets) = load(True), load(False)
    mean, std = images.mean((0, 2, 3), keepdim=True), images.std((0, 2, 3), keepdim=True)
    images, test_images = (images - mean) / std, (test_images - mean) / std
    return Data(images, targets, test_images, test_targets, 100, shift=4, flip=True)


@functools.cache
def load(dataset: str, root: str | None) -> Data:
    """Read once; whoever takes parts of it makes new tensors."""
    if dataset == "digits":
        return digits()
    return fashion_mnist(root) if dataset == "fashion-mnist" else cifar100(root)

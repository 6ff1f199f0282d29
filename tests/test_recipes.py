"""The small recipes of the examples, run for a few steps."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from trainer import EXAMPLES, digits

NAMES = ("mutual_learning", "mixup", "multi_label", "segmentation")


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def _recipe(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module(name)


@pytest.mark.parametrize("name", NAMES)
def test_a_short_run(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A table of all methods with their seeds, a figure, and the same numbers again."""
    recipe = _recipe(name, monkeypatch)
    arguments = ["--seeds", "0", "1", "--steps", "3", "--output", str(tmp_path)]
    found = recipe.main(arguments)
    assert len(found) >= 3 and all(len(scores) == 2 for scores in found.values())
    assert all(0 < score < 100 for scores in found.values() for score in scores)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(found) + 3 and "(seeds)" in lines[0]
    for (method, scores), line in zip(found.items(), lines[2:], strict=False):
        assert line.startswith(f"| {method} ") and f"{sum(scores) / 2:.2f}" in line
    figure = tmp_path / f"{name}.png"
    assert figure.read_bytes().startswith(b"\x89PNG") and str(figure) in lines[-1]
    assert recipe.main(arguments) == found
    assert len(Path(recipe.__file__).read_text().splitlines()) <= 100


def test_scenes_are_real_ink_and_honest_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    segmentation = _recipe("segmentation", monkeypatch)
    data = digits()
    images, labels = segmentation.scenes(data.images, data.targets, 8, "test")
    assert images.shape == (8, 1, 20, 20) and labels.shape == (8, 20, 20)
    paper, ignored = labels == segmentation.PAPER, labels == segmentation.IGNORED
    assert paper.float().mean() > 0.4 and 0.02 < ignored.float().mean() < 0.3
    ink = images[:, 0]
    assert ink[~paper & ~ignored].min() > ink[paper].max() - 0.5
    assert set(labels.unique().tolist()) <= {*range(11), 255}


def test_mutual_losses_have_one_value_where_they_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """The symmetric call is the published pair, with the rest of the gradient."""
    recipe = _recipe("mutual_learning", monkeypatch)
    a, b = torch.randn(2, 6, 10, dtype=torch.float64).requires_grad_().unbind()
    published, one = recipe.as_published(a, b), recipe.symmetric(a, b)
    torch.testing.assert_close(one, published)
    (of_pair,) = torch.autograd.grad(published, a, retain_graph=True)
    (whole,) = torch.autograd.grad(one, a)
    (rest,) = torch.autograd.grad(
        recipe.kd_loss(b.detach(), a, 1.0, teacher_grad=True), a, retain_graph=True
    )
    torch.testing.assert_close(whole, of_pair + rest)


def test_the_readme_names_them() -> None:
    page = (EXAMPLES / "README.md").read_text()
    assert all(f"`{name}.py`" in page for name in NAMES)

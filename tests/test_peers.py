"""Every row of README's "Coming from ..." against the package that it names, where that is here.

``make peers`` installs those that are on the package index. The right column is run as README has
it: the test only gives names to what it leaves open, and calls the loss where it names a Module.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import re
import sys
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kdkernels
from kdkernels.registry import SPECS

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SECTION = README.partition("## Coming from ...")[2].partition("\n## ")[0]
ROWS = [
    (left, re.findall(r"`([^`]+)`", right))
    for left, right in re.findall(r"^\| (.+?) \| (.+?) \|$", SECTION, re.MULTILINE)
    if left != "you have"
]
NOT_ON_AN_INDEX = "is on no package index: put a clone of its repository on PYTHONPATH"

T = 3.0
Peer = Callable[[dict[str, Any]], Tensor]
"""What the other package makes of the names; it may add to them what the right column uses."""


def peer(name: str, reason: str = "is not installed (make peers)") -> Any:
    """A module of another package; the test is skipped where that is absent."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    top = name.partition(".")[0]
    if find_spec(top) is None:
        pytest.skip(f"{top} {reason}")
    torchvision()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(name)


@functools.cache
def torchvision() -> None:
    """Let it be imported where it was built for another torch (the index has CUDA's alone).

    Its library does not load then, and its Python stops for want of two operators, which nothing
    here calls.
    """
    spec = find_spec("torchvision")
    if spec is None or spec.origin is None:
        return
    try:
        for library in Path(spec.origin).parent.glob("_C*.so"):
            torch.ops.load_library(library)
    except OSError:
        operators = torch.library.Library("torchvision", "DEF")
        KEPT.append(operators)
        for name in ("nms", "qnms"):
            operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


KEPT: list[torch.library.Library] = []
"""A library's operators go with it."""


class Given(nn.Module):
    """A model that returns given logits."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits
        self.num_classes, self.in_chans = logits.shape[1], 3
        self.pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}

    def forward(self, inputs: Tensor) -> Tensor:
        return self.logits


def hunto(names: dict[str, Any]) -> Tensor:
    dist = peer(
        "lib.models.losses.dist_kd", f"of hunto/image_classification_sota {NOT_ON_AN_INDEX}"
    )
    module = dist.DIST(names["beta"], names["gamma"], names["tau"])
    return module(names["z_s"], names["z_t"])


def mdistiller_dkd(names: dict[str, Any]) -> Tensor:
    module = peer("mdistiller.distillers.DKD", NOT_ON_AN_INDEX)
    options = (names[name] for name in ("alpha", "beta", "temperature"))
    return module.dkd_loss(names["s"], names["t"], names["target"], *options)


def mdistiller_kd(names: dict[str, Any]) -> Tensor:
    module = peer("mdistiller.distillers.KD", NOT_ON_AN_INDEX)
    if "logit_stand" not in inspect.signature(module.kd_loss).parameters:
        pytest.skip("this mdistiller is not the one of logit standardisation, whose row it is")
    return module.kd_loss(names["s"], names["t"], names["temperature"], logit_stand=True)


def mmrazor(names: dict[str, Any]) -> Tensor:
    folder = Path(peer("mmrazor").__file__).parent / "models"
    # The packages themselves import quantization of torch 1.13; their losses need none of it.
    for name, place in ("mmrazor.models", folder), ("mmrazor.models.losses", folder / "losses"):
        if name not in sys.modules:
            stand_in = ModuleType(name)
            stand_in.__path__ = [str(place)]
            sys.modules[name] = stand_in
    module = importlib.import_module("mmrazor.models.losses.dist_loss")
    options = (names[name] for name in ("inter_loss_weight", "intra_loss_weight", "tau"))
    return module.DISTLoss(*options)(names["logits_S"], names["logits_T"])


PLACE = {"path": ".", "io": "output"}


def torchdistill(names: dict[str, Any]) -> Tensor:
    registry = peer("torchdistill.losses.registry")
    peer("torchdistill.losses.mid_level")  # registers the wrapper
    names["register_low_level_loss"] = registry.register_low_level_loss

    outputs = [{".": {"output": names[name]}} for name in ("s", "t")]

    def of(teacher: bool) -> dict[str, Any]:
        return {"is_from_teacher": teacher, "module_path": ".", "io": "output"}

    def use(registered: type[nn.Module]) -> Tensor:
        """As the configuration file has it."""
        kwargs = {"input": of(False), "target": {"uses_label": False, **of(True)}}
        wrapper = {"key": "SimpleLossWrapper", "kwargs": kwargs}
        loss = registry.get_mid_level_loss({"key": "FusedDIST", "kwargs": {"tau": T}}, wrapper)
        assert isinstance(loss.low_level_loss, registered) and registered is kdkernels.DISTLoss
        return loss(*outputs, names["target"])

    names["use"] = use
    places = {f"{m}_module_{p}": v for m in ("student", "teacher") for p, v in PLACE.items()}
    own = registry.get_mid_level_loss({"key": "DISTLoss", "kwargs": {**places, "tau": T}})
    return own(*outputs, names["target"])


def timm(names: dict[str, Any]) -> Tensor:
    task = peer("timm.task")
    distillation = task.LogitDistillationTask(
        student_model=Given(names["s"]), teacher_model=Given(names["t"]), loss_type="kl",
        criterion=nn.CrossEntropyLoss(), distill_loss_weight=1.0, temperature=names["T"],
        verbose=False,
    )  # fmt: skip
    return distillation(torch.zeros(len(names["s"]), 3, 2, 2), names["target"])["kd_loss"]


def deit(names: dict[str, Any]) -> Tensor:
    class Base(nn.Module):
        def forward(self, outputs: Tensor, labels: Tensor) -> Tensor:
            return outputs.new_zeros(())

    losses = peer("losses", f"of facebookresearch/deit {NOT_ON_AN_INDEX}")
    loss = losses.DistillationLoss(Base(), lambda inputs: names["t"], "soft", 1.0, names["tau"])
    return loss(None, (names["s"].detach(), names["s"]), names["target"])


def modelopt(names: dict[str, Any]) -> Tensor:
    distill = peer("modelopt.torch.distill")

    def through(criterion: nn.Module) -> Tensor:
        mode = {"teacher_model": Given(names["t"]), "criterion": criterion}
        model = distill.convert(Given(names["s"]), mode=[("kd_loss", mode)])
        model.train()
        model(torch.zeros(1))
        return model.compute_kd_loss()

    names["use"] = through
    return through(distill.LogitsDistillationLoss(names["temperature"]))


def trl(names: dict[str, Any]) -> Tensor:
    trainer = peer("trl.experimental.gkd").GKDTrainer
    names["student"], names["teacher"], names["labels"] = (
        names[name][None] for name in ("s", "t", "target")
    )
    names["labels"][:, 2:4] = -100
    names["arguments"] = (names["student"], names["teacher"], names["labels"])
    return trainer.generalized_jsd_loss(*names["arguments"], beta=0, temperature=names["T"])


def torchs(names: dict[str, Any]) -> Tensor:
    """The left column, as README has it."""
    (code,) = (re.findall(r"`([^`]+)`", left)[0] for left, _ in ROWS if "F.kl_div" in left)
    softmaxes = {
        "log_softmax": lambda x: F.log_softmax(x, dim=-1),
        "softmax": lambda x: F.softmax(x, dim=-1),
    }
    return eval(code, {"F": F, **names, **softmaxes})


PEERS: dict[str, Peer] = {
    "hunto's": hunto,
    "mdistiller's `dkd_loss": mdistiller_dkd,
    "mdistiller's `kd_loss": mdistiller_kd,
    "mmrazor's": mmrazor,
    "torchdistill": torchdistill,
    "timm's": timm,
    "DeiT's": deit,
    "ModelOpt's": modelopt,
    "TRL's": trl,
    "`F.kl_div": torchs,
}


def _row(start: str) -> str:
    """The code of the row whose left column starts so."""
    (codes,) = (codes for left, codes in ROWS if left.startswith(start))
    return str(codes[0])


def _names() -> dict[str, Any]:
    """What a reader of any row has: logits, labels, the options of the loss."""
    generator = torch.Generator().manual_seed(0)
    s = (2 * torch.randn(7, 9, generator=generator)).requires_grad_()
    t = 2 * torch.randn(7, 9, generator=generator)
    target = torch.randint(9, (7,), generator=generator)
    weights = {"alpha": 0.5, "beta": 2.0, "gamma": 3.0, "tau": T, "temperature": T, "T": T}
    weights |= {"inter_loss_weight": 2.0, "intra_loss_weight": 3.0, "num_classes": 9}
    aliases = {"z_s": s, "z_t": t, "logits_S": s, "logits_T": t}
    aliases |= {"student_logits": s, "teacher_logits": t}
    losses = {spec.module.__name__: spec.module for spec in SPECS.values()}
    names = {"s": s, "t": t, "target": target, **weights, **aliases, **losses}
    return names | {"functional": kdkernels.functional}


def test_every_row_has_a_peer() -> None:
    assert len(ROWS) == len(PEERS) > 8
    for start in PEERS:
        assert _row(start)
    assert not [left for left, _ in ROWS if not left.startswith(tuple(PEERS))]


@pytest.mark.parametrize("start", PEERS, ids=[peer.__name__ for peer in PEERS.values()])
def test_the_row_is_the_peers_loss(start: str) -> None:
    names = _names()
    theirs = PEERS[start](names)
    ours = eval(_row(start), dict(names))
    if not isinstance(ours, Tensor):
        default = lambda loss: loss(*names.get("arguments", (names["s"], names["t"])))  # noqa: E731
        ours = names.get("use", default)(ours)
    assert theirs.isfinite() and theirs.abs() > 1e-3
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    gradients = (torch.autograd.grad(loss, names["s"])[0] for loss in (ours, theirs))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-7)


# Toolkits that bring no loss of their own here, but call ours.


class Student(nn.Module):
    """A student with its teacher, whose loss is DIST beside the cross-entropy."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.teacher = nn.Linear(5, 9), nn.Linear(5, 9).requires_grad_(False)
        self.distillation = kdkernels.DISTLoss(tau=T)

    def forward(self, inputs: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.layer(inputs)
        with torch.no_grad():
            taught = self.teacher(inputs)
        task = F.cross_entropy(logits, labels)
        return {"loss": task + 2.0 * self.distillation(logits, taught), "logits": logits}


INPUTS = torch.linspace(-1, 1, 40).view(8, 5).sin()
LABELS = torch.arange(8) % 9


def _expected() -> Tensor:
    """The weight after one step of plain gradient descent, by the reference."""
    model = Student()
    model.distillation.backend = "reference"
    model(INPUTS, LABELS)["loss"].backward()
    assert model.layer.weight.grad is not None
    return model.layer.weight.detach() - 0.5 * model.layer.weight.grad


def test_a_step_under_lightning(tmp_path: Path) -> None:
    lightning = peer("lightning")

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.student = Student()

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            return self.student(*batch)["loss"]

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.student.layer.parameters(), lr=0.5)

    data = torch.utils.data.TensorDataset(INPUTS, LABELS)
    trainer = lightning.Trainer(
        max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    module = Module()
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=8))
    torch.testing.assert_close(module.student.layer.weight.detach(), _expected())


def test_a_step_under_accelerate() -> None:
    accelerator = peer("accelerate").Accelerator(cpu=True)
    model = Student()
    optimizer = torch.optim.SGD(model.layer.parameters(), lr=0.5)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    accelerator.backward(prepared(INPUTS, LABELS)["loss"])
    optimizer.step()
    torch.testing.assert_close(model.layer.weight.detach(), _expected())


def test_a_step_under_the_trainer_of_transformers(tmp_path: Path) -> None:
    peer("accelerate")
    transformers = peer("transformers")
    model = Student()
    rows = [{"inputs": x, "labels": y} for x, y in zip(INPUTS, LABELS, strict=True)]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=8, learning_rate=0.5,
        lr_scheduler_type="constant", max_grad_norm=0.0, use_cpu=True, report_to=[],
        save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False, optim="sgd",
    )  # fmt: skip
    transformers.Trainer(model=model, args=arguments, train_dataset=rows).train()
    torch.testing.assert_close(model.layer.weight.detach(), _expected())

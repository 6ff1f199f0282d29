"""``examples/hf_trainer.py`` in transformers' own Trainer; ``make peers`` installs that."""

from __future__ import annotations

import importlib
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

if find_spec("transformers") is None or find_spec("accelerate") is None:
    pytest.skip("transformers is not installed (make peers)", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
hf_trainer = importlib.import_module("hf_trainer")
transformers = importlib.import_module("transformers")


def batch(rows: int = 8) -> list[dict[str, torch.Tensor]]:
    """Sequences of which each ignores another number of labels."""
    ids = torch.randint(256, (rows, 12), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    for row in range(rows):
        labels[row, : row + 1] = -100
    return [{"input_ids": x, "labels": y} for x, y in zip(ids, labels, strict=True)]


def trainer(folder: Path, model: Any, **arguments: Any) -> Any:
    options = {"divergence": "reverse_kl", "temperature": 2.0, "hard_weight": 0.5}
    return hf_trainer.DistillationTrainer(
        model=model,
        args=transformers.TrainingArguments(
            output_dir=str(folder), report_to="none", save_strategy="no", use_cpu=True, seed=0,
            max_steps=1, optim="sgd", learning_rate=1.0, lr_scheduler_type="constant",
            max_grad_norm=0.0, disable_tqdm=True, **arguments,
        ),
        train_dataset=batch(),
        teacher=hf_trainer.language_model(16, 1, seed=3),
        loss_options=options,
    )  # fmt: skip


def test_the_loss_is_that_of_all_logits(tmp_path: Path) -> None:
    model = hf_trainer.language_model(16, 1, seed=1)
    own = trainer(tmp_path, model)
    inputs = {name: torch.stack([x[name] for x in batch()]) for name in ("input_ids", "labels")}
    labels = inputs["labels"][:, 1:]
    loss = own.compute_loss(model, dict(inputs), num_items_in_batch=torch.tensor(50))
    log_q, log_p = (
        (net(input_ids=inputs["input_ids"]).logits[:, :-1] / 2).log_softmax(-1)
        for net in (model, own.teacher)
    )
    rows = F.kl_div(log_p.detach(), log_q, reduction="none", log_target=True).sum(-1)
    total = rows[labels != -100].sum()
    logits = model(input_ids=inputs["input_ids"]).logits[:, :-1]
    total = total + 0.5 * F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    torch.testing.assert_close(loss, total / 50)
    weights = list(model.parameters())
    made = torch.autograd.grad(loss, weights)
    for one, other in zip(made, torch.autograd.grad(total / 50, weights), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_a_batch_in_parts_is_the_whole_batch(tmp_path: Path) -> None:
    """``num_items_in_batch``: parts with other numbers of labels, one step of the optimizer."""
    after = []
    for parts in (1, 4):
        model = hf_trainer.language_model(16, 1, seed=1)
        before = [p.detach().clone() for p in model.parameters()]
        trainer(
            tmp_path, model, per_device_train_batch_size=8 // parts,
            gradient_accumulation_steps=parts,
        ).train()  # fmt: skip
        after.append([p.detach() - x for p, x in zip(model.parameters(), before, strict=True)])
    for whole, accumulated in zip(*after, strict=True):
        assert whole.any()
        torch.testing.assert_close(accumulated, whole, rtol=1e-4, atol=1e-6)


def test_it_runs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["hf_trainer.py", "--steps", "2"])
    hf_trainer.main()
    lines = capsys.readouterr().out.splitlines()
    names = [line[:20].strip() for line in lines if "nats a byte" in line]
    assert names == ["teacher", "student", "distilled student"]

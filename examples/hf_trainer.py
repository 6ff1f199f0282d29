#!/usr/bin/env python
"""Distillation in a ``transformers.Trainer``, without the logits of student or teacher.

    pip install -e '.[hf]'
    python examples/hf_trainer.py                 # tiny models on Python's own help, two minutes

``DistillationTrainer`` is what to copy: it needs nothing else of this file. Teacher and student
share a tokenizer; the loss sees hidden states and the two output layers.
"""

from __future__ import annotations

import argparse
import math
import pydoc_data.topics
import tempfile
from typing import Any

import torch
import transformers
from torch import Tensor

from kdkernels import linear_kd_loss
from kdkernels.teacher import LinearTeacher


class DistillationTrainer(transformers.Trainer):
    """``hard_weight * cross-entropy + loss_weight * divergence`` of the tokens that have a label.

    The denominator is the Trainer's ``num_items_in_batch``, the labels of all accumulated batches,
    so that a batch in parts has the gradient of the whole batch.
    """

    def __init__(self, *args: Any, teacher: Any, loss_options: dict[str, Any], **options: Any):
        super().__init__(*args, **options)
        self.teacher = teacher.to(self.args.device).eval().requires_grad_(False)
        self.loss_options = loss_options

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        labels = inputs.pop("labels")
        # One position's logits instead of all: the head is applied below.
        how = {"output_hidden_states": True, "logits_to_keep": 1, "use_cache": False}
        outputs = model(**inputs, **how)
        with torch.no_grad():
            of_teacher = self.teacher(**inputs, **how)
        head, teacher_head = self._head(model), self._head(self.teacher)
        loss = linear_kd_loss(
            outputs.hidden_states[-1][:, :-1],
            head.weight,
            LinearTeacher(
                of_teacher.hidden_states[-1][:, :-1], teacher_head.weight, teacher_head.bias
            ),
            labels[:, 1:],
            student_bias=head.bias,
            num_items_in_batch=num_items_in_batch,
            **self.loss_options,
        )
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # over which gradients are averaged
        return (loss, outputs) if return_outputs else loss

    def _head(self, model: Any) -> torch.nn.Linear:
        return self.accelerator.unwrap_model(model).get_output_embeddings()


def language_model(width: int, layers: int, seed: int) -> Any:
    """A tiny Llama over bytes."""
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=256,
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=128,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def sequences(length: int = 128) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """Python's help in pieces, for training and validation: whole topics, no sentence in both."""
    topics = sorted(pydoc_data.topics.topics.items())
    pieces: tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]] = ([], [])
    for number, (_, text) in enumerate(topics):
        ids = torch.tensor(list(text.encode("utf-8")))
        for piece in ids.split(length)[:-1]:
            pieces[number % 8 == 0].append({"input_ids": piece, "labels": piece})
    return pieces


def train(model: Any, steps: int, folder: str, **distillation: Any) -> float:
    """Train on the same batches whatever the loss; the validation cross-entropy in nats a byte."""
    training, validation = sequences()
    arguments = transformers.TrainingArguments(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        warmup_steps=20,
        logging_steps=max(steps // 5, 1),
        save_strategy="no",
        report_to="none",
        seed=0,
        use_cpu=not torch.cuda.is_available(),
    )
    kind = DistillationTrainer if distillation else transformers.Trainer
    trainer = kind(model=model, args=arguments, train_dataset=training, **distillation)
    trainer.train()
    judge = transformers.Trainer(model=model, args=arguments, eval_dataset=validation[:128])
    return judge.evaluate()["eval_loss"]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=150, help="of the students")
    parser.add_argument("--divergence", default="kl")
    options = parser.parse_args()
    how = {"divergence": options.divergence, "hard_weight": 0.5, "loss_weight": 0.5}
    with tempfile.TemporaryDirectory() as folder:
        teacher = language_model(128, 3, seed=0)
        found = {"teacher": train(teacher, 2 * options.steps, folder)}
        found["student"] = train(language_model(48, 2, seed=1), options.steps, folder)
        found["distilled student"] = train(
            language_model(48, 2, seed=1), options.steps, folder, teacher=teacher, loss_options=how
        )
    for name, loss in found.items():
        print(f"{name:<20}{loss:.3f} nats a byte ({loss / math.log(2):.3f} bits)")


if __name__ == "__main__":
    main()

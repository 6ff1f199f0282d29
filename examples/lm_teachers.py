"""How a teacher reaches the student: as logits, as hidden states and a head, or from a cache."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lm_data import windows
from lm_models import Decoder
from torch import Tensor
from tqdm import tqdm

from kdkernels.teacher import (
    CacheWriter,
    LinearTeacher,
    TeacherCache,
    TopKTeacher,
    collate,
    open_cache,
    top_k,
)

FORMS = ("dense", "topk", "head")
AT_ONCE = 32
"""Windows of a teacher's forward pass."""

Given = Tensor | LinearTeacher | TopKTeacher


@dataclass(frozen=True)
class Teacher:
    """A trained network and the form in which a student is given it."""

    model: Decoder
    form: str
    cache: TeacherCache | None = None
    """Of the student's windows, for ``topk``: then the network itself is not run."""

    def __call__(self, inputs: Tensor, rows: Tensor) -> Given:
        """What is known of a batch: windows ``rows`` of the student's text, whose tokens are
        ``inputs``."""
        if self.cache is not None:
            batch = collate([self.cache[row] for row in rows.tolist()])
            return batch.teacher.to(inputs.device)
        with torch.no_grad():
            hidden = self.model.hidden(inputs)
            head = LinearTeacher(hidden, self.model.tokens.weight.detach())
            return head if self.form == "head" else head.logits()

    @property
    def fixed(self) -> bool:
        """Whether every epoch must take the same windows, which the cache holds."""
        return self.cache is not None


def cached(
    model: Decoder, stream: Tensor, context: int, k: int, temperature: float, folder: Path, of: str
) -> TeacherCache:
    """The teacher's K likeliest tokens at every place of a text, written once and then reused.

    ``of`` says which teacher and text these are; a cache of another one is written anew, and one
    whose writing was interrupted too.
    """
    vocabulary = model.tokens.num_embeddings
    try:
        return open_cache(folder, vocab_size=vocabulary, k=k, temperature=temperature, model=of)
    except ValueError:
        shutil.rmtree(folder, ignore_errors=True)
    inputs, _ = windows(stream, context)
    model.eval()
    bar = tqdm(total=len(inputs), desc="cache", unit="window", disable=None, leave=False)
    how: dict[str, Any] = {
        "vocab_size": vocabulary,
        "k": k,
        "temperature": temperature,
        "model": of,
    }
    with bar, torch.no_grad(), CacheWriter(folder, **how) as writer:
        for part in inputs.split(AT_ONCE):
            known = top_k(model(part), k, temperature).to("cpu")
            for tokens, row in zip(part.cpu(), range(len(part)), strict=True):
                writer.append(tokens, known[row])
            bar.update(len(part))
    return open_cache(folder)

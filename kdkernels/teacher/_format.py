"""The cache's format: a folder of safetensors shards and an ``index.json`` that names them.

A shard holds whole sequences, one after another, M tokens in all:

    topk_ids       int32    (M, K)   absent entries are 0
    topk_logprobs  float16  (M, K)   or float32; -inf marks absent entries
    log_rest       float32  (M,)     left out where the teacher gave none
    input_ids      int32    (M,)
    offsets        int64    (S + 1,) where each of the S sequences starts, and M

A shard's metadata are the facts below, as text, and the SHA-256 of its tensors. The index repeats
the facts beside each shard's name, size and hash, and is written last: a folder without one is a
cache that nobody finished.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from .. import _remedies

NAME = "kdkernels-teacher-cache"
VERSION = "1"
INDEX = "index.json"
FIELDS = ("topk_ids", "topk_logprobs", "log_rest", "input_ids", "offsets")
"""In the order in which they are hashed."""
LOGPROBS = {"float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Facts:
    """What all shards of a cache have in common."""

    vocab_size: int
    k: int
    temperature: float
    logprob_dtype: str
    log_rest: bool
    tokenizer: str
    model: str

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """The tensors of a shard."""
        rest = {"log_rest": torch.float32} if self.log_rest else {}
        return {
            "topk_ids": torch.int32,
            "topk_logprobs": LOGPROBS[self.logprob_dtype],
            **rest,
            "input_ids": torch.int32,
            "offsets": torch.int64,
        }

    def text(self) -> dict[str, str]:
        """As a shard's metadata, which are strings."""
        return {name: str(value) for name, value in asdict(self).items()}

    @staticmethod
    def of(index: Mapping[str, Any]) -> Facts:
        """From an index; KeyError, TypeError or ValueError where it holds none."""
        facts = Facts(**{field.name: index[field.name] for field in fields(Facts)})
        numbers = isinstance(facts.vocab_size, int) and isinstance(facts.k, int)
        if not numbers or facts.logprob_dtype not in LOGPROBS or facts.k < 1:
            raise ValueError("facts of the wrong type")
        return facts


def library() -> Any:
    """The module ``safetensors.torch``, with ``safe_open``."""
    try:
        importlib.import_module("numpy")  # safetensors takes tensors through it
        return importlib.import_module("safetensors.torch")
    except ModuleNotFoundError as error:
        package = (error.name or "safetensors").partition(".")[0]
        raise ModuleNotFoundError(
            f"caches of teachers need {package}, which is not installed; install it, or the extra"
            f" kdkernels[cache]: {_remedies.pip_install('numpy', 'safetensors')}",
            name=package,
        ) from None


def content_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of a shard's tensors: names, shapes and bytes."""
    digest = hashlib.sha256()
    for name in FIELDS:
        if name in tensors:
            add(digest, name, tensors[name])
    return digest.hexdigest()


def add(digest: Any, name: str, tensor: Tensor) -> None:
    """Add a contiguous CPU tensor to a digest."""
    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
    if tensor.numel():
        size = tensor.numel() * tensor.element_size()
        digest.update((ctypes.c_char * size).from_address(tensor.data_ptr()))


def cache_hash(facts: Facts, shards: Iterable[Mapping[str, Any]]) -> str:
    """SHA-256 of the facts and of the hashes of all shards: it stands for the whole content."""
    digest = hashlib.sha256(repr(sorted(facts.text().items())).encode())
    for shard in shards:
        digest.update(str(shard["hash"]).encode())
    return digest.hexdigest()

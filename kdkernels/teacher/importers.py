"""Sparse teachers from what servers answer: TRL's dictionaries, vLLM's prompt log-probabilities.

Neither package is imported: their answers are dictionaries and lists. None of them says how much
probability is outside the K, so ``log_rest`` is None.
"""

from __future__ import annotations

import base64
import math
from array import array
from collections.abc import Iterable, Mapping, Sequence, Sized
from typing import Any, Literal

import torch
from torch import Tensor

from .. import _checks
from .sparse import TopKTeacher

TRL_FORMS = (
    "a dict with logprobs and logprob_token_ids, topk_logprobs and topk_token_ids, or logprobs_b64,"
    " token_ids_b64, shape and completion_lengths"
)


def from_trl(response: Mapping[str, Any]) -> TopKTeacher:
    """The teacher of a batch of completions, from TRL's servers and trainers.

    Three forms are known, by their keys:

    - ``logprobs``, ``logprob_token_ids``: lists (B, T_b, K) of ``VLLMClient.get_sequence_logprobs``
      and ``generate``; null and -inf are absent entries.
    - ``topk_logprobs``, ``topk_token_ids``: (B, T, K) tensors of its distillation trainers.
    - ``logprobs_b64``, ``token_ids_b64``, ``shape``, ``completion_lengths``: the server's binary
      answer, float32 and int32.

    Completions are padded on the right with absent rows; rows narrower than the widest likewise.
    ``actual_logprobs`` are not read: where they are wanted, they are among the K or -inf.

    Returns:
        :class:`TopKTeacher` of rows (B, T), on the CPU for lists: ids int64 (tensors: as given),
        logprobs float32 (tensors: as given), log_rest None. Row t of completion b is the
        distribution of its t-th token: aligned with ``student_logits[b, prompt_length - 1 + t]``.

    Raises:
        TypeError, ValueError: ``name must be <expected>, got <got>``.
    """
    if not isinstance(response, Mapping):
        raise _checks.fail_type("response", TRL_FORMS, type(response).__name__)
    if {"topk_logprobs", "topk_token_ids"} <= response.keys():
        return TopKTeacher(response["topk_token_ids"], response["topk_logprobs"])
    if response.get("logprobs_b64") is not None:
        return _binary(response)
    if response.get("logprobs") is None or response.get("logprob_token_ids") is None:
        raise _checks.fail("response", TRL_FORMS, f"one with {sorted(map(str, response))}")
    values, ids = response["logprobs"], response["logprob_token_ids"]
    _same_length("logprob_token_ids", ids, values, "logprobs")
    batch = []
    for b, (rows, numbers) in enumerate(zip(values, ids, strict=True)):
        _same_length(f"logprob_token_ids[{b}]", numbers, rows, f"logprobs[{b}]")
        completion = []
        for t, (row, entries) in enumerate(zip(rows, numbers, strict=True)):
            place = f"[{b}][{t}]"
            _same_length(f"logprob_token_ids{place}", entries, row, f"logprobs{place}")
            completion.append(
                [
                    (_id(f"logprob_token_ids{place}", i), _logprob(f"logprobs{place}", x))
                    for i, x in zip(entries, row, strict=True)
                ]
            )
        batch.append(completion)
    longest = max((len(completion) for completion in batch), default=0)
    width = max((len(row) for completion in batch for row in completion), default=0)
    if not width:
        raise _checks.fail("response", "of at least one completion with entries", "none")
    rows = [row for x in batch for row in (*x, *([[]] * (longest - len(x))))]
    teacher = _padded(rows, width)
    shape = (len(batch), longest, width)
    return TopKTeacher(teacher.ids.view(shape), teacher.logprobs.view(shape))


def from_vllm(
    prompt_logprobs: Sequence[Mapping[Any, Any] | None],
    k: int | None = None,
) -> TopKTeacher:
    """The teacher of one prompt, from vLLM's ``prompt_logprobs`` (``RequestOutput``, or JSON).

    vLLM gives, for each token of the prompt, a dictionary from token ids to log-probabilities: the
    K most likely ids, and the prompt's own token, which is a (K + 1)-th entry where it is not one
    of them. The first token has none. Ids may be numbers or text (``"17"``, ``"token_id:17"``);
    values may be objects with ``.logprob``, dictionaries with ``"logprob"``, or numbers. None and
    -inf are absent entries. By default vLLM leaves the request's temperature out of them: they are
    those of temperature 1.

    Args:
        prompt_logprobs: one entry for each of the prompt's S tokens, the first None or empty.
        k: entries to keep a row, the most likely ones, >= 1; None: all, the prompt's token too.
            Every subset of the ids is a sparse teacher as good as another.

    Returns:
        :class:`TopKTeacher` of S rows, on the CPU: ids int64, the most likely first; logprobs
        float32; K the widest row's (``k`` where given), narrower rows end in absent entries;
        log_rest None. Row i is the distribution of token i + 1: aligned with the student's
        logits of position i. The last row has no entry, because no token follows.

    Raises:
        TypeError, ValueError: ``name must be <expected>, got <got>``.
    """
    name = "prompt_logprobs"
    if not isinstance(prompt_logprobs, Iterable) or isinstance(prompt_logprobs, (str, Mapping)):
        got = type(prompt_logprobs).__name__
        raise _checks.fail_type(name, "a list of dictionaries, the first None", got)
    entries = list(prompt_logprobs)
    if k is not None:
        k = _checks.at_least_one("k", k)
    if not entries:
        raise _checks.fail(name, "of at least one token", "an empty list")
    if entries[0]:
        got = "entries of it (sampled tokens' log-probabilities?)"
        raise _checks.fail(f"{name}[0]", "None, because nothing predicts the first token", got)
    rows = [_position(f"{name}[{i}]", entry)[:k] for i, entry in enumerate(entries) if i]
    width = k or max(map(len, rows), default=0)
    if not width:
        raise _checks.fail(name, "of at least two tokens where k is None", f"{len(entries)}")
    return _padded([*rows, []], width)


def _position(name: str, entry: Any) -> list[tuple[int, float]]:
    """The entries of one token, the most likely first."""
    if not isinstance(entry, Mapping) or not entry:
        got = "an empty one" if isinstance(entry, Mapping) else type(entry).__name__
        raise _checks.fail_type(name, "a dictionary of token ids", got)
    row = [(_id(name, key), _logprob(f"{name}[{key!r}]", value)) for key, value in entry.items()]
    if len({number for number, _ in row}) < len(row):
        raise _checks.fail(name, "a dictionary with every id once", sorted(map(str, entry)))
    return sorted(row, key=lambda item: (-item[1], item[0]))


def _id(name: str, value: Any) -> int:
    if isinstance(value, str):
        text = value.removeprefix("token_id:")  # vLLM's return_tokens_as_token_ids
        if text.isdecimal():
            return int(text)
    elif not isinstance(value, bool) and hasattr(value, "__index__"):
        if 0 <= int(value) < 2**63:
            return int(value)
        raise _checks.fail(name, "of token ids >= 0", int(value))
    raise _checks.fail_type(name, "of token ids >= 0", repr(value))


def _logprob(name: str, value: Any) -> float:
    """A log-probability; None is an absent entry, as in TRL's JSON, which has no -inf."""
    if isinstance(value, Mapping):
        value = value.get("logprob", "a dictionary without 'logprob'")
    value = getattr(value, "logprob", value)
    if value is None:
        return -math.inf
    if isinstance(value, (str, bool)) or not hasattr(value, "__float__"):
        raise _checks.fail_type(name, "a log-probability", repr(value))
    number = float(value)
    if not number <= 1e-3:  # NaN too
        raise _checks.fail(name, "a log-probability, at most 0", number)
    return number


def _listed(name: str, value: Any, expected: str = "a list") -> Any:
    if not isinstance(value, Sized) or isinstance(value, (str, Mapping)):
        raise _checks.fail_type(name, expected, type(value).__name__)
    return value


def _same_length(name: str, value: Any, other: Any, other_name: str) -> None:
    for label, x in ((name, value), (other_name, other)):
        _listed(label, x)
    if len(value) != len(other):
        raise _checks.fail(name, f"as long as {other_name}, {len(other)}", len(value))


def _padded(rows: list[list[tuple[int, float]]], width: int) -> TopKTeacher:
    absent = [(0, -math.inf)] * width
    padded = [entry for row in rows for entry in (*row, *absent[len(row) :])]
    ids = torch.tensor([number for number, _ in padded], dtype=torch.int64)
    logprobs = torch.tensor([x for _, x in padded], dtype=torch.float32)
    return TopKTeacher(ids.view(-1, width), logprobs.view(-1, width))


def _binary(response: Mapping[str, Any]) -> TopKTeacher:
    """TRL's ``response_format="binary"``: padded float32 and int32 arrays as base64 text."""
    missing = {"token_ids_b64", "shape", "completion_lengths"} - response.keys()
    if missing:
        raise _checks.fail("response", TRL_FORMS, f"one without {sorted(missing)}")
    sizes = _listed("shape", response["shape"], "a list of three sizes")
    shape = tuple(_checks.integer("shape", size) for size in sizes)
    if len(shape) != 3 or min(shape) < 1:
        raise _checks.fail("shape", "(B, T, K), each >= 1", shape)
    counts = _listed("completion_lengths", response["completion_lengths"])
    lengths = torch.tensor([_checks.integer("completion_lengths", count) for count in counts])
    if lengths.shape != shape[:1] or (lengths > shape[1]).any() or (lengths < 0).any():
        expected = f"{shape[0]} numbers in [0, {shape[1]}]"
        raise _checks.fail("completion_lengths", expected, lengths.tolist())
    logprobs = _decoded("logprobs_b64", response["logprobs_b64"], "f", torch.float32, shape)
    ids = _decoded("token_ids_b64", response["token_ids_b64"], "i", torch.int32, shape)
    padding = torch.arange(shape[1]) >= lengths[:, None]
    logprobs.masked_fill_(padding[..., None], -torch.inf)
    ids.masked_fill_(padding[..., None], 0)
    if logprobs.isnan().any():
        raise _checks.fail("logprobs_b64", "log-probabilities", "a NaN")
    return TopKTeacher(ids.long(), logprobs)


def _decoded(
    name: str, text: Any, code: Literal["f", "i"], dtype: torch.dtype, shape: tuple[int, ...]
) -> Tensor:
    if not isinstance(text, (str, bytes)):
        raise _checks.fail_type(name, "base64 text", type(text).__name__)
    try:
        raw = base64.b64decode(text, validate=True)
    except ValueError as error:
        raise _checks.fail(name, "base64 text", f"other text ({error})") from None
    size = 4 * math.prod(shape)
    if len(raw) != size:
        raise _checks.fail(name, f"of {size} bytes, those of shape {shape}", len(raw))
    return torch.frombuffer(array(code, raw), dtype=dtype).clone().view(shape)

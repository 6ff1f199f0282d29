"""Teachers from servers' answers, in the forms that TRL and vLLM give them."""

from __future__ import annotations

import base64
import json
import math
import re
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st

from kdkernels.teacher import CachedSequence, collate, from_trl, from_vllm

INF, NAN = float("inf"), float("nan")


@dataclass
class Logprob:
    """As ``vllm.logprobs.Logprob``."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


PROMPT = [
    None,
    # The prompt's token comes first; it is the second most likely of K = 2.
    {7: Logprob(-1.5, 2, "b"), 3: Logprob(-0.5, 1, "a")},
    # The prompt's token is none of the two: a third entry.
    {9: Logprob(-6.0, 41, "z"), 3: Logprob(-0.25, 1, "a"), 1: Logprob(-2.5, 2, "c")},
    {4: Logprob(-0.1, 1, "d"), 0: Logprob(-INF, 2, "e")},
]
IDS = [[3, 7, 0], [3, 1, 9], [4, 0, 0], [0, 0, 0]]
VALUES = [[-0.5, -1.5, -INF], [-0.25, -2.5, -6.0], [-0.1, -INF, -INF], [-INF] * 3]

FORMS: dict[str, Callable[[int, Logprob], tuple[Any, Any]]] = {
    "objects": lambda i, x: (i, x),
    "floats": lambda i, x: (i, x.logprob),
    "tensors": lambda i, x: (i, torch.tensor(x.logprob)),
    "json": lambda i, x: (
        str(i),
        {"logprob": x.logprob, "rank": x.rank, "decoded_token": x.decoded_token},
    ),
    "token_ids": lambda i, x: (f"token_id:{i}", x.logprob),
}


def prompt(form: str) -> list[Any]:
    return [entry and dict(FORMS[form](i, x) for i, x in entry.items()) for entry in PROMPT]


@pytest.mark.parametrize("form", FORMS)
def test_vllm(form: str) -> None:
    """Row i is the distribution of token i + 1; the last has none."""
    teacher = from_vllm(prompt(form))
    assert teacher.ids.tolist() == IDS
    torch.testing.assert_close(teacher.logprobs, torch.tensor(VALUES))
    assert teacher.log_rest is None
    teacher.check(10)


def test_vllm_through_json() -> None:
    text = json.dumps(prompt("json")).replace("-Infinity", "null")
    assert torch.equal(from_vllm(json.loads(text)).logprobs, torch.tensor(VALUES))


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_vllm_keeps_the_most_likely(k: int) -> None:
    teacher = from_vllm(prompt("floats"), k)
    assert teacher.k == k and teacher.shape == (4,)
    width = min(k, 3)
    assert torch.equal(teacher.logprobs[:, :width], torch.tensor(VALUES)[:, :width])
    assert (teacher.logprobs[:, width:] == -INF).all()


def test_vllm_first_entry_may_be_empty() -> None:
    """As vLLM's FlatLogprobs gives it, which is a sequence too."""
    entries = [{}, *prompt("objects")[1:]]
    assert torch.equal(from_vllm(tuple(entries)).logprobs, torch.tensor(VALUES))


def test_vllm_lines_up_with_a_batchs_labels() -> None:
    """Every label is among its row's ids, because vLLM appends the prompt's own token."""
    tokens = torch.tensor([5, 7, 9, 4])
    batch = collate([CachedSequence(tokens, from_vllm(prompt("objects")))])
    assert batch.labels.tolist() == [[7, 9, 4, -100]]
    for label, ids in zip(
        batch.labels[0, :3].tolist(), batch.teacher.ids[0].tolist(), strict=False
    ):
        assert label in ids


@given(
    st.lists(
        st.dictionaries(st.integers(0, 10**6), st.floats(-60, 0, width=32), min_size=1, max_size=6),
        min_size=1,
        max_size=5,
    )
)
def test_vllm_keeps_every_entry(rows: list[dict[int, float]]) -> None:
    teacher = from_vllm([None, *rows])
    for row, ids, values in zip(rows, teacher.ids, teacher.logprobs, strict=False):
        kept = {i: x for i, x in zip(ids.tolist(), values.tolist(), strict=True) if x > -INF}
        assert kept == row
        assert values.tolist() == sorted(values.tolist(), reverse=True)


BAD_VLLM: dict[str, tuple[Any, type[Exception], str]] = {
    "none": (
        None,
        TypeError,
        "prompt_logprobs must be a list of dictionaries, the first None, got NoneType",
    ),
    "dict": (
        {},
        TypeError,
        "prompt_logprobs must be a list of dictionaries, the first None, got dict",
    ),
    "empty": ([], ValueError, "prompt_logprobs must be of at least one token, got an empty list"),
    "one": (
        [None],
        ValueError,
        "prompt_logprobs must be of at least two tokens where k is None, got 1",
    ),
    "samples": (
        [{1: -1.0}],
        ValueError,
        "prompt_logprobs[0] must be None, because nothing predicts the first token,"
        " got entries of it (sampled tokens' log-probabilities?)",
    ),
    "gap": (
        [None, {1: -1.0}, None],
        TypeError,
        "prompt_logprobs[2] must be a dictionary of token ids, got NoneType",
    ),
    "no_entry": (
        [None, {}],
        TypeError,
        "prompt_logprobs[1] must be a dictionary of token ids, got an empty one",
    ),
    "text": (
        [None, {"the": -1.0}],
        TypeError,
        "prompt_logprobs[1] must be of token ids >= 0, got 'the'",
    ),
    "negative": (
        [None, {-1: -1.0}],
        ValueError,
        "prompt_logprobs[1] must be of token ids >= 0, got -1",
    ),
    "twice": (
        [None, {1: -1.0, "1": -2.0}],
        ValueError,
        "prompt_logprobs[1] must be a dictionary with every id once, got ['1', '1']",
    ),
    "nan": (
        [None, {1: NAN}],
        ValueError,
        "prompt_logprobs[1][1] must be a log-probability, at most 0, got nan",
    ),
    "probability": (
        [None, {1: Logprob(0.5)}],
        ValueError,
        "prompt_logprobs[1][1] must be a log-probability, at most 0, got 0.5",
    ),
    "other_dict": (
        [None, {"1": {"rank": 1}}],
        TypeError,
        "prompt_logprobs[1]['1'] must be a log-probability, got \"a dictionary without 'logprob'\"",
    ),
}


@pytest.mark.parametrize(("value", "kind", "text"), BAD_VLLM.values(), ids=BAD_VLLM)
def test_bad_vllm(value: Any, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=re.escape(text) + "$"):
        from_vllm(value)


def test_bad_k() -> None:
    with pytest.raises(ValueError, match=r"k must be >= 1, got 0$"):
        from_vllm(prompt("floats"), 0)
    assert from_vllm([None], 3).shape == (1,)


# TRL.


RESPONSE = {
    # Two completions, of 1 and 3 tokens, K = 2; the server writes NaN and -inf as null.
    "logprobs": [[[-0.5, -1.5]], [[-0.1, -3.0], [-0.7, None], [-0.2, -INF]]],
    "logprob_token_ids": [[[90, 4]], [[90, 1], [17, 0], [100, 3]]],
    "actual_logprobs": [[[-0.5]], [[-0.1], [-0.7], [-0.2]]],
    "actual_token_ids": [[[90]], [[90], [17], [100]]],
}
ABSENT = [-INF, -INF]
TRL_VALUES = [[[-0.5, -1.5], ABSENT, ABSENT], [[-0.1, -3.0], [-0.7, -INF], [-0.2, -INF]]]
TRL_IDS = [[[90, 4], [0, 0], [0, 0]], [[90, 1], [17, 0], [100, 3]]]


def binary(**changes: Any) -> dict[str, Any]:
    # What padding holds is nobody's business.
    values = array("f", [-0.5, -1.5, NAN, 0.0, -INF, 0.0, -0.1, -3.0, -0.7, -INF, -0.2, -INF])
    ids = array("i", [90, 4, 5, 5, 5, 5, 90, 1, 17, 0, 100, 3])
    answer = {
        "logprobs_b64": base64.b64encode(values.tobytes()).decode(),
        "token_ids_b64": base64.b64encode(ids.tobytes()).decode(),
        "shape": [2, 3, 2],
        "completion_lengths": [1, 3],
        "logprobs": None,
        "logprob_token_ids": None,
    }
    return {**answer, **changes}


TRL_FORMS: dict[str, Any] = {
    "lists": RESPONSE,
    "json": json.loads(json.dumps(RESPONSE).replace("-Infinity", "null")),
    "padded": {
        "topk_logprobs": torch.tensor(TRL_VALUES),
        "topk_token_ids": torch.tensor(TRL_IDS),
        "actual_logprobs": torch.zeros(2, 3),
    },
    "binary": binary(),
}


@pytest.mark.parametrize("response", TRL_FORMS.values(), ids=TRL_FORMS)
def test_trl(response: dict[str, Any]) -> None:
    teacher = from_trl(response)
    assert teacher.shape == (2, 3) and teacher.k == 2 and teacher.log_rest is None
    torch.testing.assert_close(teacher.logprobs, torch.tensor(TRL_VALUES))
    assert teacher.ids.tolist() == TRL_IDS and teacher.ids.dtype == torch.int64
    teacher.check(101)


def test_trl_rows_of_several_widths() -> None:
    teacher = from_trl({"logprobs": [[[-1.0], [-1.0, -2.0]]], "logprob_token_ids": [[[1], [2, 3]]]})
    assert teacher.ids.tolist() == [[[1, 0], [2, 3]]]
    assert teacher.logprobs[0, 0, 1] == -INF


BAD_TRL: dict[str, tuple[Any, type[Exception], str]] = {
    "list": ([], TypeError, "response must be a dict with .*, got list"),
    "keys": ({"a": 1}, ValueError, r"response must be a dict with .*, got one with \['a'\]"),
    "half": (
        {"logprobs": [[[-1.0]]]},
        ValueError,
        r"response must be a dict with .*, got one with \['logprobs'\]",
    ),
    "batch": (
        {"logprobs": [[[-1.0]]], "logprob_token_ids": []},
        ValueError,
        "logprob_token_ids must be as long as logprobs, 1, got 0",
    ),
    "tokens": (
        {"logprobs": [[[-1.0]]], "logprob_token_ids": [[[1], [2]]]},
        ValueError,
        r"logprob_token_ids\[0\] must be as long as logprobs\[0\], 1, got 2",
    ),
    "entries": (
        {"logprobs": [[[-1.0]]], "logprob_token_ids": [[[1, 2]]]},
        ValueError,
        r"logprob_token_ids\[0\]\[0\] must be as long as logprobs\[0\]\[0\], 1, got 2",
    ),
    "no_entries": (
        {"logprobs": [[-1.0]], "logprob_token_ids": [[1]]},
        TypeError,
        r"logprob_token_ids\[0\]\[0\] must be a list, got int",
    ),
    "nothing": (
        {"logprobs": [[]], "logprob_token_ids": [[]]},
        ValueError,
        "response must be of at least one completion with entries, got none",
    ),
    "nan": (
        {"logprobs": [[[NAN]]], "logprob_token_ids": [[[1]]]},
        ValueError,
        r"logprobs\[0\]\[0\] must be a log-probability, at most 0, got nan",
    ),
    "tensor": (
        {"topk_logprobs": torch.zeros(2, 3), "topk_token_ids": torch.zeros(2, 3)},
        TypeError,
        "ids must be of an integer dtype, got torch.float32",
    ),
    "no_shape": (
        {"logprobs_b64": ""},
        ValueError,
        r"got one without \['completion_lengths', 'shape', 'token_ids_b64'\]",
    ),
    "shape": (binary(shape=[2, 3]), ValueError, r"shape must be \(B, T, K\), each >= 1, got"),
    "no shape": (binary(shape=4), TypeError, "shape must be a list of three sizes, got int"),
    "no lengths": (
        binary(completion_lengths=2),
        TypeError,
        "completion_lengths must be a list, got int",
    ),
    "lengths": (
        binary(completion_lengths=[1, 4]),
        ValueError,
        r"completion_lengths must be 2 numbers in \[0, 3\], got \[1, 4\]",
    ),
    "size": (
        binary(shape=[2, 3, 3]),
        ValueError,
        r"logprobs_b64 must be of 72 bytes, those of shape \(2, 3, 3\), got 48",
    ),
    "text": (
        binary(token_ids_b64="?!"),
        ValueError,
        "token_ids_b64 must be base64 text, got other",
    ),
    "bytes": (binary(token_ids_b64=3), TypeError, "token_ids_b64 must be base64 text, got int"),
}


@pytest.mark.parametrize(("response", "kind", "text"), BAD_TRL.values(), ids=BAD_TRL)
def test_bad_trl(response: Any, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        from_trl(response)


def test_servers_log_probabilities_are_taken_as_they_are() -> None:
    """No renormalisation: the sum of the K stays below 1."""
    teacher = from_trl(RESPONSE)
    assert teacher.logprobs.exp().sum(-1).max().item() == pytest.approx(
        math.exp(-0.1) + math.exp(-3.0), rel=1e-6
    )

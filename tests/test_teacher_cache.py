"""Teachers on disk: what is written is read, in bounded memory, and bad files are named."""

from __future__ import annotations

import json
import pickle
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.utils.data import DataLoader

from kdkernels.teacher import (
    CachedSequence,
    CacheWriter,
    TopKTeacher,
    _format,
    collate,
    open_cache,
    reader,
    top_k,
)

safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")

VOCAB, K = 30, 4
LENGTHS = (5, 9, 3, 26, 7, 1, 8)
INF = float("inf")


def sequences(rest: bool = True, k: int = K) -> list[tuple[torch.Tensor, TopKTeacher]]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for length in LENGTHS:
        teacher = top_k(3 * torch.randn(length, VOCAB, generator=generator), k, 2.0)
        teacher = teacher if rest else TopKTeacher(teacher.ids, teacher.logprobs)
        made.append((torch.randint(VOCAB, (length,), generator=generator), teacher))
    return made


def write(path: Path, rest: bool = True, **options: Any) -> Path:
    usual = {"vocab_size": VOCAB, "k": K, "temperature": 2.0, "shard_tokens": 16}
    with CacheWriter(path, **{**usual, **options}) as writer:
        for input_ids, teacher in sequences(rest):
            writer.append(input_ids, teacher)
    return path


@pytest.mark.parametrize("rest", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("shard_tokens", [1, 16, 1000])
def test_what_is_written_is_read(
    tmp_path: Path, rest: bool, dtype: torch.dtype, shard_tokens: int
) -> None:
    cache = open_cache(write(tmp_path, rest, logprob_dtype=dtype, shard_tokens=shard_tokens))
    assert len(list(tmp_path.glob("*.safetensors"))) == {1: 7, 16: 4, 1000: 1}[shard_tokens]
    assert (len(cache), cache.tokens) == (len(LENGTHS), sum(LENGTHS))
    assert cache.lengths().tolist() == list(LENGTHS)
    assert (cache.vocab_size, cache.k, cache.temperature) == (VOCAB, K, 2.0)
    assert cache.logprob_dtype == dtype
    for (input_ids, written), (stored_ids, teacher) in zip(sequences(rest), cache, strict=True):
        assert stored_ids.dtype == teacher.ids.dtype == torch.int32
        assert torch.equal(stored_ids, input_ids.int())
        assert torch.equal(teacher.ids, written.ids.int())
        assert torch.equal(teacher.logprobs, written.logprobs.to(dtype))
        if rest:
            assert teacher.log_rest is not None and written.log_rest is not None
            assert torch.equal(teacher.log_rest, written.log_rest)
        else:
            assert teacher.log_rest is None
    cache.verify()


def test_absent_entries_and_narrow_rows(tmp_path: Path) -> None:
    """Ids of absent entries are 0, whatever they were, so that equal content has one hash."""
    ids = torch.tensor([[3, -7], [900, 900], [5, 6]])
    logprobs = torch.tensor([[-0.5, -INF], [-INF, -INF], [-1.0, -1e5]])  # beyond float16
    with CacheWriter(tmp_path, vocab_size=VOCAB, k=K) as writer:
        writer.append(torch.tensor([1, 2, 3], dtype=torch.uint8), TopKTeacher(ids, logprobs))
    input_ids, teacher = open_cache(tmp_path)[0]
    assert input_ids.tolist() == [1, 2, 3]
    assert teacher.ids.tolist() == [[3, 0, 0, 0], [0] * 4, [5, 0, 0, 0]]
    assert teacher.logprobs.tolist() == [[-0.5, *[-INF] * 3], [-INF] * 4, [-1.0, *[-INF] * 3]]


@settings(max_examples=25)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=12), st.integers(1, 20), st.integers(1, 6))
def test_sequences_of_any_lengths(lengths: list[int], shard_tokens: int, k: int) -> None:
    total = sum(lengths)
    teacher = top_k(torch.arange(total * 8.0).view(total, 8).sin(), k)
    input_ids = torch.arange(total)
    with tempfile.TemporaryDirectory() as folder:
        options = {"vocab_size": 8, "k": k, "shard_tokens": shard_tokens}
        with CacheWriter(folder, logprob_dtype=torch.float32, **options) as writer:
            start = 0
            for length in lengths:
                writer.append(input_ids[start : start + length], teacher[start : start + length])
                start += length
        cache = open_cache(folder, verify=True)
        assert cache.lengths().tolist() == lengths
        parts = list(cache)
        assert max(s["tokens"] for s in cache._shards) <= max(shard_tokens, *lengths)
        assert torch.equal(torch.cat([part.input_ids for part in parts]), input_ids.int())
        for name in ("ids", "logprobs", "log_rest"):
            stored = torch.cat([getattr(part.teacher, name) for part in parts])
            assert torch.equal(stored, getattr(teacher, name).to(stored.dtype)), name


def test_bytes_a_token(tmp_path: Path) -> None:
    """The budget: at most 400 bytes a token at K = 64."""
    tokens, k = 2048, 64
    ids = torch.arange(k).expand(tokens, k)
    teacher = TopKTeacher(ids, torch.full((tokens, k), -9.0), torch.full((tokens,), -0.01))
    with CacheWriter(tmp_path, vocab_size=151936, k=k) as writer:
        for part in range(0, tokens, 128):
            rows = slice(part, part + 128)
            writer.append(torch.full((128,), 151935), teacher[rows])
    size = sum(file.stat().st_size for file in tmp_path.iterdir())
    assert 392 <= size / tokens < 394


def test_what_was_read_is_the_readers_own(tmp_path: Path) -> None:
    cache = open_cache(write(tmp_path))
    first = cache[0]
    first.teacher.logprobs.fill_(0.0)
    first.input_ids.zero_()
    assert (cache[0].teacher.logprobs < 0).all()
    cache.verify()
    assert first.teacher.ids.untyped_storage().nbytes() == first.teacher.ids.nbytes


def test_indices(tmp_path: Path) -> None:
    cache = open_cache(write(tmp_path))
    assert torch.equal(cache[-1].input_ids, cache[len(cache) - 1].input_ids)
    for index in (len(cache), -len(cache) - 1):
        with pytest.raises(IndexError, match=rf"index must be in \[-7, 7\), got {index}"):
            cache[index]
    with pytest.raises(TypeError, match="index must be an int, got slice"):
        cache[1:3]  # type: ignore[index]
    assert "sequences=7, tokens=59, vocab_size=30, k=4, temperature=2" in repr(cache)


def test_few_shards_stay_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "OPEN_SHARDS", 2)
    cache = open_cache(write(tmp_path, shard_tokens=1))
    for i in (0, 3, 0, 5, 0, 6):
        assert len(cache[i].input_ids) == LENGTHS[i]
    assert list(cache._open) == [0, 6], "the least recently used goes"


def test_the_hash_is_of_the_content(tmp_path: Path) -> None:
    same = [open_cache(write(tmp_path / name)).hash for name in "ab"]
    assert same[0] == same[1]
    other = {
        open_cache(write(tmp_path / str(i), **options)).hash
        for i, options in enumerate(
            [{"temperature": 1.0}, {"model": "x"}, {"vocab_size": 31}, {"rest": False}, {}]
        )
    }
    assert len(other) == 5 and same[0] in other


def test_a_loader_with_workers(tmp_path: Path) -> None:
    cache = open_cache(write(tmp_path))
    again = pickle.loads(pickle.dumps(cache))
    assert torch.equal(again[3].input_ids, cache[3].input_ids)
    cache[0]
    seen = []
    loader = DataLoader(
        cache, batch_size=2, collate_fn=collate, num_workers=2, multiprocessing_context="fork"
    )
    for batch in loader:
        assert batch.teacher.shape == batch.input_ids.shape == batch.labels.shape
        seen += batch.attention_mask.sum(1).tolist()
    assert seen == list(LENGTHS)


# Batches.


def test_collate() -> None:
    ids = torch.tensor([[1, 2], [3, 4], [5, 6]], dtype=torch.int32)
    logprobs = torch.full((3, 2), -2.0).half()
    long = CachedSequence(
        torch.tensor([7, 8, 9], dtype=torch.int32), TopKTeacher(ids, logprobs, logprobs[:, 0])
    )
    short = CachedSequence(long.input_ids[:2], long.teacher[:2])
    batch = collate([short, long], pad_token_id=50, length=4)
    assert batch.input_ids.tolist() == [[7, 8, 50, 50], [7, 8, 9, 50]]
    assert batch.attention_mask.tolist() == [[1, 1, 0, 0], [1, 1, 1, 0]]
    assert batch.labels.tolist() == [[8, -100, -100, -100], [8, 9, -100, -100]]
    assert batch.labels.dtype == batch.input_ids.dtype == torch.int64
    teacher = batch.teacher
    assert teacher.shape == (2, 4) and teacher.dtype == torch.float16
    assert teacher.log_rest is not None
    assert torch.equal(teacher.ids[1, :3], ids) and not teacher.ids[0, 2:].any()
    assert (teacher.logprobs[0, 2:] == -INF).all() and (teacher.logprobs[0, :2] == -2.0).all()
    assert teacher.log_rest[0].tolist() == [-2.0, -2.0, 0.0, 0.0]
    assert collate([short, long]).labels.shape == (2, 3)
    moved = batch.to("meta")
    assert moved.teacher.device.type == moved.labels.device.type == "meta"


def test_collate_sequences_of_several_dtypes() -> None:
    """The batch's holds the values of all, whichever comes first."""
    logprobs = torch.tensor([[-1.0, -2.0]]).half()
    narrow = TopKTeacher(torch.tensor([[1, 2]], dtype=torch.uint8), logprobs)
    wide = TopKTeacher(torch.tensor([[348, 3]]), torch.tensor([[-1.0001, -2.0]]))
    both = [CachedSequence(torch.arange(1), teacher) for teacher in (narrow, wide)]
    for order in (both, both[::-1]):
        teacher = collate(order).teacher
        at = 1 if order is both else 0
        assert torch.equal(teacher.ids[at], wide.ids)
        assert torch.equal(teacher.logprobs[at], wide.logprobs)


def test_rows_without_entries_do_not_count() -> None:
    """As of the prompt of a completion that a server has scored."""
    logprobs = torch.full((4, 2), -2.0)
    logprobs[:2] = -INF
    teacher = TopKTeacher(torch.tensor([[0, 1]] * 4), logprobs)
    batch = collate([CachedSequence(torch.arange(4), teacher)], ignore_index=-1)
    assert batch.labels.tolist() == [[-1, -1, 3, -1]]
    assert batch.teacher.log_rest is None


BAD_BATCHES: dict[str, tuple[Callable[[], Any], str]] = {
    "none": (lambda: collate([]), "sequences must be at least one, got none"),
    "length": (
        lambda: collate([CachedSequence(*sequences()[0])], length=4),
        "length must be at least 5, that of the longest sequence, got 4",
    ),
    "rest": (
        lambda: collate(
            [CachedSequence(*sequences()[0]), CachedSequence(*sequences(rest=False)[1])]
        ),
        "sequences must be all like the first, TopKTeacher(shape=(5,), k=4, ids=int64,"
        " logprobs=float32, log_rest=float32, device='cpu'), got TopKTeacher(shape=(9,), k=4,"
        " ids=int64, logprobs=float32, log_rest=None, device='cpu')",
    ),
}


@pytest.mark.parametrize(("call", "text"), BAD_BATCHES.values(), ids=BAD_BATCHES)
def test_bad_batches(call: Callable[[], Any], text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(text) + "$"):
        call()


# What is not a cache, or not the one that is meant.


@pytest.mark.parametrize(
    ("name", "stored", "value"),
    [
        ("vocab_size", 30, 32000),
        ("k", 4, 64),
        ("temperature", 2.0, 1.0),
        ("tokenizer", "tok", "other"),
        ("model", "big", "small"),
    ],
)
def test_what_is_expected_of_a_cache(tmp_path: Path, name: str, stored: Any, value: Any) -> None:
    write(tmp_path, tokenizer="tok", model="big")
    cache = open_cache(tmp_path, **{name: stored})
    assert getattr(cache, name) == stored
    text = f"{name} must be {stored!r}, that of the cache {tmp_path}, got {value!r}"
    with pytest.raises(ValueError, match=re.escape(text) + "$"):
        open_cache(tmp_path, **{name: value})
    open_cache(tmp_path, hash=cache.hash)
    with pytest.raises(ValueError, match=f"hash must be '{cache.hash}'.*, got 'abc'"):
        open_cache(tmp_path, hash="abc")


def _edit(name: str, value: Any) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        index = json.loads((path / "index.json").read_text())
        index[name] = value
        (path / "index.json").write_text(json.dumps(index))

    return damage


def _edit_shard(name: str, value: Any) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        index = json.loads((path / "index.json").read_text())
        index["shards"][1][name] = value
        (path / "index.json").write_text(json.dumps(index))

    return damage


def _cut(path: Path) -> None:
    file = path / "shard-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def _swapped(path: Path) -> None:
    """A shard of another cache, of the same size."""
    other = write(path / "other", model="y", tokenizer="")
    name = "shard-00001.safetensors"
    (path / name).write_bytes((other / name).read_bytes())


def _foreign_tensors(path: Path) -> None:
    """A safetensors file of another program, whose size the index happens to say."""
    file = path / "shard-00001.safetensors"
    safetensors.save_file({"weight": torch.zeros(3)}, file)
    _edit_shard("bytes", file.stat().st_size)(path)


def _no_safetensors(path: Path) -> None:
    file = path / "shard-00001.safetensors"
    file.write_bytes(b"\xff" * file.stat().st_size)


def _other_shapes(path: Path) -> None:
    """The right metadata above the wrong tensors."""
    file = path / "shard-00001.safetensors"
    with safetensors.safe_open(file, framework="pt") as handle:
        metadata = handle.metadata()
        tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    tensors["topk_ids"] = tensors["topk_ids"][:, :3].contiguous()
    safetensors.save_file(tensors, file, metadata=metadata)
    _edit_shard("bytes", file.stat().st_size)(path)


def _swap_order(path: Path) -> None:
    index = json.loads((path / "index.json").read_text())
    index["shards"].reverse()
    (path / "index.json").write_text(json.dumps(index))


FOLDER = "path must be the folder of a teacher's cache, got "
DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "unfinished": (lambda p: (p / "index.json").unlink(), FOLDER + ".*without index.json"),
    "not_json": (lambda p: (p / "index.json").write_text("{"), FOLDER + ".*or damaged$"),
    "a_list": (lambda p: (p / "index.json").write_text("[]"), FOLDER + ".*or damaged$"),
    "another_program": (
        lambda p: (p / "index.json").write_text('{"format": "pt"}'),
        FOLDER + ".*of another program, or damaged$",
    ),
    "version": (
        _edit("version", "2"),
        "path must be a cache of format version 1, got .*, of version 2$",
    ),
    "no_shards": (_edit("shards", None), FOLDER + ".*is incomplete$"),
    "no_k": (_edit("k", "4"), FOLDER + ".*is incomplete$"),
    "dtype": (_edit("logprob_dtype", "int8"), FOLDER + ".*is incomplete$"),
    "leads_away": (_edit_shard("file", "../x.safetensors"), FOLDER + ".*is incomplete$"),
    "hash": (_edit("hash", "0" * 64), FOLDER + ".*does not match its own hash$"),
    "order": (_swap_order, FOLDER + ".*does not match its own hash$"),
    "other_k": (
        _edit("k", 5),
        "shard must be of k '5', as index.json says, got .*shard-00000.safetensors of k '4'$",
    ),
    "other_temperature": (
        _edit("temperature", 1.0),
        "shard must be of temperature '1.0', as index.json says, got .* of temperature '2.0'$",
    ),
    "other_vocab": (
        _edit("vocab_size", 31),
        "shard must be of vocab_size '31', as index.json says, got .* of vocab_size '30'$",
    ),
    "missing": (
        lambda p: (p / "shard-00001.safetensors").unlink(),
        "shard must be at .*shard-00001.safetensors, as index.json says, got no file$",
    ),
    "cut": (
        _cut,
        r"shard must be \d+ bytes, as index.json says, got .*shard-00001.* bytes, cut short$",
    ),
    "longer": (
        lambda p: (p / "shard-00002.safetensors").open("ab").write(b"x"),
        r"shard must be \d+ bytes, as index.json says, got .*shard-00002.* bytes, too long$",
    ),
    "no_safetensors": (
        _no_safetensors,
        "shard must be a safetensors file, got .*shard-00001.safetensors",
    ),
    "foreign_tensors": (
        _foreign_tensors,
        "shard must be of format 'kdkernels-teacher-cache', as index.json says, got .*of format"
        " None$",
    ),
    "other_shapes": (_other_shapes, "shard must be of tensors .*, got .*shard-00001"),
}


@pytest.mark.parametrize(("damage", "text"), DAMAGES.values(), ids=DAMAGES)
def test_damaged_files(tmp_path: Path, damage: Callable[[Path], Any], text: str) -> None:
    write(tmp_path)
    open_cache(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=text):
        open_cache(tmp_path)


def test_a_shard_of_another_cache(tmp_path: Path) -> None:
    write(tmp_path, model="x")
    _swapped(tmp_path)
    with pytest.raises(ValueError, match=r"shard must be of model 'x', .* of model 'y'$"):
        open_cache(tmp_path)


def test_damaged_data_are_found_by_verify(tmp_path: Path) -> None:
    write(tmp_path)
    file = tmp_path / "shard-00001.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    open_cache(tmp_path)
    with pytest.raises(ValueError, match=r"shard must be of the content hash .*data are damaged$"):
        open_cache(tmp_path, verify=True)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=FOLDER + ".*nowhere, which is no folder$"):
        open_cache(tmp_path / "nowhere")


# What a writer does not take.


def test_an_exception_leaves_no_cache(tmp_path: Path) -> None:
    with pytest.raises(KeyError), CacheWriter(tmp_path, vocab_size=VOCAB, k=K) as writer:
        writer.append(*sequences()[0])
        raise KeyError
    with pytest.raises(ValueError, match="its writer was not closed"):
        open_cache(tmp_path)


def test_a_closed_writer(tmp_path: Path) -> None:
    writer = CacheWriter(tmp_path, vocab_size=VOCAB, k=K)
    with pytest.raises(ValueError, match="writer must be given at least one sequence, got none"):
        writer.close()
    writer.append(*sequences()[0])
    writer.close()
    writer.close()
    with pytest.raises(ValueError, match="writer must be open, got a closed one"):
        writer.append(*sequences()[0])


BAD_WRITERS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "vocab": ({"vocab_size": 1}, ValueError, "vocab_size must be in [2, 2**31], got 1"),
    "k": ({"k": 31}, ValueError, "k must be in [1, 30], the size of the vocabulary, got 31"),
    "temperature": ({"temperature": 0}, ValueError, "temperature must be > 0, got 0.0"),
    "dtype": (
        {"logprob_dtype": torch.bfloat16},
        ValueError,
        "logprob_dtype must be torch.float16 or torch.float32, got torch.bfloat16",
    ),
    "shard_tokens": ({"shard_tokens": 0}, ValueError, "shard_tokens must be >= 1, got 0"),
    "model": ({"model": None}, TypeError, "model must be a str, got NoneType"),
}


@pytest.mark.parametrize(("options", "kind", "text"), BAD_WRITERS.values(), ids=BAD_WRITERS)
def test_bad_writers(
    tmp_path: Path, options: dict[str, Any], kind: type[Exception], text: str
) -> None:
    with pytest.raises(kind, match=re.escape(text) + "$"):
        CacheWriter(tmp_path / "new", **{"vocab_size": VOCAB, "k": K, **options})
    assert not (tmp_path / "new").exists()


def test_a_folder_with_files_is_not_written_over(tmp_path: Path) -> None:
    write(tmp_path)
    text = f"path must be a new or an empty folder, got {tmp_path}, which holds files"
    with pytest.raises(ValueError, match=re.escape(text) + "$"):
        CacheWriter(tmp_path, vocab_size=VOCAB, k=K)


IDS = torch.arange(5)
BAD_SEQUENCES: dict[str, tuple[Any, Any, type[Exception], str]] = {
    "ids_type": ([1], None, TypeError, "input_ids must be a Tensor, got list"),
    "ids_dtype": (
        IDS.float(),
        None,
        TypeError,
        "input_ids must be of an integer dtype, got torch.float32",
    ),
    "ids_shape": (
        IDS[None],
        None,
        ValueError,
        "input_ids must be (S,) with S >= 1, got shape (1, 5)",
    ),
    "empty": (IDS[:0], None, ValueError, "input_ids must be (S,) with S >= 1, got shape (0,)"),
    "negative": (IDS - 100, None, ValueError, "input_ids must be in [0, 2**31), got -100"),
    "large": (IDS + 2**31, None, ValueError, f"input_ids must be in [0, 2**31), got {2**31 + 4}"),
    "teacher": (IDS, 3, TypeError, "teacher must be a TopKTeacher, got int"),
    "rows": (
        IDS,
        sequences()[1][1],
        ValueError,
        "teacher must be of (5,) rows, one for each input id, got (9,)",
    ),
    "k": (
        IDS,
        sequences(k=5)[0][1],
        ValueError,
        "teacher must be of at most k=4 entries a row, got 5",
    ),
    "rest": (
        IDS,
        sequences(rest=False)[0][1],
        ValueError,
        "teacher.log_rest must be a Tensor, as of the first sequence, got None",
    ),
    "vocab": (
        IDS,
        TopKTeacher(torch.full((5, 1), 30), torch.zeros(5, 1), torch.full((5,), -INF)),
        ValueError,
        "ids must be in [0, 30), got 30",
    ),
}


@pytest.mark.parametrize(
    ("input_ids", "teacher", "kind", "text"), BAD_SEQUENCES.values(), ids=BAD_SEQUENCES
)
def test_a_sequence_that_is_refused_leaves_nothing(
    tmp_path: Path, input_ids: Any, teacher: Any, kind: type[Exception], text: str
) -> None:
    good = sequences()
    with CacheWriter(tmp_path, vocab_size=VOCAB, k=K) as writer:
        writer.append(*good[0])
        with pytest.raises(kind, match=re.escape(text) + "$"):
            writer.append(input_ids, good[0][1] if teacher is None else teacher)
        writer.append(*good[1])
    cache = open_cache(tmp_path, verify=True)
    assert cache.lengths().tolist() == list(LENGTHS[:2])
    assert torch.equal(cache[1].input_ids, good[1][0].int())


@pytest.mark.parametrize("missing", ["safetensors", "numpy"])
def test_without_the_extra(tmp_path: Path, missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules, f"{missing}.torch", raising=False)
    for use in (
        lambda: CacheWriter(tmp_path / "new", vocab_size=VOCAB, k=K),
        lambda: open_cache(tmp_path),
    ):
        with pytest.raises(ModuleNotFoundError) as error:
            use()
        text = str(error.value)
        assert f"need {missing}, which is not installed" in text
        assert "kdkernels[cache]" in text and "pip install numpy safetensors" in text
    assert not (tmp_path / "new").exists()


def test_importing_needs_neither() -> None:
    code = (
        "import sys; sys.modules['safetensors'] = sys.modules['numpy'] = None\n"
        "import kdkernels.teacher as t, torch\n"
        "print(t.top_k(torch.zeros(2, 4), 2).k, 'triton' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["2", "False"], done.stderr


def test_the_format_is_what_its_document_says(tmp_path: Path) -> None:
    write(tmp_path, logprob_dtype=torch.float32)
    tensors = safetensors.load_file(tmp_path / "shard-00000.safetensors")
    assert {name: (str(x.dtype), tuple(x.shape)) for name, x in tensors.items()} == {
        "topk_ids": ("torch.int32", (14, K)),
        "topk_logprobs": ("torch.float32", (14, K)),
        "log_rest": ("torch.float32", (14,)),
        "input_ids": ("torch.int32", (14,)),
        "offsets": ("torch.int64", (3,)),
    }
    assert tensors["offsets"].tolist() == [0, 5, 14]
    assert all(name in (_format.__doc__ or "") for name in tensors)

"""English text for the language models: documents, a split that shares no passage, tokens, batches.

By default the text is ``pydoc_data.topics`` of the running Python, which is on every machine: what
``help("import")`` prints. Topics contain one another, word for word, so the split moves groups of
topics. Two topics that have twelve words in a row in common are in one group, and a group keeps a
paragraph once. The tokenizer learns from the training text alone.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from data import generator
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

IGNORED = -100
"""The label of a token that no loss counts: the first of a document, which nothing announces."""
START = "<|start|>"
RUN = 12
"""So many words in a row that two documents share make them one group."""
BLOCK = 4000
"""Characters of a document of a text file, at least: its paragraphs are gathered."""
PIECE = 1000
"""Characters of a document of the training, at least: students are given whole ones."""
HELD = 0.12
"""Share of the text that is held out, at most."""
MOST = 100_000
"""Characters that are held out, at most: more would only make the evaluations long."""


def documents(path: Path | None) -> list[str]:
    """The topics of Python's documentation, or a file's paragraphs in blocks."""
    if path is None:
        try:
            from pydoc_data.topics import topics
        except ModuleNotFoundError:
            raise SystemExit(
                "distill_lm.py: this Python has no pydoc_data.topics; name a text with --text FILE"
            ) from None
        return [topics[name] for name in sorted(topics)]
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SystemExit(f"distill_lm.py: --text must be a file of UTF-8 text: {error}") from None
    # A file that has hardly a blank line is taken line by line.
    short = [p.splitlines() if len(p) > BLOCK else [p] for p in paragraphs(text)]
    return blocks("\n\n".join(line for lines in short for line in lines), BLOCK)


def blocks(text: str, least: int) -> list[str]:
    """Paragraphs gathered until they have so many characters."""
    found: list[str] = []
    gathered = ""
    for paragraph in paragraphs(text):
        gathered += ("\n\n" if gathered else "") + paragraph
        if len(gathered) >= least:
            found.append(gathered)
            gathered = ""
    return [*found, gathered] if gathered else found


def paragraphs(text: str) -> list[str]:
    """What blank lines separate; the lines themselves where there are none."""
    found = re.split(r"\n\s*\n", text.strip())
    return found if len(found) > 1 else text.strip().splitlines()


def runs(text: str) -> Iterator[str]:
    """Every run of ``RUN`` words, without punctuation and capitals."""
    words = re.findall(r"\w+", text.lower())
    for first in range(len(words) - RUN + 1):
        yield " ".join(words[first : first + RUN])


def groups(texts: Sequence[str]) -> list[str]:
    """One text for each group of documents that share a run of words, its paragraphs once each."""
    above = list(range(len(texts)))

    def root(one: int) -> int:
        while above[one] != one:
            above[one] = above[above[one]]
            one = above[one]
        return one

    seen: dict[str, int] = {}
    for number, text in enumerate(texts):
        for run in runs(text):
            above[root(number)] = root(seen.setdefault(run, number))
    members: dict[int, list[str]] = {}
    for number, text in enumerate(texts):
        members.setdefault(root(number), []).append(text)
    kept = []
    for together in members.values():
        once: dict[str, str] = {}
        for text in sorted(together, key=len, reverse=True):
            for paragraph in paragraphs(text):
                once.setdefault(" ".join(paragraph.split()), paragraph)
        kept.append("\n\n".join(once.values()))
    return kept


def split(texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Training and held-out part. The same texts are always split alike.

    Large groups are trained on: many small ones are better evidence than a few large ones.
    """
    room = min(MOST, HELD * sum(map(len, texts)))
    largest = max(room / 4, min(map(len, texts), default=0))
    kept: list[str] = []
    held: list[str] = []
    for text in sorted(texts, key=lambda text: zlib.crc32(text.encode())):
        if len(text) <= min(room, largest):
            held.append(text)
            room -= len(text)
        else:
            kept.append(text)
    return kept, held


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> Tokenizer:
    """Byte-pair tokens: any text can be written with them, whatever they were learned from."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[START],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


@dataclass(frozen=True)
class Corpus:
    """Documents as tokens, each after a start token, and the held-out part as one stream."""

    documents: list[Tensor]
    held: Tensor
    vocabulary: int
    characters: tuple[int, int]
    """Of the training and of the held-out text."""

    @property
    def tokens(self) -> int:
        """To train on."""
        return sum(map(len, self.documents))

    @property
    def stamp(self) -> int:
        """A number that tells one text, split and tokenizer from another."""
        whole = torch.cat([*self.documents, self.held]).numpy()
        return zlib.crc32(whole.tobytes(), len(self.held))

    def subset(self, share: float, seed: int) -> Tensor:
        """A stream of documents in an order drawn by ``seed``, up to a share of all tokens."""
        order = torch.randperm(len(self.documents), generator=generator("documents", seed))
        stream = torch.cat([self.documents[number] for number in order.tolist()])
        return stream[: max(2, round(share * self.tokens))]


def corpus(path: Path | None, vocabulary: int, *, validate: bool = False) -> Corpus:
    """The text, split and tokenised; ``validate`` holds out a part of the training text instead."""
    training, held = split(groups(documents(path)))
    if validate:
        training, held = split(training)
    if not held:
        raise SystemExit(
            "distill_lm.py: the text must have passages that differ, got one from which nothing "
            "can be held out"
        )
    tokenizer = train_tokenizer(training, vocabulary)

    def encode(texts: Sequence[str]) -> list[Tensor]:
        pieces = [piece for text in texts for piece in blocks(text, PIECE)]
        return [torch.tensor([0, *found.ids]) for found in tokenizer.encode_batch(pieces)]

    characters = (sum(map(len, training)), sum(map(len, held)))
    return Corpus(encode(training), torch.cat(encode(held)), tokenizer.get_vocab_size(), characters)


def windows(stream: Tensor, context: int, first: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs and labels, a row each window; what is missing at the end is padded and ignored."""
    inputs, labels = stream[first:-1], stream[first + 1 :]
    labels = torch.where(labels == 0, IGNORED, labels)
    missing = -len(inputs) % context
    inputs, labels = F.pad(inputs, (0, missing)), F.pad(labels, (0, missing), value=IGNORED)
    return inputs.view(-1, context), labels.view(-1, context)


def whole_windows(stream: Tensor, context: int) -> int:
    """Windows that an epoch has, wherever its first one begins."""
    return (len(stream) - 1) // context - 1


def batches(
    stream: Tensor,
    context: int,
    batch: int,
    seed: int,
    first: int,
    last: int,
    fixed: bool = False,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The batches of steps ``first`` to ``last``: a function of the stream, seed and step alone.

    Inputs, labels, and which windows they are. Every epoch cuts the stream at other places, unless
    they are ``fixed``, and takes its windows in another order.
    """
    count = whole_windows(stream, context)
    steps = max(1, count // batch)
    for step in range(first, last):
        epoch, place = divmod(step, steps)
        if place == 0 or step == first:
            dice = generator("windows", seed, epoch)
            begin = int(torch.randint(context, (), generator=dice)) * (not fixed)
            order = torch.randperm(count, generator=dice).to(stream.device)
            inputs, labels = windows(stream, context, begin)
        rows = order[place * batch : (place + 1) * batch]
        yield inputs[rows], labels[rows], rows

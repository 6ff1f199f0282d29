"""The language-model trainer of examples/: a split that leaks nothing, resuming, results, errors.

Tiny runs: what is tested is the machinery, not the loss that is reached.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

for needed in ("tokenizers", "matplotlib", "tqdm"):
    pytest.importorskip(needed, reason=f"{needed}: pip install -e '.[examples]'")

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))
try:
    import checkpoints
    import distill_lm
    import lm_data
    import lm_methods
    import lm_models
finally:
    sys.path.remove(str(EXAMPLES))

METHODS = list(lm_methods.METHODS)
DISTILLED = [name for name, entry in lm_methods.METHODS.items() if entry is not None]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few of Python's topics, which is enough text for tiny runs."""
    path = tmp_path_factory.mktemp("text") / "topics.txt"
    path.write_text("\n\n".join(lm_data.documents(None)[:12]), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tiny(text: Path) -> list[str]:
    return (
        f"--device cpu --text {text} --vocab-size 320 --context 16 --teacher-size 16x1 "
        "--student 8x1 --teacher-steps 4 --teacher-batch 4 --steps 5 --batch 4 --evaluate-every 2 "
        "--seeds 0 1"
    ).split()


def run(folder: Path, tiny: list[str], *extra: str) -> dict[str, Any]:
    assert distill_lm.main([*tiny, "--output", str(folder), *extra]) == 0
    return json.loads((folder / "results.json").read_text())


def learned(results: dict[str, Any]) -> dict[str, Any]:
    """What must not depend on interrupts."""
    found = {"teacher": results["teacher"]}
    for method, seeds in results["students"].items():
        found |= {f"{method}-{seed}": history for seed, history in seeds.items()}
    return {name: (h["step"], h["loss"], h["validation"]) for name, h in found.items()}


@pytest.fixture(scope="module")
def whole(tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("whole")
    return folder, run(folder, tiny)


def test_results(whole: tuple[Path, dict[str, Any]]) -> None:
    folder, results = whole
    assert set(results["validation"]) == set(METHODS)
    assert set(results["gains"]) == set(results["share_of_the_loss"]) - {"ce"} == set(DISTILLED)
    for name, (step, loss, validation) in learned(results).items():
        assert step == ([2, 4] if name == "teacher" else [2, 4, 5])
        assert all(0 < value < 20 for value in (*loss, *validation))
    for method, seeds in results["students"].items():
        final = {seed: history["validation"][-1] for seed, history in seeds.items()}
        assert results["validation"][method] == final and set(final) == {"0", "1"}
        plain = results["validation"]["ce"]
        if method != "ce":
            assert results["gains"][method] == [plain[s] - final[s] for s in final]
        assert results["share_of_the_loss"][method]["kdkernels"] > 0
        assert results["tokens_a_second"][method] > 0
    assert results["vocabulary"] == 320 and all(results["tokens"])
    assert (folder / "lm_curves.png").read_bytes().startswith(b"\x89PNG")


def test_interrupted_run_resumes_to_the_same_bits(
    whole: tuple[Path, dict[str, Any]],
    tiny: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stopped in the teacher, which has dropout, and in a student; what is done is skipped."""
    write, written = checkpoints.write, 0

    def interrupt(path: Path, state: dict[str, Any]) -> None:
        nonlocal written
        if written in (1, 4):
            written += 1
            raise KeyboardInterrupt
        written += 1
        write(path, state)

    monkeypatch.setattr(checkpoints, "write", interrupt)
    for _ in range(2):
        assert distill_lm.main([*tiny, "--no-times", "--output", str(tmp_path)]) == 130
    assert not (tmp_path / "results.json").exists()
    assert learned(run(tmp_path, tiny, "--no-times")) == learned(whole[1])
    done = written
    assert done == 2 + 2 + 3 * 2 * len(METHODS)
    assert learned(run(tmp_path, tiny, "--no-times")) == learned(whole[1])
    assert written == done
    run(tmp_path, tiny, "--no-times", "--fresh", "--methods", "ce", "--seeds", "0")
    assert written == done + 3


def test_other_settings_refuse_the_checkpoint(
    whole: tuple[Path, dict[str, Any]], tiny: list[str], text: Path, tmp_path: Path
) -> None:
    output = ["--output", str(whole[0])]
    with pytest.raises(SystemExit, match=r"other settings \(dropout: 0.2, now 0.5\).*\n.*--fresh"):
        distill_lm.main([*tiny, *output, "--dropout", "0.5"])
    with pytest.raises(SystemExit, match=r"other settings \(lr: .*, now 0.5\)"):
        distill_lm.main([*tiny, *output, "--lr", "0.5"])
    other = tmp_path / "other.txt"
    other.write_text(text.read_text().replace("the", "a"))
    with pytest.raises(SystemExit, match=r"other settings \(text: \d+, now \d+\)"):
        distill_lm.main([*tiny, *output, "--text", str(other)])


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def test_the_split_leaks_nothing() -> None:
    """Topics contain one another: no run of words is in both parts, nor in both again when a part
    of the training text is held out to choose options."""
    topics = lm_data.documents(None)
    texts = lm_data.groups(topics)
    training, held = lm_data.split(texts)
    fitted, choosing = lm_data.split(training)
    assert len(texts) < len(topics) and sorted(training + held) == sorted(texts)
    assert sorted(fitted + choosing) == sorted(training)
    for seen, kept_out in ((training, held), (fitted, choosing)):
        known = {run for text in seen for run in lm_data.runs(text)}
        assert not any(run in known for text in kept_out for run in lm_data.runs(text))
        share = sum(map(len, kept_out)) / sum(map(len, (*seen, *kept_out)))
        assert 0.08 < share <= lm_data.HELD
        assert len(kept_out) >= 8
    # What makes the grouping necessary: a split of topics as they are would leak.
    runs = [set(lm_data.runs(topic)) for topic in topics]
    assert any(runs[i] & runs[j] for i in range(len(runs)) for j in range(i))
    assert lm_data.split(lm_data.groups(topics)) == (training, held)


def test_groups_are_joined_and_keep_a_paragraph_once() -> None:
    common = " ".join(f"word{i}" for i in range(lm_data.RUN))
    texts = [f"first\n\n{common}", "alone", f"{common.upper()}!\n\nsecond", f"{common}\n\nfirst"]
    found = lm_data.groups(texts)
    assert found == [f"{common.upper()}!\n\nsecond\n\nfirst\n\n{common}", "alone"]
    short = common.rsplit(" ", 1)[0]  # one word less is no evidence
    assert len(lm_data.groups([f"a {short}", f"b {short}"])) == 2


def test_documents_of_files(tmp_path: Path) -> None:
    """Paragraphs in blocks; lines where a file has hardly a blank line."""
    path = tmp_path / "text.txt"
    lines = [f"line {i} " + "x" * 90 for i in range(200)]
    for text in ("\n\n".join(lines), "\n".join(lines), "title\n\n" + "\n".join(lines)):
        path.write_text(text)
        found = lm_data.documents(path)
        assert "\n".join(found).split() == text.split()
        assert len(found) == 5
        assert all(lm_data.BLOCK <= len(one) < lm_data.BLOCK + 120 for one in found[:-1])


def test_tokens() -> None:
    """The training text alone makes the vocabulary; any text is written with it, and read back."""
    texts = ["the theory of the thing\n\n  indented: (x, y)"] * 3
    tokenizer = lm_data.train_tokenizer(texts, 300)
    for text in (*texts, "naïve — ✓ never seen"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.encode(lm_data.START).ids[0] == 0
    assert 0 not in tokenizer.encode(texts[0]).ids


def test_windows_ignore_what_nothing_announces() -> None:
    stream = torch.tensor([0, 5, 6, 0, 7, 8, 9])
    inputs, labels = lm_data.windows(stream, 4)
    assert inputs.tolist() == [[0, 5, 6, 0], [7, 8, 0, 0]]
    assert labels.tolist() == [[5, 6, -100, 7], [8, 9, -100, -100]]


def test_batches_are_a_function_of_the_step() -> None:
    stream = torch.arange(1, 101)
    assert lm_data.whole_windows(stream, 8) == 11
    whole = list(lm_data.batches(stream, 8, 4, 3, 0, 7))
    again = [*lm_data.batches(stream, 8, 4, 3, 0, 3), *lm_data.batches(stream, 8, 4, 3, 3, 7)]
    for (inputs, labels, rows), (other, others, those) in zip(whole, again, strict=True):
        assert rows.equal(those)
        assert inputs.equal(other) and labels.equal(others) and labels.equal(inputs + 1)
        assert inputs.shape == (4, 8)
    epoch = torch.cat([inputs for inputs, _, _ in whole[:2]]).flatten()
    assert len(epoch.unique()) == len(epoch)


@pytest.mark.parametrize("text", [*DISTILLED, "kl:temperature=2,weight=3,ce=0.5", "jsd:beta=0.1"])
def test_eager_forms_are_the_same_losses(text: str) -> None:
    noise = torch.Generator().manual_seed(0)
    method = lm_methods.Method.parse(text)
    student, teacher = torch.randn(2, 3, 5, 40, dtype=torch.float64, generator=noise)
    labels = torch.randint(40, (3, 5), generator=noise)
    labels[0, :2] = lm_data.IGNORED
    found = []
    for loss_of in (lm_methods.total, lm_methods.eager):
        logits = student.clone().requires_grad_()
        loss = loss_of(method, logits, teacher, labels)
        loss.backward()
        found.append((loss.detach(), logits.grad))
    torch.testing.assert_close(*found)
    assert not found[0][1][0, :2].any()


def test_the_model_looks_back_only() -> None:
    model = lm_models.build("32x2", 50, 8, seed=1).eval()
    tokens = torch.randint(50, (2, 8), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % 50
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5:], after[:, 5:])
    assert before.shape == (2, 8, 50)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--methods heat", "METHOD must be NAME[:OPTION=VALUE,...] with a name among ce, kl"),
        ("--methods jsd:alpha=1", "an option of jsd must be NAME=VALUE with a name among ce, wei"),
        ("--methods kl:weight=much", "kl's weight must be a number, got much"),
        ("--methods kl:temperature=0", "temperature must be > 0, got 0.0"),
        ("--methods jsd:beta=2", "beta must be in [0, 1], got 2.0"),
        ("--dropout 2", "argument --dropout: it must be a number in [0, 1), got 2"),
        ("--lr nan", "argument --lr: it must be a number above 0, got nan"),
        ("--weight-decay -1", "argument --weight-decay: it must be a number from 0 on, got -1"),
        ("--student 8", "size must be WIDTHxBLOCKS, such as 16x2, got 8"),
        ("--share 2", "argument --share: it must be a number in (0, 1], got 2"),
        ("--steps 0", "argument --steps: it must be a whole number from 1 on, got 0"),
    ],
)
def test_errors(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        distill_lm.main(arguments.split())
    assert message in " ".join(capsys.readouterr().err.split())


def test_unusable_texts(tmp_path: Path, tiny: list[str]) -> None:
    path = tmp_path / "text.txt"
    output = ["--output", str(tmp_path / "run"), "--text", str(path)]
    with pytest.raises(SystemExit, match=r"must be a file of UTF-8 text: .*text\.txt"):
        distill_lm.main([*tiny, *output])
    path.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(SystemExit, match="must be a file of UTF-8 text: "):
        distill_lm.main([*tiny, *output])
    path.write_text("the same words again and again\n" * 200)
    with pytest.raises(SystemExit, match="nothing can be held out"):
        distill_lm.main([*tiny, *output])


def test_a_head_teaches_as_logits_do(
    whole: tuple[Path, dict[str, Any]], tiny: list[str], tmp_path: Path
) -> None:
    """The same batches, and losses that differ by rounding."""
    through_heads = learned(run(tmp_path, tiny, "--teacher", "head", "--no-times"))
    for name, (step, loss, validation) in learned(whole[1]).items():
        own = through_heads[name]
        assert own[0] == step
        assert own[1] == pytest.approx(loss, rel=1e-4)
        assert own[2] == pytest.approx(validation, rel=1e-4)


def test_a_cached_teacher(tiny: list[str], tmp_path: Path) -> None:
    """All tokens in the cache teach as logits do, a few nearly; the cache is written once."""
    options = ["--methods", "ce", "kl", "jsd:beta=0.3", "--no-times", "--seeds", "0"]
    found = {}
    for k in (320, 8):
        folder = tmp_path / str(k)
        found[k] = run(folder, tiny, *options, "--teacher", "topk", "--top-k", str(k))
    files = sorted((folder / "teacher-cache").rglob("*.safetensors"))
    assert files
    written = [file.stat().st_mtime_ns for file in files]
    again = run(folder, tiny, *options, "--teacher", "topk", "--top-k", "8", "--fresh")
    assert [file.stat().st_mtime_ns for file in files] == written
    assert learned(again) == learned(found[8])
    for name in ("kl-0", "jsd:beta=0.3-0"):
        few, everything = (learned(found[k])[name] for k in (8, 320))
        assert few[1] == pytest.approx(everything[1], rel=0.3) and few[1] != everything[1]
    inputs, labels = lm_data.windows(torch.arange(1, 60), 8)
    for some, others, rows in lm_data.batches(torch.arange(1, 60), 8, 2, 0, 0, 9, fixed=True):
        assert some.equal(inputs[rows]) and others.equal(labels[rows])
    with pytest.raises(SystemExit, match=r"--top-k: teacher_ids must be of .* K from 1 to 1024"):
        distill_lm.main(["--teacher", "topk", "--top-k", "1500"])
    with pytest.raises(SystemExit, match="--methods must be among ce, kl, reverse_kl, jsd"):
        distill_lm.main([*tiny, "--methods", "skew_kl", "--teacher", "topk"])

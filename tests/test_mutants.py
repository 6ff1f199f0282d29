"""The table of mutants fits the sources; ``make mutants`` tries it, which takes minutes."""

from __future__ import annotations

from pathlib import Path

import mutants
import pytest
from mutant_table import MUTANTS, WIDE, Mutant

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_texts_occur_once(mutant: Mutant) -> None:
    """A refactoring that moves a text must move its mutant too."""
    source = (ROOT / mutant.file).read_text(encoding="utf-8")
    changed = mutants.replaced(mutant, source)
    assert changed != source
    if not mutant.compiled:
        compile(changed, mutant.file, "exec")
        return
    before, right, _ = mutant.parts()
    if not right.endswith(";"):  # an operand of the run-time choice, which is no constant
        assert (
            right[0] not in "+*/%,.=<>&|?:" and mutant.wrong.strip() and "constexpr" not in before
        )


def test_names_and_tests_exist() -> None:
    names = [mutant.name for mutant in MUTANTS]
    assert len(set(names)) == len(names) >= 30
    assert len({mutants.number(mutant) for mutant in MUTANTS} - {0}) == len(names)
    for mutant in MUTANTS:
        for file in mutant.tests.split():
            assert (ROOT / "tests" / file).is_file(), f"{mutant.name}: {file}"
    assert all((ROOT / file).is_file() for file in WIDE)


def test_all_mutants_of_a_file_are_compiled_at_once() -> None:
    one, other, statement = (
        Mutant(name, "csrc/cpu/x.h", text, wrong, "", "")
        for name, text, wrong in (
            ("one", "a + «b»", "c"),
            ("other", "f(x)", "g(x)"),
            ("statement", "return 1;", "return 2;"),
        )
    )
    source = "y = a + b;\nz = f(x);\nif (y) return 1;\n"
    text = mutants.instrumented([other, statement, one], source)
    chosen = {
        m.name: f"::kdkernels::kMutant == {mutants.number(m)}L" for m in (one, other, statement)
    }
    assert text == (
        '#include "mutant.h"\n'
        f"y = a + ({chosen['one']} ? (c) : (b));\n"
        f"z = ({chosen['other']} ? (g(x)) : (f(x)));\n"
        f"if (y) {{ if ({chosen['statement']}) {{ return 2; }} else {{ return 1; }} }}\n"
    )
    with pytest.raises(
        ValueError, match=r"other: text must occur once in csrc/cpu/x\.h, got 2 times"
    ):
        mutants.instrumented([other], source + "f(x)")
    with pytest.raises(ValueError, match="must not overlap"):
        mutants.instrumented([one, Mutant("outer", "csrc/cpu/x.h", "a + b", "0", "", "")], source)


def _verdict(monkeypatch: pytest.MonkeyPatch, *runs: tuple[int, list[str]]) -> mutants.Verdict:
    """What the judge makes of these runs: pytest's exit status, and the tests that failed."""
    results = iter(runs)
    monkeypatch.setattr(
        mutants, "run_tests", lambda *args: mutants.Run(*next(results), 1.0, "the output")
    )
    mutant = next(mutant for mutant in MUTANTS if mutant.compiled)
    return mutants.judge(mutant)


def test_verdicts(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _verdict(monkeypatch, (1, ["a::b"])).word == "killed"
    assert _verdict(monkeypatch, (0, []), (1, ["a::b"])).word == "wide"
    assert _verdict(monkeypatch, (0, []), (0, [])).word == "survived"
    assert _verdict(monkeypatch, (-11, [])).word == "killed"
    # No test collected, or files that cannot be imported, say nothing about a mutant.
    assert _verdict(monkeypatch, (5, [])).word == "broken"
    assert _verdict(monkeypatch, (2, [])).word == "broken"
    # Nor does a test that fails anyway.
    verdict = _verdict(monkeypatch, (1, ["a::b"]))
    monkeypatch.setattr(mutants, "run_tests", lambda *args: mutants.Run(1, ["a::b"], 1.0, ""))
    mutants.confirm([verdict])
    assert verdict.word == "broken"

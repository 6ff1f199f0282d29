"""Mutation testing: every small wrong change of ``mutant_table.py`` must fail some test.

    python tests/mutants.py [--jobs 2] [--only PATTERN] [--list]

The sources are copied to ``build/mutants`` first; nothing of the working tree is touched. There all
C++ mutants are compiled into one library (and one of the CUDA kernels, for the emulator), each as
``(chosen ? wrong : right)``, and an environment variable chooses at run time; a Python or Triton
mutant is a copy of the package with the text replaced. A mutant is *killed* if one of its tests in
the table fails and the same test passes without it; if all pass, a wide set of tests has a try.
Survivors, and mutants whose text or tests no longer exist, make the exit status 1.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import importlib
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from mutant_table import MUTANTS, WIDE, Mutant

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "mutants"
TREE = BUILD / "tree"
COPIED = ("kdkernels", "csrc", "tests", "benchmarks", "examples")
LIMITS = {"killed": 600, "wide": 3600}
"""Seconds for a mutant's own tests, and for the wide set, which takes minutes where it passes.

A mutant that takes longer does not end, and is killed.
"""

FORKS = multiprocessing.get_context("forkserver")
"""Most of the time of a short run of pytest is the import of what it needs."""

HEADER = """\
// Which mutant runs; written by tests/mutants.py.
#pragma once
#include <cstdlib>
namespace kdkernels {
inline const long kMutant = [] {
  const char* const chosen = std::getenv("KDKERNELS_MUTANT");
  return chosen ? std::atol(chosen) : 0L;
}();
}  // namespace kdkernels
"""

STATEMENTS = """\
import sys
from pathlib import Path
import setup
setup.instruction_sets = lambda: {"baseline": []}
print("\\n".join([*setup.preamble(), *setup.cpu_statements(Path(sys.argv[1]))]))
"""
"""The build of one instruction set: the mutants are in code that all share."""


def number(mutant: Mutant) -> int:
    """What chooses it; unchanged when others are added, so that little is compiled again."""
    return zlib.crc32(mutant.name.encode()) & 0x7FFFFFFF


def span(mutant: Mutant, source: str) -> tuple[int, int]:
    """Where the right text lies; it must be there exactly once."""
    before, right, _ = mutant.parts()
    count = source.count(mutant.context())
    if count != 1:
        raise ValueError(
            f"{mutant.name}: text must occur once in {mutant.file}, got {count} times: "
            f"{mutant.context()!r}"
        )
    begin = source.index(mutant.context()) + len(before)
    return begin, begin + len(right)


def replaced(mutant: Mutant, source: str) -> str:
    begin, end = span(mutant, source)
    return source[:begin] + mutant.wrong + source[end:]


def instrumented(mutants: Iterable[Mutant], source: str) -> str:
    """C++ with all of its mutants, of which one is chosen at run time."""
    spans = sorted((*span(mutant, source), mutant) for mutant in mutants)
    parts, at = ['#include "mutant.h"\n'], 0
    for begin, end, mutant in spans:
        if begin < at:
            raise ValueError(f"{mutant.name}: text must not overlap another mutant's")
        right, chosen = source[begin:end], f"::kdkernels::kMutant == {number(mutant)}L"
        if right.endswith(";"):
            choice = f"{{ if ({chosen}) {{ {mutant.wrong} }} else {{ {right} }} }}"
        else:
            choice = f"({chosen} ? ({mutant.wrong}) : ({right}))"
        parts += [source[at:begin], choice]
        at = end
    return "".join([*parts, source[at:]])


def copy_tree(mutants: Iterable[Mutant]) -> None:
    """The sources with their C++ mutants, written where they changed: a build is incremental."""
    by_file: dict[str, list[Mutant]] = {}
    for mutant in mutants:
        if mutant.compiled:
            by_file.setdefault(mutant.file, []).append(mutant)
    wanted = [p for p in ROOT.iterdir() if p.is_file() and p.suffix in (".py", ".toml", ".md")]
    for folder in COPIED:
        wanted += [p for p in (ROOT / folder).rglob("*") if p.is_file()]
    kept = {TREE / "csrc" / "mutant.h"}
    for path in wanted:
        name = path.relative_to(ROOT)
        if path.suffix == ".so" or "__pycache__" in name.parts:
            continue
        content = path.read_bytes()
        if name.as_posix() in by_file:
            text = instrumented(by_file[name.as_posix()], content.decode())
            up = "../" * (len(name.parts) - 2)
            content = text.replace('"mutant.h"', f'"{up}mutant.h"', 1).encode()
        write(TREE / name, content)
        kept.add(TREE / name)
    write(TREE / "csrc" / "mutant.h", HEADER.encode())
    for folder in COPIED:
        for path in (TREE / folder).rglob("*"):
            if path.is_file() and path not in kept and path.suffix not in (".so", ".pyc"):
                path.unlink()


def write(path: Path, content: bytes) -> None:
    if not path.exists() or path.read_bytes() != content:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def build(jobs: int, emulator: bool) -> None:
    """The libraries with all C++ mutants, in the copy."""
    library = TREE / "kdkernels" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    objects = BUILD / "objects"
    objects.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-c", STATEMENTS, str(library)]
    statements = subprocess.run(command, cwd=TREE, check=True, capture_output=True, text=True)
    write(objects / "build.ninja", statements.stdout.encode())
    command = [sys.executable, "-m", "ninja", "-C", str(objects), "-j", str(jobs), "--quiet"]
    subprocess.run(command, check=True)
    if emulator:
        command = [sys.executable, "-c", "import cuda_emulator; cuda_emulator.library()"]
        environment = {**os.environ, "PYTHONPATH": str(TREE)}
        subprocess.run(command, cwd=TREE / "tests", env=environment, check=True)


@dataclass
class Run:
    """What became of some tests."""

    status: int
    failed: list[str]
    seconds: float
    output: str


def run_tests(
    folder: Path, cache: Path, arguments: list[str], chosen: int = 0, limit: float = 3600
) -> Run:
    """pytest in a copy of the tree, in a process forked from one that has imported PyTorch."""
    shutil.rmtree(cache, ignore_errors=True)
    cache.mkdir(parents=True)
    command = ["-q", "-n0", "--tb=line", "-o", f"cache_dir={cache}", *arguments]
    begun = time.monotonic()
    process = FORKS.Process(target=_pytest, args=(folder, cache / "output", command, chosen))
    process.start()
    process.join(limit)
    if process.exitcode is None:
        process.kill()
        process.join()
    status = -1 if process.exitcode is None else process.exitcode
    output = (cache / "output").read_text(errors="replace")
    record = cache / "v" / "cache" / "lastfailed"
    failed = list(json.loads(record.read_text())) if record.exists() else []
    return Run(status, failed, time.monotonic() - begun, output)


def _pytest(folder: Path, output: Path, arguments: list[str], chosen: int) -> None:
    """In the forked process."""
    with output.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(folder)
    sys.path[:] = [
        str(folder),
        *(p for p in sys.path if p and ROOT not in (Path(p), Path(p).parent)),
    ]
    for name in [name for name in os.environ if name.startswith(("KDKERNELS_", "PYTEST"))]:
        del os.environ[name]
    if chosen:
        os.environ["KDKERNELS_MUTANT"] = str(chosen)
    import pytest

    sys.exit(int(pytest.main(arguments)))


def workplace(mutant: Mutant) -> Path:
    """The folder whose tests run the mutant: the copy, or one more with a package of its own."""
    if mutant.compiled:
        return TREE
    folder = BUILD / "python" / mutant.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    shutil.copytree(TREE / "kdkernels", folder / "kdkernels")
    path = folder / mutant.file
    path.write_text(replaced(mutant, path.read_text(encoding="utf-8")), encoding="utf-8")
    for other in TREE.iterdir():
        if other.name != "kdkernels":
            (folder / other.name).symlink_to(other)
    return folder


@dataclass
class Verdict:
    mutant: Mutant
    word: str  # killed, wide, survived, broken
    test: str
    seconds: float


def judge(mutant: Mutant, narrow: bool = False) -> Verdict:
    folder, cache = workplace(mutant), BUILD / "cache" / mutant.name
    seconds = 0.0
    tries = [("killed", mutant.arguments()), ("wide", list(WIDE))]
    for word, arguments in tries[:1] if narrow else tries:
        chosen = number(mutant) if mutant.compiled else 0
        run = run_tests(folder, cache, ["-x", *arguments], chosen, LIMITS[word])
        seconds += run.seconds
        if run.status < 0:
            return Verdict(mutant, word, f"ended by signal or time: {run.status}", seconds)
        if run.status == 1 and run.failed:
            return Verdict(mutant, word, run.failed[0], seconds)
        if run.status != 0:
            return Verdict(mutant, "broken", run.output[-2000:], seconds)
    return Verdict(mutant, "survived", "", seconds)


def confirm(verdicts: list[Verdict]) -> None:
    """The tests that failed must pass without a mutant."""
    tests = sorted({v.test for v in verdicts if v.word in ("killed", "wide") and "::" in v.test})
    if not tests:
        return
    run = run_tests(TREE, BUILD / "cache" / "none", tests)
    if run.status not in (0, 1):
        raise RuntimeError(run.output)
    for verdict in verdicts:
        if verdict.test in run.failed:
            verdict.word, verdict.test = "broken", f"fails without the mutant: {verdict.test}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=2, help="mutants tried at once")
    parser.add_argument("--only", default="", help="mutants whose name has this regular expression")
    parser.add_argument("--narrow", action="store_true", help="leave the wide set of tests out")
    parser.add_argument("--list", action="store_true", help="print the table and stop")
    options = parser.parse_args()
    chosen = [mutant for mutant in MUTANTS if re.search(options.only, mutant.name)]
    if options.list:
        for mutant in chosen:
            print(f"{mutant.name:44} {mutant.file}")
        return 0
    importlib.import_module("ninja")  # before anything is copied
    # Without a GPU; and the tests run side by side.
    os.environ |= {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    FORKS.set_forkserver_preload(["torch", "triton", "numpy", "hypothesis", "pytest", "xdist"])
    begun = time.monotonic()
    copy_tree(MUTANTS)
    build(options.jobs, any(mutant.emulated for mutant in chosen))
    print(f"{len(chosen)} mutants; built in {time.monotonic() - begun:.0f} s", flush=True)
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        verdicts = []
        for verdict in pool.map(functools.partial(judge, narrow=options.narrow), chosen):
            verdicts.append(verdict)
            where = verdict.test.splitlines()[-1] if verdict.test else ""
            print(
                f"{verdict.word:9} {verdict.seconds:5.1f} s  {verdict.mutant.name:42} {where}",
                flush=True,
            )
    confirm(verdicts)
    shutil.rmtree(BUILD / "python", ignore_errors=True)
    bad = [verdict for verdict in verdicts if verdict.word in ("survived", "broken")]
    print(
        f"{len(verdicts) - len(bad)} of {len(verdicts)} killed in {time.monotonic() - begun:.0f} s"
    )
    for verdict in bad:
        print(f"{verdict.word}: {verdict.mutant.name} ({verdict.mutant.file})\n{verdict.test}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())

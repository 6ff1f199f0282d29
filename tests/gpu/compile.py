"""Compile every CUDA kernel without a GPU, link the library, and judge the machine code.

    python tests/gpu/compile.py [--archs 80,90,100] [--rules kd,dist] [--jobs 2] [--output DIR]

Needs nvcc, g++ and a torch (the CPU build will do). The build is setup.py's own: the library, with
all architectures in each object. Fails where a hot kernel spills or uses local memory, where our
code draws a warning, and where the library asks for a symbol outside of the stable ABI. Kernels
with ``general`` in their name may use a stack. With ``--rules`` only their kernels are compiled
and those without a rule: every traversal in less time, and no library. Results of unchanged sources
are kept in the output folder, and the report is there too: kernels.json, kernels.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "csrc" / "cuda"), str(Path(__file__).parent)]

import build  # noqa: E402
from usage import (  # noqa: E402
    Kernel,
    count_sass,
    occupancy,
    parse_ptxas,
    read_threads,
    short_name,
    unresolved_symbols,
    unstable_symbols,
    warnings,
)

Units = Sequence[build.Unit]

CAPTURE = " > $out.log 2>&1 || { cat $out.log; exit 1; }"
HEADER = ("kernel", "arch", "regs", "smem", "stack", "spill st/ld", "threads", "blocks/SM")
SASS_HEADER = ("LDG 128/less", "STG 128/less", "bulk")


def find_cuobjdump() -> str | None:
    """The toolkit's, or the one that Triton's package brings."""
    nvcc = build.find_nvcc()
    folders = [Path(nvcc).parent] if nvcc else []
    for entry in sys.path:
        folders.append(Path(entry) / "triton" / "backends" / "nvidia" / "bin")
    for folder in folders:
        if os.access(folder / "cuobjdump", os.X_OK):
            return str(folder / "cuobjdump")
    return shutil.which("cuobjdump")


def inspect(cuobjdump: str, path: Path, output: Path) -> None:
    """Write what an object's machine code says of its kernels."""

    def run(option: str) -> list[str]:
        command = [cuobjdump, option, str(path)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        return done.stdout.splitlines()

    threads = read_threads(run("-elf"))
    rows = [
        {"symbol": key[0], "architecture": key[1], "sass": sass, "threads": threads.get(key)}
        for key, sass in count_sass(run("-sass")).items()
    ]
    output.write_text(json.dumps(rows), encoding="utf-8")


def make(
    folder: Path, library: Path, jobs: int, cuobjdump: str | None, units: Units, targets: list[str]
) -> bool:
    """Run the build of the targets, the library or objects; true if it succeeded."""
    import setup

    folder.mkdir(parents=True, exist_ok=True)
    lines = setup.preamble(CAPTURE)
    lines += setup.cuda_statements(library, ["-Xptxas", "-v"], CAPTURE)
    targets = list(targets)
    if cuobjdump:
        script = Path(__file__).resolve()
        lines += [
            "rule inspect",
            f"  command = {sys.executable} {script} --inspect {cuobjdump} $in $out",
            "  description = $out",
        ]
        for unit in units:
            targets.append(unit.object + ".json")
            reader = script.parent / "usage.py"
            lines.append(f"build {targets[-1]}: inspect {unit.object} | {script} {reader}")
    (folder / "build.ninja").write_text("\n".join([*lines, ""]), encoding="utf-8")
    # -k 0: a kernel that does not compile must not hide another.
    command = [str(build.ninja()), "-C", str(folder), "-j", str(jobs), "-k", "0", *targets]
    return subprocess.run(command, check=False).returncode == 0


def collect(folder: Path, units: Units) -> list[Kernel]:
    """The kernels of the objects that were made."""
    kernels: list[Kernel] = []
    for unit in units:
        log = folder / f"{unit.object}.log"
        if not (folder / unit.object).exists():
            continue
        compiled = parse_ptxas(log.read_text(encoding="utf-8", errors="replace"))
        inspected = folder / f"{unit.object}.json"
        rows = json.loads(inspected.read_text(encoding="utf-8")) if inspected.exists() else []
        machine = {(row["symbol"], row["architecture"]): row for row in rows}
        for kernel in compiled:
            kernel.unit = unit.name
            row = machine.get((kernel.symbol, kernel.architecture), {})
            kernel.sass, kernel.threads = row.get("sass", {}), row.get("threads")
        kernels += compiled
    names = demangle([kernel.symbol for kernel in kernels])
    for kernel, name in zip(kernels, names, strict=True):
        kernel.name = short_name(name)
    return sorted(kernels, key=lambda k: (k.unit, k.name, int(k.architecture.rstrip("af"))))


def demangle(symbols: Sequence[str]) -> list[str]:
    if not symbols or not shutil.which("c++filt"):
        return list(symbols)
    text = "\n".join(symbols)
    done = subprocess.run(["c++filt"], input=text, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def judge(kernels: Sequence[Kernel], archs: Sequence[str], units: Units) -> list[str]:
    """What is wrong with the machine code."""
    faults = []
    for k in kernels:
        label = f"{k.unit}: {k.name} (sm_{k.architecture})"
        if k.hot and (k.spill_stores or k.spill_loads):
            faults.append(f"{label} spills: {k.spill_stores} stored, {k.spill_loads} loaded")
        elif k.hot and k.stack:
            faults.append(f"{label} keeps {k.stack} bytes in local memory")
        elif k.hot and k.sass.get("local"):
            faults.append(f"{label} has {k.sass['local']} accesses to local memory")
        if k.entry and k.registers is None:
            faults.append(f"{label}: ptxas states no register count")
    for unit in units:
        of_unit = [k for k in kernels if k.unit == unit.name and k.entry]
        for arch in archs:
            if not any(k.architecture == arch for k in of_unit):
                faults.append(f"{unit.name} has no kernel for sm_{arch}")
    if not kernels:
        faults.append("nothing was compiled")
    return faults


def judge_files(folder: Path, library: Path | None, objects: Sequence[str]) -> list[str]:
    """What is wrong with the logs, the objects and the library."""
    faults = []
    nm = shutil.which("nm")
    if nm is None:
        return ["nm (binutils) is needed to check the symbols"]

    def symbols(path: Path, *options: str) -> str:
        command = [nm, *options, "--undefined-only", "--demangle", str(path)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    for name in objects:
        path = folder / name
        if not path.exists():
            faults.append(f"{name} was not built")
            continue
        log = (folder / f"{name}.log").read_text(encoding="utf-8", errors="replace")
        faults += [f"warning: {line}" for line in warnings(log, str(build.CSRC))]
        faults += [f"{name} needs {s}: not the stable ABI" for s in unstable_symbols(symbols(path))]
    if library is None:
        return faults
    dynamic = symbols(library, "--dynamic")
    faults += [f"{library.name} needs {s}: not the stable ABI" for s in unstable_symbols(dynamic)]
    faults += [f"{library.name} does not define {s}" for s in unresolved_symbols(dynamic)]
    return faults


def cells(kernel: Kernel) -> list[str]:
    held = occupancy(kernel)
    sass = kernel.sass
    spill = f"{kernel.spill_stores}/{kernel.spill_loads}"
    row = [kernel.name, kernel.architecture, "" if kernel.registers is None else kernel.registers]
    row += [kernel.shared, kernel.stack, spill, kernel.threads or ""]
    row.append(f"{held[0]} ({held[1]:.0%})" if held else "")
    if sass:
        row += [f"{sass['load128']}/{sass['load']}", f"{sass['store128']}/{sass['store']}"]
        row.append(sass["bulk"])
    else:
        row += [""] * len(SASS_HEADER)
    return [str(cell) for cell in row]


def table(kernels: Sequence[Kernel], markdown: bool) -> str:
    """Under a heading for each unit, a line for each kernel and architecture."""
    header = [*HEADER, *SASS_HEADER]
    rows = [(kernel.unit, cells(kernel)) for kernel in kernels]
    widths = [max(map(len, column)) for column in zip(header, *(r for _, r in rows), strict=True)]
    lines, unit = [], None
    for name, row in rows:
        if name != unit:
            unit = name
            lines += ["", f"## {unit}", ""]
            if markdown:
                lines += ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
            else:
                lines.append("  ".join(h.ljust(w) for h, w in zip(header, widths, strict=True)))
        if markdown:
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |")
        else:
            lines.append("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip())
    return "\n".join(lines).lstrip("\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--archs", default="80,90,100", help="default: %(default)s")
    parser.add_argument("--rules", help="of these only, such as kd,dist; default: all")
    parser.add_argument("--jobs", type=int, default=2, help="compilers at once")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "cuda-check")
    parser.add_argument("--if-available", action="store_true", help="without nvcc, do nothing")
    parser.add_argument("--inspect", nargs=3, help=argparse.SUPPRESS)  # a step of the build
    options = parser.parse_args()
    if options.inspect:
        inspect(options.inspect[0], Path(options.inspect[1]), Path(options.inspect[2]))
        return 0
    nvcc = build.find_nvcc()
    if nvcc is None:
        if options.if_available:
            print("cuda-check: skipped, there is no nvcc here")
            return 0
        print(f"cuda-check: no nvcc; {build.HOW_TO_GET}", file=sys.stderr)
        return 1
    os.environ["KDKERNELS_CUDA_ARCHS"] = options.archs
    start = time.monotonic()
    units = build.units()  # once: sources may be edited meanwhile
    asked = options.rules.split(",") if options.rules else []
    if unknown := set(asked) - {unit.rule for unit in units}:
        print(f"cuda-check: --rules must be compiled ones, got {sorted(unknown)}", file=sys.stderr)
        return 1
    units = [unit for unit in units if not asked or unit.rule in (None, *asked)]
    objects = [unit.object for unit in units]
    objects += [f"cuda/host_{path.stem}.o" for path in build.host_sources()]
    cuobjdump = find_cuobjdump()
    folder = options.output.resolve()
    library = folder / "_cuda.so"
    try:
        tools = build.toolkit(nvcc)
        names = build.architectures(tools.architectures)
        print(
            f"cuda-check: nvcc {'.'.join(map(str, tools.version))}, {' '.join(names)}", flush=True
        )
        if cuobjdump is None:
            print("cuda-check: no cuobjdump (pip install triton has one): no look at the SASS")
        targets = objects if asked else [str(library)]
        built = bool(units) and make(folder, library, options.jobs, cuobjdump, units, targets)
    except RuntimeError as error:
        print(f"cuda-check: {error}", file=sys.stderr)
        return 1
    kernels = collect(folder, units)
    faults = judge(kernels, [name.removesuffix("+PTX") for name in names], units)
    # Where the build failed the library is one of an earlier run.
    faults += judge_files(folder, library if built and not asked else None, objects)
    if not built:
        faults.append("the build failed (above)")
    if not kernels:
        print("\n".join(f"FAILED {fault}" for fault in faults), file=sys.stderr)
        return 1
    print(table(kernels, markdown=False))
    found = Counter(k.architecture for k in kernels if k.entry)
    summary = f"{len(units)} units, kernels: " + ", ".join(
        f"{count} for sm_{name}" for name, count in found.items()
    )
    report = {"nvcc": tools.version, "architectures": names, "faults": faults}
    rows = [asdict(k) | {"hot": k.hot, "occupancy": occupancy(k)} for k in kernels]
    (folder / "kernels.json").write_text(json.dumps(report | {"kernels": rows}, indent=1))
    listed = "".join(f"- {fault}\n" for fault in faults) or "No faults.\n"
    text = f"{summary}\n\n{listed}\n{table(kernels, markdown=True)}\n"
    (folder / "kernels.md").write_text(text, encoding="utf-8")
    print(f"\n{summary}; {folder}/kernels.md; {time.monotonic() - start:.0f} s")
    for fault in faults:
        print(f"FAILED {fault}", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main())

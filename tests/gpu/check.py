"""Everything that needs an NVIDIA GPU, in one command of about eight minutes.

    python3 tests/gpu/check.py [--output DIR] [--quick] [--skip-sanitizer] [--archs 90]

Builds both extensions in place, checks that every loss with CUDA kernels runs on them, runs the GPU
tests, the benchmarks, the rest of the suite on ``cuda`` and compute-sanitizer. Needs torch with
CUDA, nvcc, ninja, pybind11, pytest, pytest-xdist and pytest-timeout; no network, no make. A step
that fails stops no other. Writes check.json, check.md and check.log beside the benchmarks' results;
exits with 1 where anything failed or where no GPU test passed.

``--rehearse`` runs the same commands with stand-ins on the CPU: it tries this program, and says
nothing about a GPU.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "csrc" / "cuda"), str(Path(__file__).resolve().parent)]

import steps  # noqa: E402
from steps import Outcome, Step  # noqa: E402

BUDGET = 490.0
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
LAST = ("test_losses.py",)
"""Half of all tests: where the time is short, what is special goes first."""
LARGE = ("tests/gpu/test_gpu_large.py", "tests/test_int64.py", "tests/test_memory.py")
"""Of many gigabytes, or of memory: one after another."""
UNMARKED = ("test_triton_launch.py", "test_cuda_plan.py", "test_dispatch.py", "test_import.py",
            "test_gpu_check.py")  # fmt: skip
"""Tests without the mark that meet the GPU, its plans or this program."""


def machine() -> dict[str, Any]:
    """What the results depend on."""
    import torch

    facts: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "CUDA of torch": torch.version.cuda or "none",
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.release()}",
    }
    try:
        import triton

        facts["triton"] = triton.__version__
    except ImportError:
        facts["triton"] = "none"
    if torch.cuda.is_available():
        facts["device"] = torch.cuda.get_device_name()
        facts["devices"] = torch.cuda.device_count()
        facts["capability"] = ".".join(map(str, torch.cuda.get_device_capability()))
        facts["memory, GiB"] = round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1)
        facts["driver"] = said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    facts["nvcc"] = said("nvcc", "--version").rpartition("release ")[2].split(",")[0]
    return facts


def said(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()


def assert_native(device: str) -> int:
    """Whether every loss that has kernels runs on them; the list is that of the build."""
    import build
    from kdkernels import _dispatch, info

    info.main()
    rules = sorted({unit.rule for unit in build.units() if unit.rule})
    found = _dispatch.available(device)
    faults = {name: found[name]["native"] for name in rules if found[name]["native"]}
    for name, reasons in faults.items():
        print(f"{name} does not run on {device} natively: {'; '.join(reasons)}")
    if device == "cuda":
        from kdkernels import native

        module = native.extension("cuda")
        print(f"device_info {module.device_info(0) if module else native.reason('cuda')}")
    print(
        f"native on {device}: {len(rules) - len(faults)} of {len(rules)} losses with CUDA kernels"
    )
    return 1 if faults or not rules else 0


def build_in_place(jobs: int) -> int:
    """setup.py's build; where setuptools is too old for pyproject.toml, its command alone."""
    os.environ["MAX_JOBS"] = str(jobs)
    began = time.time()
    done = subprocess.run([sys.executable, "setup.py", "build_ext", "--inplace"], cwd=ROOT)
    written = (ROOT / "build").glob("temp*/build.ninja")
    if done.returncode == 0 or any(path.stat().st_mtime >= began for path in written):
        return done.returncode
    print("once more, without pyproject.toml", flush=True)
    os.chdir(ROOT)
    from setuptools import Distribution, Extension

    import setup

    extension = Extension("kdkernels._C", [])
    command = setup.NinjaBuild(
        Distribution({"name": "kdkernels", "packages": ["kdkernels"], "ext_modules": [extension]})
    )
    command.inplace = True
    command.ensure_finalized()
    command.run()
    return 0


def pytest_command(processes: int, *arguments: str) -> list[str]:
    return [
        *(sys.executable, "-m", "pytest", "-q", "-rfEs", "--tb=short", "--show-capture=stderr"),
        *("-p", "no:cacheprovider", "-p", "budget", "--timeout=120", "--timeout-method=thread"),
        *("--benchmark-disable", "-n", str(processes), "--dist=worksteal", "--color=no"),
        *arguments,
    ]


def sanitizer() -> str | None:
    """compute-sanitizer, on the path or beside nvcc."""
    import build

    nvcc = build.find_nvcc()
    folders = [Path(nvcc).resolve().parent] if nvcc else []
    for folder in (*folders, Path("/usr/local/cuda/bin")):
        if (folder / "compute-sanitizer").exists():
            return str(folder / "compute-sanitizer")
    return shutil.which("compute-sanitizer")


def plan(options: argparse.Namespace) -> list[list[Step]]:
    """Groups of steps: one group after another, the steps of a group side by side."""
    me, python = str(Path(__file__).resolve()), sys.executable
    fake, quick = options.rehearse, options.quick
    cores = os.cpu_count() or 2
    device = "cpu" if fake else "cuda"
    build_variables = {"KDKERNELS_NATIVE": "1", "KDKERNELS_CUDA": "0" if fake else "1"}
    if options.archs:
        build_variables["KDKERNELS_CUDA_ARCHS"] = options.archs
    gpu = {"KDKERNELS_REQUIRE_GPU": "0" if fake else "1", "OMP_NUM_THREADS": "1",
           "TORCHINDUCTOR_COMPILE_THREADS": "1"}  # fmt: skip
    if fake:
        gpu |= {"KDKERNELS_GPU_REHEARSAL": "1", "TRITON_INTERPRET": "1"}
    marked = [] if fake else ["-m", "gpu"]
    some = 2 if fake else max(2, min(8, cores - 4))
    many = 2 if fake else max(2, min(12, cores - 3))
    bench = [python, "-m", "benchmarks.gpu", "--output", str(options.output)]
    bench += ["--quick"] if quick else ["--seconds", "140"]
    bench += ["--rehearse"] if fake else []
    warm = [
        Step(
            f"compile {part}", [python, "-m", "benchmarks.gpu", "--warm", f"{part}/3",
                                *(["--rehearse"] if fake else [])],
            110, steps.judge_plain, helper=True,
        )
        for part in range(0 if quick else 3)
    ]  # fmt: skip
    files = sorted((ROOT / "tests").glob("test_*.py"), key=lambda p: (p.name in LAST, p.name))
    names = [str(p) for p in files if f"tests/{p.name}" not in LARGE]
    if fake or quick:
        names = [n for n in names if Path(n).name in ("test_golden.py", "test_upstream.py")]
    others = UNMARKED[2:] if fake else UNMARKED
    unmarked = [str(path) for path in (ROOT / "tests" / n for n in others) if path.exists()]
    quiet = {"OMP_NUM_THREADS": "1"}
    suite = [
        Step("GPU suite", pytest_command(many, *marked, *names), 230, steps.judge_pytest, gpu),
        Step("unmarked tests", pytest_command(2, *unmarked), 180, steps.judge_pytest, quiet),
    ]  # fmt: skip
    large = [str(ROOT / name) for name in (LARGE[:1] if fake or quick else LARGE)]
    without = f"--ignore={ROOT / LARGE[0]}"
    return [
        [Step("build", [python, me, "--build"], 200, steps.judge_plain, build_variables)],
        [Step("native", [python, me, "--assert-native", device], 60, steps.judge_plain)],
        [Step("GPU tests", pytest_command(some, *marked, str(ROOT / "tests" / "gpu"), without), 150,
              steps.judge_pytest, gpu),
         Step("GPU large", pytest_command(1, *marked, *large), 150, steps.judge_pytest, gpu),
         *warm],
        [Step("benchmarks", bench, 60 if quick else 175, steps.judge_plain)],
        [*suite, *([] if options.skip_sanitizer else sanitizers(options))],
    ]  # fmt: skip


def sanitizers(options: argparse.Namespace) -> list[Step]:
    script = [sys.executable, str(Path(__file__).resolve().parent / "sanitized.py")]
    script += ["--quick"] if options.quick else []
    quiet = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "OMP_NUM_THREADS": "1"}
    if options.rehearse:
        return [Step("sanitizer stand-in", [*script, "--cpu"], 60, steps.judge_plain, quiet)]
    program = sanitizer()
    if program is None:
        print("compute-sanitizer: not found, its steps are left out")
        return []
    found = []
    for tool in TOOLS:
        # No choice of kernels: initcheck has to see every one that writes, torch's too.
        command = [program, "--tool", tool, "--error-exitcode", "99", *script]
        found.append(Step(tool, command, 150, steps.judge_sanitizer, quiet))
    return found


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "gpu-check")
    parser.add_argument("--quick", action="store_true", help="a few minutes less of each step")
    parser.add_argument("--skip-sanitizer", action="store_true")
    parser.add_argument("--archs", help="to compile for, such as 90 (default: this device's)")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds for everything")
    parser.add_argument("--rehearse", action="store_true", help="stand-ins on the CPU")
    parser.add_argument("--build", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--assert-native", metavar="DEVICE", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.output = options.output.resolve()
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.build:
        return build_in_place(os.cpu_count() or 2)
    if options.assert_native:
        return assert_native(options.assert_native)
    import torch

    if not torch.cuda.is_available() and not options.rehearse:
        print(
            "gpu-check: there is no CUDA device here, so nothing was checked; run it on a machine "
            "with an NVIDIA GPU (--rehearse tries the program itself)",
            file=sys.stderr,
        )
        return 1
    start = time.monotonic()
    facts: dict[str, Any] = {"rehearsal": options.rehearse, "quick": options.quick}
    facts["machine"] = machine()
    print(", ".join(f"{key} {value}" for key, value in facts["machine"].items()), flush=True)
    if not options.archs and not options.rehearse:
        options.archs = "".join(map(str, torch.cuda.get_device_capability()))
    paths = [str(ROOT), str(ROOT / "tests" / "gpu"), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "PYTHONFAULTHANDLER": "1",
        "PYTHONUNBUFFERED": "1",
    }
    os.chdir(ROOT)
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as name:
        logs = Path(name)
        for group in plan(options):
            left = options.budget - (time.monotonic() - start)
            if left < 15:
                outcomes += [Outcome(s.name, steps.LATE, summary="not begun") for s in group]
            else:
                outcomes += steps.run_group(group, logs, left, environment)
            facts["seconds"] = time.monotonic() - start
            report = steps.write(options.output, logs, outcomes, facts)
    print("\n" + steps.markdown(report))
    print(f"wrote {options.output}/check.md, check.json, check.log; {report['seconds']:.0f} s")
    return 1 if report["faults"] else 0


if __name__ == "__main__":
    raise SystemExit(main())

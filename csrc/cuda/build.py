"""The facts of the CUDA build, each once: the toolkit, what is compiled, for which GPUs, and how.

setup.py builds ``kdkernels._cuda`` from these statements, and tests/gpu/compile.py checks the same
build on machines without a GPU. Sources are found by name: a new rule or kernel edits nothing here.

Environment: ``CUDA_HOME`` or ``CUDA_PATH`` (the toolkit), ``KDKERNELS_CUDA_ARCHS`` (such as
``90`` or ``80 90 100+PTX``, or ``all``), ``KDKERNELS_CUDA_LINEINFO=1`` (source lines for
profilers).
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

CSRC = Path(__file__).resolve().parents[1]

if TYPE_CHECKING:
    from kdkernels import _toolchain as toolchain
else:  # by its path: the package itself would import torch, which a build may not have
    _spec = importlib.util.spec_from_file_location(
        "kdkernels_toolchain", CSRC.parent / "kdkernels" / "_toolchain.py"
    )
    toolchain = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(toolchain)

TRAVERSALS = {
    "row": ("divergence", "decoupled"),
    "binary": ("binary",),
    "correlation": ("correlation",),
    "factor": ("factor",),
    "tuple": ("tuple",),
    "topk": ("sparse",),
}
"""A unit's name begins with one of these words; it is compiled for each rule of these families."""

NOT_RULES = ("math", "elementary", "contract")
"""Headers of csrc/rules that rules are written in."""

ARCHITECTURES = ("80", "90", "100", "120")
"""Ampere to Blackwell. Machine code runs on later GPUs of its generation: 80 on 86 and 89 too."""

OLDEST = 80
"""The kernels use what came with this compute capability."""

HOW_TO_GET = toolchain.HOW_TO_GET_NVCC
find_nvcc = toolchain.find_nvcc
ninja = toolchain.ninja


class Toolkit(NamedTuple):
    nvcc: str
    version: tuple[int, int]
    include: Path
    library: Path
    architectures: tuple[str, ...]
    """What this nvcc compiles for, such as 80."""


class Unit(NamedTuple):
    """One compilation by nvcc."""

    name: str
    source: Path
    rule: str | None

    @property
    def object(self) -> str:
        return f"cuda/{self.name}.o"


def toolkit(nvcc: str) -> Toolkit:
    """What ``nvcc`` says of itself; its own path may be a wrapper script's."""

    def ask(*arguments: str) -> str:
        done = subprocess.run([nvcc, *arguments], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{nvcc} {' '.join(arguments)} failed: {done.stderr.strip()}")
        return done.stdout + done.stderr

    release = re.search(r"release (\d+)\.(\d+)", ask("--version"))
    if release is None:
        raise RuntimeError(f"{nvcc} --version names no release")
    plan = ask("--dryrun", "-c", "none.cu")  # prints its steps and reads nothing
    top = re.search(r"TOP=(\S+)", plan)
    root = Path(top.group(1)) if top else Path(nvcc).resolve().parents[1]

    def folder(kind: str, option: str, usual: Sequence[str], contains: str) -> Path:
        found = [Path(path) for path in re.findall(rf'"{option}([^"]+)"', plan)]
        for path in [*found, *(root / name for name in usual)]:
            if (path / contains).is_file():
                return path.resolve()
        raise RuntimeError(f"the CUDA toolkit of {nvcc} has no {contains} ({kind})")

    return Toolkit(
        nvcc,
        (int(release.group(1)), int(release.group(2))),
        folder("headers", "-I", ["include"], "cuda_runtime.h"),
        folder("runtime", "-L", ["lib64", "lib"], "libcudart_static.a"),
        tuple(re.findall(r"\bsm_(\d+)", ask("--list-gpu-code"))),
    )


def parse_architectures(text: str) -> list[str]:
    """The elements of ``KDKERNELS_CUDA_ARCHS``, such as 80, 90a or 100+PTX, without repetition.

    They are separated by spaces, commas or semicolons; ``9.0`` and ``sm_90`` are written as well.
    """
    chosen = []
    for word in re.split(r"[\s,;]+", text.strip()):
        match = re.fullmatch(r"(?:sm_)?(\d+)\.?(\d)([af]?)(\+PTX)?", word)
        if match is None or int(match.group(1) + match.group(2)) < OLDEST:
            raise RuntimeError(
                f"KDKERNELS_CUDA_ARCHS must be 'all' or compute capabilities from {OLDEST} on, "
                f"such as '80 90 100+PTX', got {text!r}"
            )
        chosen.append("".join(part or "" for part in match.groups()))
    return list(dict.fromkeys(chosen))


def visible_gpus() -> list[str]:
    """The compute capabilities of this machine's GPUs, such as 90, from the driver's own tool."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return []
    found = re.findall(r"^(\d+)\.(\d)$", done.stdout, re.MULTILINE)
    return sorted({major + minor for major, minor in found}, key=int)


def architectures(
    available: Sequence[str],
    environment: Mapping[str, str] = os.environ,
    gpus: Callable[[], Sequence[str]] = visible_gpus,
) -> list[str]:
    """What to compile for: what is asked for, or else this machine's GPUs, or else all.

    All are with PTX of the newest, which the drivers of later GPUs compile.
    """
    text = environment.get("KDKERNELS_CUDA_ARCHS", "").strip()
    if text and text != "all":
        return parse_architectures(text)
    own = [] if text else [name for name in gpus() if int(name) >= OLDEST]
    if own and all(name in available for name in own):
        return own
    known = [name for name in ARCHITECTURES if name in available]
    if not known:
        raise RuntimeError(f"nvcc compiles for none of sm_{', sm_'.join(ARCHITECTURES)}")
    return [*known[:-1], known[-1] + "+PTX"]


def gencode(names: Sequence[str]) -> list[str]:
    """nvcc's options for these architectures."""
    options = []
    for name in names:
        number = name.removesuffix("+PTX")
        options.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if name.endswith("+PTX"):
            options.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return options


def rules(csrc: Path = CSRC) -> dict[str, str]:
    """Name and family of each rule, which its header states."""
    found = {}
    for path in headers(csrc):
        families = re.findall(r"family = Family::(\w+)", path.read_text(encoding="utf-8"))
        if len(families) != 1:
            raise RuntimeError(f"{path} must state one 'family = Family::NAME'")
        found[path.stem] = families[0]
    return found


def headers(csrc: Path = CSRC) -> list[Path]:
    """The files of the rules."""
    return [p for p in sorted((csrc / "rules").glob("*.h")) if p.stem not in NOT_RULES]


def without_kernels(csrc: Path = CSRC) -> set[str]:
    """Rules that CUDA does not compile: their headers say ``cuda = false``, and why."""
    return {p.stem for p in headers(csrc) if "bool cuda = false" in p.read_text(encoding="utf-8")}


def units(csrc: Path = CSRC) -> list[Unit]:
    """What nvcc compiles: each file, once for each rule if it is a traversal."""
    found = []
    excused = without_kernels(csrc)
    for path in sorted((csrc / "cuda").glob("*.cu")):
        word, separator, _ = path.stem.partition("_")
        if not separator or word not in TRAVERSALS:
            found.append(Unit(path.stem, path, None))
            continue
        for rule, family in rules(csrc).items():
            if family in TRAVERSALS[word] and rule not in excused:
                found.append(Unit(f"{path.stem}.{rule}", path, rule))
    return found


def host_sources(csrc: Path = CSRC) -> list[Path]:
    return sorted((csrc / "cuda").glob("*.cpp"))


def host_macros(csrc: Path = CSRC) -> list[str]:
    """Macros such as ``KDK_ROW_RULES(X)=X(kd) X(dkd)``: the rules that have kernels."""
    compiled = units(csrc)
    macros = []
    for word in TRAVERSALS:
        named = [u.rule for u in compiled if u.rule and u.source.stem.startswith(word + "_")]
        listed = " ".join(f"X({rule})" for rule in dict.fromkeys(named))
        macros.append(f"KDK_{word.upper()}_RULES(X)={listed}")
    return macros


def compression(version: tuple[int, int]) -> list[str]:
    """nvcc's options that make machine code a third as large.

    The smallest form, one tenth less, is read by drivers of CUDA 12.4 and newer: it is for toolkits
    that ask for newer ones anyway.
    """
    flags = ["-Xfatbin", "-compress-all"]
    return [*flags, "-compress-mode=size"] if version >= (13, 0) else flags


def nvcc_flags(names: Sequence[str], environment: Mapping[str, str] = os.environ) -> list[str]:
    flags = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "--extended-lambda"]
    flags += ["-Xcompiler", "-fPIC,-fvisibility=hidden"]
    if environment.get("KDKERNELS_CUDA_LINEINFO") == "1":
        flags.append("-lineinfo")
    host = environment.get("CXX", "")
    if host and len(host.split()) == 1:  # nvcc takes no launcher such as ccache before a compiler
        flags.append(f"-ccbin={host}")
    return [*flags, *gencode(names)]


def missing(torch_cuda: str | None) -> list[str]:
    """What a build of kernels that can run lacks here; the argument is ``torch.version.cuda``."""
    lacks = []
    if torch_cuda is None:
        lacks.append("a torch built with CUDA (this one is not)")
    if find_nvcc() is None:
        lacks.append(f"nvcc: {HOW_TO_GET}")
    if not units():
        lacks.append("kernels in csrc/cuda")
    return lacks


def ahead_of_torch(version: tuple[int, int], torch_cuda: str | None) -> str:
    """What to say of an nvcc that asks more of the driver than torch does; empty where it does not.

    Within a major version of CUDA older drivers run what newer toolkits make.
    """
    if torch_cuda is None or version[0] <= toolchain.release(torch_cuda)[0]:
        return ""
    major = toolchain.release(torch_cuda)[0]
    return (
        f"nvcc is of CUDA {version[0]}.{version[1]}, and this torch of {torch_cuda}: the kernels "
        f"need a driver that knows CUDA {version[0]}. An older one is enough for torch; Triton's "
        f"kernels run there. The nvcc of a CUDA {major} (CUDA_HOME) makes kernels for both"
    )


def ninja_statements(
    output: Path,
    torch_libraries: Path,
    tools: Toolkit,
    names: Sequence[str],
    extra: Sequence[str] = (),
    capture: str = "",
    sanitizer: str | None = None,
) -> list[str]:
    """Statements that make ``output``; they follow setup.py's, whose rule ``compile`` and variables
    ``cxx``, ``flags`` and ``host`` they use. ``capture`` is what follows a command of nvcc."""
    version = ".".join(map(str, tools.version))
    defines = [
        "-DUSE_CUDA",  # torch's stable headers declare the functions for streams then
        f'-DKDK_CUDA_TOOLKIT=\\"{version}\\"',
        f"'-DKDK_CUDA_ARCHS=\"{' '.join(names)}\"'",
        *(f"'-D{macro}'" for macro in host_macros()),
    ]
    link = ["-shared", f"-L{torch_libraries}", "-ltorch_cpu"]
    if (torch_libraries / "libtorch_cuda.so").exists():
        link.append("-ltorch_cuda")
    # The runtime is linked statically, so that it need not be torch's version, and kept private.
    link += [f"-L{tools.library}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
    link += ["-Wl,--exclude-libs,libcudart_static.a"]
    if sanitizer:
        link.append(f"-fsanitize={sanitizer}")
    lines = [
        f"nvcc = {tools.nvcc}",
        f"nvccflags = {' '.join([*nvcc_flags(names), *compression(tools.version), *extra])}",
        f"cudahost = $host -isystem {tools.include} {' '.join(defines)}",
        "rule nvcc",
        f"  command = $nvcc $nvccflags $extra -MMD -MF $out.d -c $in -o $out{capture}",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = $out",
        "rule linkcuda",
        f"  command = $cxx $in {' '.join(link)} -o $out",
        "  description = $out",
    ]
    objects = []
    for unit in units():
        define = f"-DKDK_RULE={unit.rule}" if unit.rule else ""
        lines += [f"build {unit.object}: nvcc {unit.source}", f"  extra = {define}"]
        objects.append(unit.object)
    for path in host_sources():
        # A name of its own: plan.cpp and the CPU library's files have objects in the folder above.
        objects.append(f"cuda/host_{path.stem}.o")
        lines += [f"build {objects[-1]}: compile {path}", "  extra = $cudahost"]
    lines.append(f"build {output}: linkcuda {' '.join(objects)}\n")
    return lines

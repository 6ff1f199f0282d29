"""What ptxas, cuobjdump and nm say of compiled kernels, read into records; no judgement."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass
class Kernel:
    """One kernel, or function that a kernel calls, for one architecture. Sizes are in bytes."""

    symbol: str
    architecture: str
    unit: str = ""
    name: str = ""
    entry: bool = False
    registers: int | None = None
    shared: int = 0
    stack: int = 0
    spill_stores: int = 0
    spill_loads: int = 0
    threads: int | None = None
    sass: dict[str, int] = field(default_factory=dict)

    @property
    def hot(self) -> bool:
        """General kernels serve what no other does and may keep arrays in memory."""
        return "general" not in (self.name or self.symbol)


def parse_ptxas(text: str) -> list[Kernel]:
    """The kernels and functions of ``ptxas -v``, whose lines concern the one last named."""
    found: dict[tuple[str, str], Kernel] = {}
    architecture, entry, current = "", None, None
    for line in text.splitlines():
        if match := re.search(r"Compiling entry function '(\S+)' for 'sm_(\w+)'", line):
            architecture = match.group(2)
            key = (match.group(1), architecture)
            entry = current = found.setdefault(key, Kernel(*key))
            entry.entry = True
        elif match := re.search(r"Function properties for (\S+)", line):
            key = (match.group(1), architecture)
            current = found.setdefault(key, Kernel(*key))
        elif match := re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line
        ):
            if current is not None:
                numbers = (int(number) for number in match.groups())
                current.stack, current.spill_stores, current.spill_loads = numbers
        elif (match := re.search(r"Used (\d+) registers(.*)", line)) and entry is not None:
            entry.registers = int(match.group(1))
            shared = re.search(r"(\d+)(?:\+\d+)? bytes smem", match.group(2))
            entry.shared = int(shared.group(1)) if shared else 0
            # Includes the frames of functions that it calls.
            total = re.search(r"(\d+) bytes cumulative stack size", match.group(2))
            entry.stack = max(entry.stack, int(total.group(1)) if total else 0)
    return list(found.values())


def warnings(text: str, csrc: str) -> list[str]:
    """Warnings about our files, from nvcc, the C++ compiler or ptxas; each once.

    Of nvcc's own (such as an architecture that a later nvcc will drop) none is about our code.
    """
    ours = [
        line.strip()
        for line in text.splitlines()
        if re.search(r"\bwarning\b", line)
        and (csrc in line or re.match(r"(ptxas|nvlink)\s+warning", line))
    ]
    return list(dict.fromkeys(ours))


# Instructions that access memory, by what they say of the kernel.
CLASSES = {
    "load128": r"LDG\.\S*(128|256)",
    "load": r"LDG\b",
    "store128": r"STG\.\S*(128|256)",
    "store": r"STG\b",
    "bulk": r"UBLKCP",
    "generic": r"(LD|ST)(\.|$)",  # the address space was lost, or is another block's shared memory
    "local": r"(LDL|STL)\b",
}


def count_sass(lines: Iterable[str]) -> dict[tuple[str, str], dict[str, int]]:
    """For each (symbol, architecture) of ``cuobjdump -sass``: instructions by class.

    The first class that an instruction fits is its own: ``load`` are the loads below 128 bits.
    """
    patterns = {name: re.compile(pattern) for name, pattern in CLASSES.items()}
    instruction = re.compile(
        r"\s+/\*[0-9a-f]{4,}\*/\s+\{?\s*(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.a-z]*)"
    )
    counts: dict[tuple[str, str], dict[str, int]] = {}
    architecture, current = "", None
    for line in lines:
        if match := instruction.match(line):
            if current is None:
                continue
            for name, pattern in patterns.items():
                if pattern.match(match.group(1)):
                    current[name] += 1
                    break
        elif match := re.search(r"code for sm_(\w+)", line):
            architecture, current = match.group(1), None
        elif match := re.search(r"Function : (\S+)", line):
            current = counts.setdefault((match.group(1), architecture), dict.fromkeys(CLASSES, 0))
    return counts


def read_threads(lines: Iterable[str]) -> dict[tuple[str, str], int]:
    """For each (symbol, architecture) of ``cuobjdump -elf``: what __launch_bounds__ promises."""
    threads: dict[tuple[str, str], int] = {}
    architecture, symbol, wanted = "", "", False
    for line in lines:
        if match := re.match(r"arch = sm_(\w+)", line):
            architecture = match.group(1)
        elif match := re.match(r"\.(?:nv\.info\.(\S+)|\S+)\s*$", line):
            symbol = match.group(1) or ""
        elif "Attribute:" in line:
            wanted = "EIATTR_MAX_THREADS" in line
        elif wanted and symbol and (match := re.match(r"\s*Value:\s*(.*)", line)):
            product = 1
            for size in re.findall(r"0x[0-9a-f]+", match.group(1)):
                product *= int(size, 16)
            threads[symbol, architecture], wanted = product, False
    return threads


def short_name(demangled: str) -> str:
    """``row_kernel<float, 3>`` of ``void kdkernels::cuda::row_kernel<float, 3>(float const*)``."""
    text = re.sub(r"\(anonymous namespace\)::", "", demangled)
    text = re.sub(r"\bkdkernels::(?:\w+::)*", "", text)
    depth, end = 0, len(text)
    for index, letter in enumerate(text):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            end = index
            break
    text = text[:end]
    head = text.partition("<")[0]
    return text[head.rfind(" ") + 1 :]


UNSTABLE = re.compile(r"\b(at|c10|torch)::")
OURS = re.compile(r"\bkdkernels::")
RUNTIME = re.compile(r"(__)?cu(da)?[A-Z]\w*$")


def undefined(nm: str) -> list[str]:
    """The symbols of ``nm --undefined-only --demangle``."""
    matches = (re.match(r"[0-9a-f]*\s+[Uvw] (.+)", line) for line in nm.splitlines())
    return [match.group(1) for match in matches if match]


def unstable_symbols(nm: str) -> list[str]:
    """Undefined symbols of torch's C++ namespaces, which change with its version; the stable ABI
    (aoti_torch_*, torch_*) has C names."""
    return [symbol for symbol in undefined(nm) if UNSTABLE.search(symbol)]


def unresolved_symbols(nm: str) -> list[str]:
    """Undefined symbols of a library that it should define: our functions, CUDA's runtime."""
    return [s for s in undefined(nm) if OURS.search(s) or RUNTIME.match(s.partition("@")[0])]


# What an SM shares among blocks (as CUDA's occupancy calculator has it), by architecture: threads,
# blocks, and KiB of shared memory.
LIMITS = {
    "80": (2048, 32, 164),
    "86": (1536, 16, 100),
    "89": (1536, 24, 100),
    "90": (2048, 32, 228),
    "100": (2048, 32, 228),
    "103": (2048, 32, 228),
}
REGISTERS = 65536
QUARTERS = 4  # schedulers of an SM, each with its share of the registers
GRAIN = 256  # a warp takes registers in multiples of this
RESERVED = 1024  # bytes of shared memory that the system takes for each block


def occupancy(kernel: Kernel) -> tuple[int, float] | None:
    """Blocks that an SM holds, and their share of its threads; no dynamic shared memory counted."""
    limits = LIMITS.get(kernel.architecture.rstrip("af"))
    if kernel.threads is None or kernel.registers is None or limits is None:
        return None
    threads, blocks, shared = limits
    warps = -(-kernel.threads // 32)
    of_warp = max(-(-kernel.registers * 32 // GRAIN) * GRAIN, GRAIN)
    held = REGISTERS // QUARTERS // of_warp * QUARTERS
    blocks = min(
        blocks,
        threads // (warps * 32),
        held // warps,
        shared * 1024 // (kernel.shared + RESERVED),
    )
    return blocks, blocks * warps * 32 / threads

"""The CUDA build's facts, and the readers that judge it: texts recorded from the tools, no nvcc."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import compile as check
import pytest

import build
import usage
from usage import Kernel

ROOT = Path(__file__).resolve().parents[1]

# nvcc 13.0 on a kernel with room for its values, one with 2048 threads' worth of registers for 96
# values, one with an array indexed at run time, and one that calls a function.
PTXAS = """\
/src/csrc/cuda/row_bad.cu(12): warning #177-D: variable "unused" was declared but never referenced
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z5callsPfi' for 'sm_80'
ptxas info    : Function properties for _Z5callsPfi
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 10 registers, used 0 barriers, 364 bytes cmem[0]
ptxas info    : Compile time = 3.058 ms
ptxas info    : Function properties for _Z4slowfi
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Compiling entry function '_Z9row_stackPKfPfii' for 'sm_80'
ptxas info    : Function properties for _Z9row_stackPKfPfii
    2048 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 31 registers, used 0 barriers, 2048 bytes cumulative stack size, 376 bytes cmem[0]
ptxas info    : Compiling entry function '_Z9row_spillPKfPfi' for 'sm_80'
ptxas info    : Function properties for _Z9row_spillPKfPfi
    1336 bytes stack frame, 1652 bytes spill stores, 2236 bytes spill loads
ptxas info    : Used 32 registers, used 0 barriers, 1336 bytes cumulative stack size, 372 bytes cmem[0]
ptxas info    : Compiling entry function '_Z10row_kernelPKfPfi' for 'sm_90'
ptxas info    : Function properties for _Z10row_kernelPKfPfi
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 14 registers, used 1 barriers, 128 bytes smem
"""  # noqa: E501

SASS = """\
Fatbin elf code:
arch = sm_90
	code for sm_90
		Function : _Z10row_kernelPKfPfi
        /*0030*/         @!P0 LDG.E.128.CONSTANT R4, desc[UR6][R4.64] ;  /* 0x0000000604048981 */
  /* 0x0000000604048981 */
        /*0040*/                   LDG.E R10, [R14.64] ;  /* 0x0000000604048981 */
        /*0050*/              @!P0 STG.E.EF.128 desc[UR6][R2.64], R4 ;  /* 0x0000000604048981 */
        /*0060*/                   STG.E.U16 desc[UR6][R2.64], R4 ;  /* 0x0000000604048981 */
        /*0070*/                   LDS.128 R4, [R2] ;  /* 0x0000000604048981 */
        /*0080*/                   UBLKCP.S.G [UR8], [UR4], UR5 ;  /* 0x0000000604048981 */
        /*0090*/                   LD.E R3, desc[UR4][R2.64] ;  /* 0x0000000604048981 */
		Function : _Z9row_spillPKfPfi
        /*0000*/                   STL.64 [R1+0x8], R2 ;  /* 0x0000000604048981 */
       /*10010*/                   LDL R0, [R1] ;  /* 0x0000000604048981 */
"""

ELF = """\
Fatbin elf code:
================
arch = sm_90
.nv.info
	<0x1>
	Attribute:	EIATTR_REGCOUNT
	Format:	EIFMT_SVAL
	Value:	function: _Z10row_kernelPKfPfi(0xf)	register count: 14
.nv.info._Z10row_kernelPKfPfi
	<0x1>
	Attribute:	EIATTR_MAXREG_COUNT
	Format:	EIFMT_HVAL
	Value:	0xff
	<0x10>
	Attribute:	EIATTR_MAX_THREADS
	Format:	EIFMT_SVAL
	Value:	0x100 0x1 0x1 
"""

NM = """\
                 U aoti_torch_get_current_cuda_stream
                 U torch_call_dispatcher
                 U c10::Error::what() const
                 U at::cuda::getCurrentCUDAStream(signed char)
                 w std::vector<torch::jit::Value*, std::allocator<torch::jit::Value*> >::~vector()
                 U kdkernels::cuda::launch_row(int)
                 U cudaLaunchKernel@libcudart.so.13
                 U __cudaRegisterFatBinary
                 U cuGetErrorString
                 U format::c11::text()
                 U custom_name
"""


def kernels() -> dict[str, Kernel]:
    found = {kernel.symbol: kernel for kernel in usage.parse_ptxas(PTXAS)}
    for kernel in found.values():
        kernel.name = kernel.symbol
    return found


def test_every_rule_is_compiled_or_excused() -> None:
    rules = build.rules()
    headers = {path.stem for path in (ROOT / "csrc" / "rules").glob("*.h")}
    assert set(rules) == headers - set(build.NOT_RULES)
    compiled = {unit.rule for unit in build.units() if unit.rule}
    assert compiled | build.without_kernels() == set(rules)
    assert not compiled & build.without_kernels()
    macros = " ".join(build.host_macros())
    assert {match for match in re.findall(r"X\((\w+)\)", macros)} == compiled


def test_every_family_has_one_traversal() -> None:
    named = [family for families in build.TRAVERSALS.values() for family in families]
    header = (ROOT / "csrc" / "rules" / "math.h").read_text(encoding="utf-8")
    declared = re.search(r"enum class Family \{([^}]*)\}", header)
    assert declared is not None
    assert sorted(named) == sorted(re.findall(r"\w+", declared.group(1)))


def test_a_unit_has_a_rule_where_its_source_uses_one() -> None:
    units = build.units()
    assert len({unit.name for unit in units}) == len(units)
    for unit in units:
        text = unit.source.read_text(encoding="utf-8")
        uses = "KDK_RULE" in text or "unit.cuh" in text
        assert uses == (unit.rule is not None), unit.name


def test_units_of_a_tree(tmp_path: Path) -> None:
    for name, family in ("a", "divergence"), ("b", "tuple"):
        header = tmp_path / "rules" / f"{name}.h"
        header.parent.mkdir(exist_ok=True)
        header.write_text(f"static constexpr Family family = Family::{family};")
    (tmp_path / "cuda").mkdir()
    for name in "row_x.cu", "row_y.cu", "tuple_z.cu", "scale.cu", "plan.cpp", "notes.cuh":
        (tmp_path / "cuda" / name).touch()
    names = [unit.name for unit in build.units(tmp_path)]
    assert names == ["row_x.a", "row_y.a", "scale", "tuple_z.b"]
    macros = build.host_macros(tmp_path)
    assert "KDK_ROW_RULES(X)=X(a)" in macros
    assert "KDK_FACTOR_RULES(X)=" in macros
    text = (
        "static constexpr Family family = Family::divergence; static constexpr bool cuda = false;"
    )
    (tmp_path / "rules" / "d.h").write_text(text)
    assert [unit.name for unit in build.units(tmp_path)] == names
    assert build.without_kernels(tmp_path) == {"d"}
    (tmp_path / "rules" / "c.h").touch()
    with pytest.raises(RuntimeError, match=r"c\.h must state one"):
        build.units(tmp_path)


def test_calls_by_address_give_the_interpreter_away() -> None:
    """Each before it asks the device for anything."""
    text = (ROOT / "csrc" / "cuda" / "ops_eager.cpp").read_text(encoding="utf-8")
    bound = re.findall(r'm\.def\("\w+", &(\w+)', text)
    assert len(bound) == 3
    for name in bound:
        body = text.split(f"void {name}(")[1].split("\n}\n")[0]
        released, asked = body.find("gil_scoped_release"), body.find("launches(device")
        assert 0 <= released < asked, name


def test_nvcc_is_that_of_cuda_home(tmp_path: Path) -> None:
    nvcc = tmp_path / "bin" / "nvcc"
    assert build.find_nvcc({"CUDA_HOME": str(tmp_path), "PATH": os.environ["PATH"]}) is None
    nvcc.parent.mkdir()
    nvcc.touch(mode=0o755)
    assert build.find_nvcc({"CUDA_HOME": str(tmp_path)}) == str(nvcc)
    assert build.find_nvcc({"PATH": str(nvcc.parent)}) == str(nvcc)


def test_ptxas_numbers() -> None:
    found = kernels()
    assert len(found) == 5
    spilling = found["_Z9row_spillPKfPfi"]
    assert (spilling.spill_stores, spilling.spill_loads, spilling.stack) == (1652, 2236, 1336)
    row = found["_Z10row_kernelPKfPfi"]
    assert (row.architecture, row.registers, row.shared, row.stack) == ("90", 14, 128, 0)
    assert row.entry and not found["_Z4slowfi"].entry


def test_spills_and_stacks_are_faults() -> None:
    faults = check.judge(list(kernels().values()), [], [])
    text = "\n".join(faults)
    assert "row_spillPKfPfi (sm_80) spills: 1652 stored, 2236 loaded" in text
    assert "row_stackPKfPfii (sm_80) keeps 2048 bytes" in text
    assert not [fault for fault in faults if "row_kernel" in fault or "calls" in fault]


def test_general_kernels_may_use_memory() -> None:
    found = list(kernels().values())
    for kernel in found:
        kernel.name = "row_general<float>"
    assert not check.judge(found, [], [])


def test_local_accesses_are_faults() -> None:
    row = kernels()["_Z10row_kernelPKfPfi"]
    row.sass = {"local": 2}
    assert "2 accesses to local memory" in check.judge([row], [], [])[0]


def test_a_build_without_kernels_is_a_fault() -> None:
    faults = check.judge([], ["90"], [build.Unit("row_x.kd", Path("row_x.cu"), "kd")])
    assert faults == ["row_x.kd has no kernel for sm_90", "nothing was compiled"]


def test_warnings_are_ours() -> None:
    theirs = "/usr/include/x.h(3): warning #20012-D: an annotation\nnvcc warning : old architecture"
    assert len(usage.warnings(PTXAS + PTXAS + theirs, "/src/csrc")) == 1
    assert usage.warnings("ptxas warning : too many registers", "/src/csrc")


def test_sass_counts() -> None:
    counts = usage.count_sass(SASS.splitlines())
    row = counts["_Z10row_kernelPKfPfi", "90"]
    assert row == {
        "load128": 1,
        "load": 1,
        "store128": 1,
        "store": 1,
        "bulk": 1,
        "generic": 1,
        "local": 0,
    }
    assert counts["_Z9row_spillPKfPfi", "90"]["local"] == 2


def test_launch_bounds() -> None:
    assert usage.read_threads(ELF.splitlines()) == {("_Z10row_kernelPKfPfi", "90"): 256}


@pytest.mark.parametrize(
    ("architecture", "threads", "registers", "shared", "expected"),
    [  # as CUDA's occupancy calculator has it
        ("90", 256, 14, 128, (8, 1.0)),
        ("90", 256, 64, 0, (4, 0.5)),
        ("90", 256, 65, 0, (3, 0.375)),
        ("80", 1024, 33, 0, (1, 0.5)),
        ("80", 32, 16, 0, (32, 0.5)),
        ("80", 128, 32, 48 * 1024, (3, 0.1875)),
    ],
)
def test_occupancy(
    architecture: str, threads: int, registers: int, shared: int, expected: tuple[int, float]
) -> None:
    kernel = Kernel("k", architecture, registers=registers, shared=shared, threads=threads)
    assert usage.occupancy(kernel) == expected


def test_occupancy_needs_launch_bounds() -> None:
    assert usage.occupancy(Kernel("k", "90", registers=32)) is None


def test_symbols_outside_of_the_stable_abi() -> None:
    unstable = usage.unstable_symbols(NM)
    assert len(unstable) == 3
    assert all(re.match(r"c10::Error|at::cuda|std::vector<torch", symbol) for symbol in unstable)


def test_symbols_that_the_library_must_define() -> None:
    assert usage.unresolved_symbols(NM) == [
        "kdkernels::cuda::launch_row(int)",
        "cudaLaunchKernel@libcudart.so.13",
        "__cudaRegisterFatBinary",
        "cuGetErrorString",
    ]


@pytest.mark.parametrize(
    ("demangled", "short"),
    [
        (
            "void kdkernels::cuda::row_kernel<__half, 3>(__half const*, __half*, int)",
            "row_kernel<__half, 3>",
        ),
        ("kdkernels::cuda::(anonymous namespace)::scale(float*)", "scale"),
        (
            "void kdkernels::cuda::k<kdkernels::rules::kd::Rule, (kdkernels::Mode)1>(int)",
            "k<Rule, (Mode)1>",
        ),
    ],
)
def test_short_names(demangled: str, short: str) -> None:
    assert usage.short_name(demangled) == short


def _run(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The check on a machine without nvcc."""
    env = {**os.environ, "CUDA_HOME": str(tmp_path)}
    command = [sys.executable, str(ROOT / "tests" / "gpu" / "compile.py"), *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def test_no_nvcc_is_an_error_that_says_how_to_get_it(tmp_path: Path) -> None:
    done = _run(tmp_path)
    assert done.returncode == 1
    assert "install a CUDA toolkit" in done.stderr


def test_rules_that_are_not_there(tmp_path: Path) -> None:
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\n")
    nvcc.chmod(0o755)
    done = _run(tmp_path, "--rules", "kd,heat")
    assert done.returncode == 1 and "--rules must be compiled ones, got ['heat']" in done.stderr


def test_no_nvcc_may_be_excused(tmp_path: Path) -> None:
    done = _run(tmp_path, "--if-available")
    assert done.returncode == 0
    assert "skipped" in done.stdout

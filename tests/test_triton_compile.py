"""Every Triton kernel compiles for NVIDIA GPUs without one, and keeps its rows in registers.

The launches are those of the library: its host code runs on CPU tensors with the launch replaced by
a compilation for a named target. That needs a process in which TRITON_INTERPRET was never set, so
this file runs itself as a script.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURES = (80, 90, 100)
KERNELS = {
    "row_kernel",
    "correlation_row_kernel",
    "column_kernel",
    "combine_kernel",
    "gradient_kernel",
    "scale_kernel",
    "factor_kernel",
    "tuple_kernel",
    "topk_kernel",
    "topk_gradient_kernel",
}


def _inputs(triton: Any, torch: Any, architecture: int) -> Any:
    """Calls of the library: (label, function, arguments)."""
    from kdkernels import _backends
    from kdkernels._calls import CorrelationCall, FactorCall, RowCall, TopKCall, TupleCall

    def pair(dtype: Any, *shape: int) -> tuple[Any, Any]:
        return torch.empty(shape, dtype=dtype), torch.zeros(
            shape[:1] + shape[2:], dtype=torch.int64
        )

    row, correlation, factors, tuples, topk = (
        _backends.kernels("triton", name)
        for name in ("row", "correlation", "iekd", "tuple_matching", "topk")
    )

    def call(
        rule: str, options: list[float], standardize: bool = False, hard: float = 0.0
    ) -> RowCall:
        numbers = [4.0, 16.0, hard, *options]
        return RowCall(rule, numbers, None, standardize, hard > 0, -100, 1, 1)

    nothing = (None, None, None, None)
    dist = CorrelationCall("dist", [1.0, 1.0, 1.0, 1e-8], None, 1, 1)
    dkd = call("dkd", [1.0, 8.0])
    mixture = call("mixture", [0.5, 0.5, 0.5, 0.5])
    wide = torch.bfloat16, torch.float32, torch.float64
    full = architecture == 90
    # Every width in one dtype; of the others those that need most registers, and that stream.
    widths = {torch.bfloat16: (100_000,), torch.float64: (100_000,)}
    if full:
        widths = {wide[0]: (100, 8192, 100_000), wide[1]: (100_000,), wide[2]: (8192,)}
    for dtype, all_classes in widths.items():
        for classes in all_classes:
            x, target = pair(dtype, 64, classes)
            label = f"{dtype}-{classes}"
            weights = [
                torch.ones(64, dtype=torch.float64 if dtype.itemsize == 8 else torch.float32)
            ] * 3
            yield f"kd-{label}", row.forward, (x, x, *nothing, call("kd", []), True)
            yield f"mixture-{label}", row.forward, (x, x, *nothing, mixture, True)
            yield f"dkd-{label}", row.forward, (x, x, target, *nothing[1:], dkd, True)
            hard = call("kd", [], hard=0.5)  # with every output and weight
            yield f"kd-hard-{label}", row.forward, (x, x, target, *weights, hard, True)
            hard = call("mixture", [0.5, 0.5, 0.5, 0.5], hard=0.5)
            yield f"mixture-hard-{label}", row.forward, (x, x, target, *weights, hard, True)
            if classes != 100:
                standard = call("dkd", [1.0, 8.0], True)
                args = (torch.ones(()), x, x, target, *nothing[1:], standard)
                yield f"dkd-standardize-{label}", row.backward, args
            yield f"dist-{label}", correlation.forward, (x, x, None, dist, True)
            yield f"dist-ignored-{label}", correlation.forward, (x, x, target > 0, dist, True)
    x, target = pair(torch.bfloat16, 2, 19, 16, 32)
    yield "dkd-dense", row.forward, (x, x, target, *nothing[1:], dkd, True)
    yield "dist-dense", correlation.forward, (x, x, None, dist, True)
    for dtype, all_widths in widths.items():
        for width in all_widths:
            x = torch.empty(64, width, dtype=dtype)
            for cosine in (False, True):
                args = (x, x, x, FactorCall([50.0, 50.0], None, cosine, 1))
                label = f"{dtype}-{width}-{cosine}"
                yield f"iekd-{label}", factors.forward, (*args, True, True)
                args = (torch.ones(()), *args, False, True)
                yield f"iekd-backward-{label}", factors.backward, args
    for dtype in (torch.float32, torch.float64):
        for batch in (64, 3000):
            d, target = torch.empty(batch, batch, dtype=dtype), torch.zeros(batch).long()
            args = (d, d, target, TupleCall([0.2, 4.0, 1.0], None, 1), True)
            yield f"tuples-{dtype}-{batch}", tuples.forward, args
    for dtype in wide if full else wide[::2]:
        working = torch.float64 if dtype.itemsize == 8 else torch.float32
        for k in (64, 1024) if full and dtype is torch.bfloat16 else (64,):
            x, target = pair(dtype, 64, 32_000)
            ids = torch.zeros(64, k, dtype=torch.int64)
            small, numbers = torch.empty(64, k + 1).to(working), torch.empty(6, 64).to(working)
            for asked, heats in ((False, None), (True, numbers[0])):
                wants = TopKCall([2.0], None, False, True, asked, asked, -100)
                of_rows = (x, ids, target if asked else None, heats, wants)
                label = f"{dtype}-{k}-{asked}"
                yield f"topk-{label}", topk.forward, of_rows
                made = (x, small, numbers, small, numbers[0] if asked else None)
                yield f"topk-gradient-{label}", topk.backward, (*made, *of_rows)
    for dtype in wide:
        yield f"scale-{dtype}", row.scale_, (torch.empty(5000, dtype=dtype), torch.ones(()))


def _compile_all(architecture: int) -> None:
    """Print one line of JSON for each distinct kernel that the library would launch."""
    import torch
    import triton as compiler
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.jit import JITFunction

    from kdkernels import triton as kernels

    dumper = Path(compiler.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    label, seen = "", set()

    def build(kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        values = dict(zip(kernel.arg_names, args, strict=False)) | options
        signature, constants, attributes = {}, {}, {}
        for index, parameter in enumerate(kernel.params):
            name, value = parameter.name, values[parameter.name]
            free = not parameter.do_not_specialize
            if (
                parameter.is_constexpr
                or value is None
                or (free and type(value) is int and value == 1)
            ):
                signature[name], constants[name] = "constexpr", value
                continue
            if isinstance(value, torch.Tensor):
                short = str(value.dtype).replace("torch.", "").replace("bfloat", "bf")
                short = short.replace("bool", "i1")
                signature[name] = "*" + short.replace("float", "fp").replace("int", "i")
            elif isinstance(value, float):
                signature[name] = parameter.annotation_type
            else:
                signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if isinstance(value, torch.Tensor) or (free and type(value) is int and value % 16 == 0):
                attributes[(index,)] = [["tt.divisibility", 16]]
        keep = {"num_warps": options["num_warps"], "enable_fp_fusion": options["enable_fp_fusion"]}
        key = (kernel, str(signature), str(constants), str(keep))
        if key in seen:
            return
        seen.add(key)
        source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
        target = GPUTarget("cuda", architecture, 32)
        built = compiler.compile(source, target=target, options=keep)
        result = {
            "label": label,
            "kernel": kernel.fn.__name__,
            "resident": constants.get("RESIDENT"),
            "loads": _loads(built.asm["ptx"]),
            "fused": bool(built.metadata.enable_fp_fusion),
            "bytes": len(built.asm["cubin"]),
            "usage": None,
        }
        if dumper.exists():
            with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                file.write(built.asm["cubin"])
                file.flush()
                command = [str(dumper), "--dump-resource-usage", file.name]
                text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            result["usage"] = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
        print(json.dumps(result), flush=True)

    def getitem(kernel: Any, grid: Any) -> Any:
        return lambda *args, **options: build(kernel, args, options)

    JITFunction.__getitem__ = getitem
    for label, function, args in _inputs(kernels, torch, architecture):  # noqa: B007
        function(*args)


def _loads(ptx: str) -> int:
    """Bytes that a thread loads from global memory, as instructions x their width."""
    total = 0
    for vector, bits in re.findall(r"ld\.global[.\w:]*?(?:\.v(\d))?\.[bufs](\d+)", ptx):
        total += int(vector or 1) * int(bits) // 8
    return total


@pytest.fixture(scope="module")
def built() -> dict[int, list[dict[str, Any]]]:
    pytest.importorskip("triton", reason="the package triton is not installed")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")])
    children = {
        architecture: subprocess.Popen(
            [sys.executable, __file__, str(architecture)],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for architecture in ARCHITECTURES
    }
    results = {}
    for architecture, child in children.items():
        out, error = child.communicate(timeout=600)
        assert child.returncode == 0, f"sm_{architecture}: {error[-4000:]}"
        results[architecture] = [json.loads(line) for line in out.splitlines()]
    return results


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_compiles(built: dict[int, list[dict[str, Any]]], architecture: int) -> None:
    results = built[architecture]
    assert {result["kernel"] for result in results} == KERNELS
    for result in results:
        assert result["bytes"] > 0
        assert not result["fused"], "the launch must set enable_fp_fusion=False"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nothing_spills(built: dict[int, list[dict[str, Any]]], architecture: int) -> None:
    if built[architecture][0]["usage"] is None:
        pytest.skip("this build of triton has no cuobjdump to read register use from")
    # ptxas parks one or two values of a row for the time of its loop, to reach a round number.
    parked = {"topk_kernel": 16}
    spilled = [
        r
        for r in built[architecture]
        if r["usage"]["STACK"] > parked.get(r["kernel"], 0) or r["usage"]["LOCAL"]
    ]
    assert not spilled


def test_resident_rows_are_read_once(built: dict[int, list[dict[str, Any]]]) -> None:
    """16 logits a thread of each input, and nothing else: the sweeps share their loads."""
    (resident,) = (r for r in built[90] if r["label"] == "kd-torch.bfloat16-8192")
    assert resident["resident"]
    assert resident["loads"] == 2 * 16 * 2


if __name__ == "__main__":
    _compile_all(int(sys.argv[1]))

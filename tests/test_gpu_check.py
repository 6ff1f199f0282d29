"""The pure parts of the GPU's check and benchmarks: what logs mean, budgets, arithmetic, tables.

Numbers here are invented; nothing of this needs or pretends to be a GPU.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import steps
import torch
from steps import FAILED, LATE, PASSED, SKIPPED, Outcome, Step

from benchmarks import gpu, gpu_cases, gpu_clock, gpu_report, gpu_truth
from kdkernels.registry import SPECS

ROOT = Path(__file__).resolve().parent.parent
CHECK = ROOT / "tests" / "gpu" / "check.py"


def test_without_a_gpu_the_check_says_so_and_fails() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    done = subprocess.run([sys.executable, CHECK], capture_output=True, text=True)
    assert done.returncode == 1 and "no CUDA device" in done.stderr
    command = [sys.executable, "-m", "benchmarks.gpu"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and "nothing was measured" in done.stderr


def test_a_rehearsal_does_not_write_results(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--rehearse"], ["--rehearse", "--output", str(gpu.RESULTS)]):
        with pytest.raises(SystemExit):
            gpu.parse(arguments)
        assert "must not write" in capsys.readouterr().err


PYTEST = {
    "good": ("....\n==== 5 passed, 2 skipped, 1 warning in 3.21s ====", 0, PASSED),
    "long": ("9 passed in 83.20s (0:01:23)", 0, PASSED),
    "bad": ("FAILED tests/a.py::b[c] - boom\n1 failed, 4 passed in 3s", 1, FAILED),
    "nothing": ("3 skipped in 0.10s", 0, FAILED),
    "crash": ("Fatal Python error", -6, FAILED),
    "error": ("ERROR tests/a.py - ImportError\n4 passed, 1 error in 3.00s", 1, FAILED),
}


@pytest.mark.parametrize(("text", "status", "expected"), PYTEST.values(), ids=PYTEST)
def test_what_pytest_says(text: str, status: int, expected: str) -> None:
    assert steps.judge_pytest(text, status).status == expected


def test_the_counts_of_pytest() -> None:
    text = (
        "FAILED tests/a.py::b[c] - boom\n"
        "SKIPPED [7] tests/gpu/budget.py:52: the time budget is spent\n"
        "= 2 failed, 11 passed, 8 skipped, 3 errors in 12.34s ="
    )
    found = steps.judge_pytest(text, 1)
    assert found.counts == {"failed": 2, "passed": 11, "skipped": 8, "error": 3}
    assert found.failures == ["tests/a.py::b[c] - boom"]
    assert "7 of the skipped for want of time" in found.summary


SANITIZER = {
    "good": ("sanitized: 9 steps ran\n========= ERROR SUMMARY: 0 errors", 0, PASSED),
    "race": (
        "sanitized: 9 steps ran\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors)",
        0,
        PASSED,
    ),
    "errors": ("sanitized: 9 steps ran\n========= ERROR SUMMARY: 12 errors", 99, FAILED),
    "died": ("========= ERROR SUMMARY: 0 errors", 0, FAILED),
    "no tool": ("", 1, FAILED),
    "refused": ("========= Error: Device not supported. Please refer", 1, SKIPPED),
}


@pytest.mark.parametrize(("text", "status", "expected"), SANITIZER.values(), ids=SANITIZER)
def test_what_the_sanitizer_says(text: str, status: int, expected: str) -> None:
    assert steps.judge_sanitizer(text, status).status == expected


def _python(name: str, code: str, limit: float = 30, **options: Any) -> Step:
    return Step(name, [sys.executable, "-c", code], limit, steps.judge_plain, **options)


def test_groups_run_side_by_side_and_end_at_their_limits(tmp_path: Path) -> None:
    group = [
        _python("good", "print('all is well')"),
        _python("bad", "raise SystemExit('it broke')"),
        _python("late", "import time; time.sleep(60)", limit=1.5),
        _python("told", "import os; print(os.environ['WORD'])", environment={"WORD": "said"}),
        _python("helper", "import time; time.sleep(60)", helper=True),
    ]
    start = time.monotonic()
    environment = {**os.environ, "PYTHONFAULTHANDLER": "1"}
    found = {o.name: o for o in steps.run_group(group, tmp_path, 30, environment)}
    assert time.monotonic() - start < 20
    statuses = {name: o.status for name, o in found.items()}
    assert statuses == {
        "good": PASSED, "bad": FAILED, "late": LATE, "told": PASSED, "helper": SKIPPED,
    }  # fmt: skip
    assert found["good"].summary == "all is well" and found["told"].summary == "said"
    assert "the limit is reached" in (tmp_path / "late.log").read_text()
    assert "most recent call first" in (tmp_path / "late.log").read_text()
    # The budget's end is a limit too.
    late = steps.run_group([_python("slow", "import time; time.sleep(60)")], tmp_path, 1, {})
    assert late[0].status == LATE and late[0].limit == 1


def test_the_report(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "a.log").write_text("x" * 10)
    outcomes = [
        Outcome("build", PASSED, 50, 200, "linked | done"),
        Outcome("GPU tests", FAILED, 60, 150, "1 failed", {"passed": 7}, ["tests/a.py::b - no"]),
        Outcome("benchmarks", LATE, 9, 9),
    ]
    facts = {"rehearsal": False, "machine": {"device": "invented"}, "seconds": 120.0}
    report = steps.write(tmp_path / "out", tmp_path / "logs", outcomes, facts)
    assert len(report["faults"]) == 2 and report["gpu_tests_passed"] == 7
    assert json.loads((tmp_path / "out" / "check.json").read_text()) == report
    page = (tmp_path / "out" / "check.md").read_text()
    assert "linked \\| done" in page and "tests/a.py::b - no" in page and "REHEARSAL" not in page
    assert "x" * 10 in (tmp_path / "out" / "check.log").read_text()
    assert len(list((tmp_path / "out").iterdir())) == 3
    # Nothing failed, and no test ran on a GPU: that is a fault, except in a rehearsal.
    assert steps.verdict([Outcome("build", PASSED)], False) == ["no GPU test passed"]
    assert steps.verdict([Outcome("build", PASSED)], True) == []
    facts = {**facts, "rehearsal": True}
    assert steps.write(tmp_path / "out", tmp_path / "logs", [], facts)["gpu_tests_passed"] == 0
    assert "REHEARSAL" in (tmp_path / "out" / "check.md").read_text()


def test_long_logs_keep_both_ends() -> None:
    text = steps.trimmed("a" * 50 + "b" * 100 + "c" * 50, 80)
    assert text.startswith("a" * 40) and text.endswith("c" * 40) and "120 characters" in text


def _run(**native: Any) -> dict[str, Any]:
    """A run with invented numbers: 3 ms at 8192 x 128256, of a copy of 4 TB/s."""
    size = 8192 * 128256
    record = {
        "case": "kd 8192x128256 bfloat16",
        "loss": "kd",
        "shape": [8192, 128256],
        "dtype": "bfloat16",
        "floor_bytes": gpu_cases.floor_bytes("kd", size, 2),
        "contenders": {
            "native": {
                "seconds": 3e-3, "launches": 3, "peak_gradients": 1.01, "traversal": "row_cluster",
                "kernel_microseconds": 2000.0, **native,
            },
            "eager": {"seconds": 30e-3},
            "liger": {"skipped": "invented"},
        },
    }  # fmt: skip
    machine = {"name": "invented", "torch": "0"}
    return {"machine": machine, "copy_bytes_per_second": 4e12, "cases": [record]}


def test_bandwidth_and_ratios() -> None:
    run = _run()
    record = run["cases"][0]
    assert record["floor_bytes"] == 3 * 8192 * 128256 * 2
    assert gpu_cases.floor_bytes("dist", 100, 4) == 2000
    assert gpu_report.bandwidth(record) == pytest.approx(record["floor_bytes"] / 3e-3)
    assert gpu_report.fraction(run, record) == pytest.approx(record["floor_bytes"] / 3e-3 / 4e12)
    assert gpu_report.faster(record, "eager") == pytest.approx(10)
    assert gpu_report.faster(record, "liger") is None
    assert gpu_report.fraction({"cases": []}, record) is None


def test_targets_are_kept_missed_or_not_measured() -> None:
    by_what = {
        (t["case"], t["what"]): t for t in gpu_report.judge(_run(peak_gradients=1.03, launches=4))
    }
    case = "kd 8192x128256 bfloat16"
    assert by_what[case, "of the copy's bandwidth"]["kept"] is False
    assert by_what[case, "peak memory, gradients"]["kept"] is False
    assert by_what[case, "launches a step"]["kept"] is False
    assert by_what[case, "times liger"]["kept"] is None
    good = {(t["case"], t["what"]): t for t in gpu_report.judge(_run(seconds=1.6e-3))}
    assert good[case, "of the copy's bandwidth"]["kept"] is True
    assert good[case, "launches a step"]["kept"] is True
    rehearsed = gpu_report.judge({**_run(), "rehearsal": True})
    assert {t["kept"] for t in rehearsed} == {None}
    names = {case.name for case in gpu_cases.CASES}
    assert {target.case for target in gpu_report.TARGETS} <= names


def test_predictions_are_compared_by_loss_shape_and_dtype(tmp_path: Path) -> None:
    predictions = [
        {"loss": "kd", "shape": [8192, 128256], "dtype": "bfloat16", "traversal": "cluster",
         "bytes": 1, "microseconds": 1600.0},
        {"loss": "kd", "shape": "8192x128256", "dtype": "float32", "traversal": "cluster",
         "bytes": 1, "microseconds": 3200.0},
    ]  # fmt: skip
    path = tmp_path / "p.json"
    assert gpu_report.read_predictions(path) == []
    path.write_text(json.dumps(predictions))
    (row,) = gpu_report.compare(_run(), gpu_report.read_predictions(path))
    assert row["ratio"] == pytest.approx(1.25) and row["predicted_traversal"] == "cluster"
    path.write_text(json.dumps({"predictions": predictions}))
    assert gpu_report.read_predictions(path) == predictions


def test_the_page(tmp_path: Path) -> None:
    run = _run()
    run["left_out"] = {"dkd 4x1048576 float32": "the 150 s were spent"}
    for written in (gpu.write(run, tmp_path / "invented"), gpu.write(run, tmp_path / "invented")):
        assert [path.suffix for path in written] == [".json", ".md"]
    page = (tmp_path / "invented.md").read_text()
    for part in ("kd 8192x128256 bfloat16", "row_cluster", "4.00 TB/s", "the 150 s were spent",
                 "**MISSED**", "liger: invented", "| 10.0 |"):  # fmt: skip
        assert part in page, part
    assert (
        gpu.write({**run, "rehearsal": True}, tmp_path / "r")
        and "A REHEARSAL" in (tmp_path / "r.md").read_text()
    )
    pytest.importorskip("matplotlib")
    assert gpu_report.draw(run, tmp_path / "p.png") and (tmp_path / "p.png").stat().st_size > 5000
    assert not gpu_report.draw({**run, "cases": []}, tmp_path / "q.png")


def test_a_run_fails_with_one_of_our_backends() -> None:
    run = _run()
    assert not gpu.failed(run)
    run["cases"][0]["contenders"]["eager"]["failed"] = True
    assert not gpu.failed(run)
    run["cases"][0]["contenders"]["triton"] = {"failed": True}
    assert gpu.failed(run) and gpu.failed({"cases": []})


def test_names_of_kernels() -> None:
    long = (
        "void kdkernels::cuda::(anonymous namespace)::row_lanes<float, 32, 8>"
        "(kdkernels::cuda::RowTask, bool)"
    )
    assert gpu_clock.short(long) == "row_lanes<float, 32, 8>"
    fill = (
        "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>, "
        "std::array<char*, 1ul> >(int, at::native::FillFunctor<float>, std::array<char*, 1ul>)"
    )
    assert "Fill" in gpu_clock.short(fill)
    assert gpu_clock.short("_row_kernel") == "_row_kernel"
    assert gpu.traversal(["count_rows", "row_split<float>"]) == "row_split"
    assert gpu.traversal(["correlate_stream<x>"]) == "correlate_stream"
    assert gpu.traversal(["correlate<x>"]) == "correlate" and gpu.traversal(["other"]) == ""
    assert gpu_clock.is_work("row_lanes") and not gpu_clock.is_work("ProfilerStep#3")
    events = [("a", 1.0), ("b", 2.0), ("a", 3.0), ("b", 6.0)]
    assert gpu_clock.merged(events, 2) == [("a", 2.0), ("b", 4.0)]
    assert len(gpu_clock.merged(events, 3)) == 4 and gpu_clock.merged([], 3) == []


@pytest.mark.parametrize("name", ("kd", "dkd", "aekt", "dist"))
def test_the_chunked_truth_is_the_reference(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_truth, "CHUNK", 64)
    generator = torch.Generator().manual_seed(0)
    for size in ((37, 19), (2, 5, 3, 4)):
        student, teacher = torch.randn((2, *size), generator=generator)
        target = torch.randint(size[1], (size[0], *size[2:]), generator=generator)
        expected = gpu_truth.truth(name, student, teacher, target)
        spec, leaf = SPECS[name], student.double().requires_grad_()
        extra = (target,) if spec.needs_target else ()
        loss = spec.function(leaf, teacher.double(), *extra, backend="reference")
        (gradient,) = torch.autograd.grad(loss, leaf)
        found = gpu_truth.errors(loss.detach(), gradient, expected)
        assert len(expected.rows) == 16 and max(found.values()) < 1e-12
        assert gpu_truth.errors(loss.detach() * 1.01, gradient * 0.99, expected)["gradient"] > 5e-3

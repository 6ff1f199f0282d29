"""The benchmark suite itself: it refuses wrong results, covers all losses and divides correctly."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import contenders, measure, report, run, targets, teacher_cache, token_rivals
from benchmarks.eager import EAGER, eager
from benchmarks.problem import Problem, Refused
from benchmarks.results import compare, trim
from benchmarks.shapes import BY_NAME, MODES, WORKLOADS, Workload, suits
from benchmarks.test_speed import time_case
from kdkernels import info
from kdkernels.registry import SPECS, LossSpec

ROOT = Path(__file__).resolve().parent.parent

TINY = Workload("tiny", "tiny", (6, 11))
TINY_IMAGE = Workload("tiny_image", "tiny image", (2, 5, 3, 4))
SHAPES = {
    "64x100", "256x100", "256x1000", "1024x1000", "256x21841", "256x32000", "128x128256",
    "8x150x64x64", "1024x32000", "1024x32000, 50% ignored", "512x128256",
    "512x128256, 50% ignored", "4x720x50x50", "8x150x64x64, 33% ignored",
}  # fmt: skip
FEATURES = {
    ("iekd", "128x64x8x8"), ("tuple_matching", "256x128, 10 classes"),
    ("tuple_matching", "256x128, 100 classes"), ("local_classifier", "256x100"),
    ("rkd", "128x512"), ("attention", "64x128x16x16"), ("hint", "64x128x16x16"),
    ("pkd", "64x128x16x16"),
}  # fmt: skip
TINY_FEATURES = {
    "iekd": Workload("tiny", "tiny", (5, 4, 3, 3), features=True),
    "tuple_matching": Workload("tiny", "tiny", (20, 7), features=True, classes=3),
    "local_classifier": Workload("tiny", "tiny", (6, 11), features=True, width=8),
    "rkd": Workload("tiny", "tiny", (8, 16), features=True),
}
"""Others take four dimensions."""
each_loss = pytest.mark.parametrize("spec", SPECS.values(), ids=lambda spec: spec.name)


def tiny(spec: LossSpec) -> Workload:
    if spec.family != "embedding":
        return TINY
    return TINY_FEATURES.get(spec.name, Workload("tiny", "tiny", (3, 4, 5, 5), features=True))


class NotToBeTimed:
    """Stands for pytest-benchmark's fixture; nothing may reach it."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"a refused result reached the timer ({name})")


def problem(
    spec: LossSpec, workload: Workload | None = None, dtype: torch.dtype = torch.float32
) -> Problem:
    return Problem(spec, workload or tiny(spec), dtype)


def test_workloads_are_the_promised_ones() -> None:
    assert {workload.size for workload in WORKLOADS if not workload.features} == SHAPES
    assert len(BY_NAME) == len(WORKLOADS)
    assert any(workload.quick for workload in WORKLOADS)
    assert any(workload.half for workload in WORKLOADS)
    places = {(spec.name, w.size) for w in WORKLOADS if w.features for spec in SPECS.values()
              if suits(w, spec)}  # fmt: skip
    assert places >= FEATURES


@each_loss
def test_each_loss_has_a_workload_of_its_kind(spec: LossSpec) -> None:
    places = [workload for workload in WORKLOADS if suits(workload, spec)]
    assert places and all(w.features == (spec.family == "embedding") for w in places)
    for workload in places:
        names = contenders.contenders(spec, workload)
        others = ("eager", "compile") if workload.ignored is None else ()
        assert names[: len(others)] == others
        assert ("floor" in names) == workload.floor
        assert set(names[len(others) :]) - {"floor"} == set(contenders.own(spec))


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda workload: workload.name)
def test_inputs_have_the_shapes_of_the_workload(workload: Workload) -> None:
    if workload.elements > 300_000:
        pytest.skip("large; the others show it")
    for spec in SPECS.values():
        if suits(workload, spec):
            case = problem(spec, workload)
            assert all(x.shape == workload.shape and x.is_leaf for x in case.students)
            assert not any(x.requires_grad for x in case.constants)
            targets = [x for x in case.constants if not x.is_floating_point()]
            assert len(targets) == (spec.needs_target or spec.family in ("sampled", "sparse"))
            for target in targets:
                assert target.min() >= 0 and target.max() < (workload.classes or workload.shape[1])


@each_loss
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_eager_forms_are_the_losses(spec: LossSpec, dtype: torch.dtype) -> None:
    for workload in (tiny(spec),) if spec.family == "embedding" else (TINY, TINY_IMAGE):
        for mode in MODES:
            problem(spec, workload, dtype).check("eager", eager(spec), mode)


@each_loss
def test_what_is_timed_of_the_library_is_the_loss(spec: LossSpec) -> None:
    case = problem(spec)
    for mode in MODES:
        name = contenders.ours(spec, "cpu")
        case.check(name, contenders.build(name, case), mode)


def test_every_loss_has_an_eager_form() -> None:
    assert EAGER.keys() == SPECS.keys()


def _scaled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *args: 1.01 * function(*args)


def _nan(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *args: function(*args) * float("nan")


def _right_value_wrong_gradient(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def wrong(*args: Tensor) -> Tensor:
        loss = function(*args)
        return 2 * loss - loss.detach()

    return wrong


def _one_element_of_the_gradient_lost(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def wrong(student: Tensor, *args: Tensor) -> Tensor:
        leaf = student.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(function(leaf, *args), leaf)
        held = gradient.abs() == gradient.abs().max()  # absent classes have no gradient to lose
        return function(torch.where(held, student.detach(), student), *args)

    return wrong


def _raises(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def wrong(*args: Tensor) -> Tensor:
        raise RuntimeError("no kernel")

    return wrong


WRONG = (_scaled, _nan, _right_value_wrong_gradient, _one_element_of_the_gradient_lost, _raises)


@each_loss
@pytest.mark.parametrize("break_it", WRONG, ids=lambda function: function.__name__.strip("_"))
def test_wrong_results_are_refused(
    spec: LossSpec, break_it: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = break_it(eager(spec))
    monkeypatch.setattr(contenders, "build", lambda name, problem: wrong)
    place = tiny(spec).size
    with pytest.raises(Refused, match=rf"ours of {spec.name} at {place} (disagrees|failed)"):
        time_case(NotToBeTimed(), problem(spec), "ours", "forward_backward", 0.01)


@each_loss
def test_wrong_values_are_refused_without_gradients(spec: LossSpec) -> None:
    def wrong_in_inference(*args: Tensor) -> Tensor:
        loss = eager(spec)(*args)
        return loss if torch.is_grad_enabled() else 1.01 * loss

    problem(spec).check("ours", wrong_in_inference, "forward_backward")
    with pytest.raises(Refused, match="error of the value"):
        problem(spec).check("ours", wrong_in_inference, "forward")


@each_loss
def test_interpreted_kernels_are_not_timed(spec: LossSpec) -> None:
    assert "interpreted" in contenders.why_not("triton", spec, "cpu")[0]
    assert contenders.why_not("floor", spec, "cpu") == []
    possible = ("native", "reference") if "native" in spec.backends else ("composed",)
    assert contenders.ours(spec, "cpu") in possible


def test_a_wrong_second_gradient_is_refused() -> None:
    def second_lost(inheritance: Tensor, exploration: Tensor, teacher: Tensor) -> Tensor:
        exploration = exploration * 1.01 - 0.01 * exploration.detach()
        return eager(SPECS["iekd"])(inheritance, exploration, teacher)

    with pytest.raises(Refused, match="gradient 2"):
        problem(SPECS["iekd"]).check("ours", second_lost, "forward_backward")


def test_only_composed_losses_run_composed() -> None:
    assert contenders.why_not("composed", SPECS["kd"], "cpu")
    assert contenders.why_not("composed", SPECS["rkd"], "cpu") == []
    assert contenders.why_not("compile", SPECS["tuple_matching"], "cpu")
    assert not any("attention" in name or "kd" in name for name in run.skipped("cpu"))


def test_steps_do_what_is_measured() -> None:
    case = problem(SPECS["kd"])
    measure.step(eager(case.spec), case, "forward")()
    assert case.student.grad is None
    step = measure.step(eager(case.spec), case, "forward_backward")
    step()
    first = case.student.grad
    step()
    assert first is not None and case.student.grad is not first  # fresh, not accumulated
    torch.testing.assert_close(case.student.grad, first)


def test_peak_memory_counts_what_is_alive_together() -> None:
    case = problem(SPECS["kd"], Workload("x", "x", (64, 100)))

    def two_then_one() -> None:
        a = torch.empty(1000)
        b = torch.empty(1000)
        del a
        c = torch.empty(500)
        del b, c

    assert measure.peak_bytes(two_then_one, case) == 8000
    for one in (case, problem(SPECS["iekd"])):  # one gradient, and two
        add = measure.step(contenders.build("floor", one), one, "forward", floor=True)
        assert measure.peak_bytes(add, one) == one.floor_bytes // 3


def test_interleaved_times_all() -> None:
    times = measure.interleaved(
        {"a": lambda: sum(range(10)), "b": lambda: sum(range(20000))}, "cpu", 0.02
    )
    assert 0 < times["a"] < times["b"]


def entry(contender: str, median: float, peak: int, **changes: Any) -> dict[str, Any]:
    """One benchmark as pytest-benchmark writes it."""
    extra = {
        "loss": "kd", "workload": "imagenet", "shape": [256, 1000], "dtype": "float32",
        "mode": "forward_backward", "contender": contender, "floor_bytes": 3072000,
        "peak_bytes": peak, "torch": "2.0",
    }  # fmt: skip
    stats = {"median": median, "iqr": 0.0, "rounds": 5, "iterations": 1, "data": [median] * 5}
    return {"name": contender, "stats": stats, "extra_info": {**extra, **changes}}


FACTS = {
    "device": "cpu", "name": "Some CPU", "capability": "AVX2", "threads": 2, "torch": "2.13.0",
    "triton": "3.9.0", "kdkernels": "0.1.0", "date": "2030-01-01",
}  # fmt: skip
RAW = {
    "benchmarks": [
        entry("eager", 3e-3, 5_120_000),
        entry("compile", 1.2e-3, 1_100_000),
        entry("native", 2e-4, 1_024_000),
        entry("floor", 1e-4, 1_024_000),
        entry("native", 1.6e-4, 512_000, dtype="bfloat16", floor_bytes=1536000),
        entry("eager", 9e-3, 7_168_000, loss="dist"),
    ]
}


def test_ratios() -> None:
    trimmed = trim(json.loads(json.dumps(RAW)), FACTS)
    assert len(json.dumps(trimmed)) < 4000 and "data" not in json.dumps(trimmed["results"])
    group = compare(trimmed["results"])[0]
    assert group.speedup("eager") == pytest.approx(15)
    assert group.speedup("compile") == pytest.approx(6)
    assert group.times_floor("ours") == pytest.approx(2)
    assert group.gradients("eager") == pytest.approx(5)
    alone = compare(trimmed["results"])[2]
    assert alone.loss == "dist" and alone.speedup("eager") is None


def test_table() -> None:
    text = report.markdown(
        trim(RAW, FACTS) | {"skipped": {"triton": "no GPU"}, "refused": {"x": "bad"}}
    )
    assert (
        "| ImageNet 256x1000 | KD | 200 µs | 3.00 ms | 1.20 ms | 100 µs | **15.0x** | 6.0x | 2.0x"
        " | 1.0 | 5.1 | 1.1 |" in text
    )
    assert "| ImageNet 256x1000 | KD | 200 µs | 160 µs | 1.2x |" in text  # float32, bfloat16
    assert "| ImageNet 256x1000 | DIST | – | 9.00 ms |" in text
    assert "- triton: no GPU" in text and "- `x`: bad" in text
    assert not any(line.startswith("#") for line in text.splitlines())  # the includer has headings


def test_plot(tmp_path: Path) -> None:
    plot = pytest.importorskip("benchmarks.plot", exc_type=ImportError)
    assert plot.draw(trim(RAW, FACTS), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    assert not plot.draw({"machine": FACTS, "results": []}, tmp_path / "none.png")
    assert not plot.draw_features(trim(RAW, FACTS), tmp_path / "none.png")
    place = {"loss": "rkd", "workload": "embeddings", "shape": [128, 512]}
    raw = {"benchmarks": [entry(name, 1e-3, 9000, **place) for name in ("eager", "composed")]}
    assert plot.draw_features(trim(raw, FACTS), tmp_path / "features.png")
    assert not plot.draw(trim(raw, FACTS), tmp_path / "none.png")


def test_targets_are_judged() -> None:
    taken = {"ours": 1.0, "eager": 15.0, "floor": 0.4, "bfloat16": 1.5}
    place = BY_NAME["imagenet"]
    judged = [
        targets.judge(targets.Target("kd", place, rival, sense, bound), taken)
        for rival, sense, bound in (
            ("eager", targets.AT_LEAST, 15),
            ("eager", targets.AT_LEAST, 15.1),
            ("floor", targets.AT_MOST, 2.5),
            ("floor", targets.AT_MOST, 2.4),
            ("float32", targets.AT_MOST, 1),
            ("compile", targets.AT_LEAST, 1),
        )
    ]
    assert [passed for _, passed in judged] == [True, False, True, False, False, False]
    assert [value for value, _ in judged] == [15, 15, 2.5, 2.5, 1.5, None]
    assert all(
        suits(target.workload, SPECS[target.loss])
        for table in targets.TARGETS.values()
        for target in table
    )
    promised = {(t.loss, t.workload.size, t.bound) for t in targets.TARGETS["cpu"]}
    assert promised >= {
        ("aekt", "256x1000", 12), ("aekt", "1024x1000", 12), ("iekd", "128x64x8x8", 5),
        ("tuple_matching", "256x128, 10 classes", 5), ("tuple_matching", "256x128, 100 classes", 5),
    }  # fmt: skip
    for dtype in (torch.float32, torch.bfloat16):
        of_tokens = {
            (t.loss, t.rival, t.bound)
            for t in targets.TARGETS["cpu"]
            if t.workload.size == "1024x32000" and t.dtype == dtype
        }
        assert of_tokens >= {
            *(("reverse_kl", *x) for x in (("eager", 8), ("compile", 3), ("masked", 0.55))),
            *(("mixed_kl", *x) for x in (("eager", 8), ("compile", 3), ("masked", 0.55))),
            *(("skew_kl", *x) for x in (("eager", 8), ("compile", 3), ("masked", 0.55))),
            *(("jsd", *x) for x in (("eager", 15), ("compile", 4), ("masked", 0.55))),
            *(("tv", *x) for x in (("eager", 5), ("compile", 2), ("masked", 0.55))),
            *(("jsd", *x) for x in (("hard_1", 1.15), ("hard_2", 1.3), ("hard_3", 1.6))),
            ("jsd", "beside", 2), ("reverse_kl", "beside", 2),
        }  # fmt: skip
    assert all(t.rival in targets.PAIRS.keys() & targets.WHAT.keys()
               for table in targets.TARGETS.values() for t in table)  # fmt: skip


@pytest.mark.parametrize("loss", ["reverse_kl", "jsd"])
def test_what_the_losses_of_tokens_are_compared_with(
    loss: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, place = SPECS[loss], Workload("tiny", "tiny", (6, 11))
    half = Workload("tiny_masked", "tiny", (6, 11), ignored=0.5)
    monkeypatch.setitem(BY_NAME, "tiny_masked", half)
    names = {name for pair in token_rivals.PAIRS.values() for name in pair}
    ours = functools.partial(spec.function, backend="reference")
    bodies = token_rivals.bodies(spec, place, torch.float64, "cpu", ours, names)
    assert bodies.keys() == names - {"ours"}
    ignored = bodies["masked"][1].constants[1] == -100
    assert ignored.sum() == 3
    values = {name: function(*problem.inputs) for name, (function, problem) in bodies.items()}
    student, teacher, labels = bodies["beside"][1].inputs
    hard = 0.5 * torch.nn.functional.cross_entropy(student, labels)
    for t in token_rivals.TEMPERATURES:
        alone = spec.function(student, teacher, temperature=t)
        torch.testing.assert_close(values[f"alone_{t:g}"], alone)
        torch.testing.assert_close(values[f"hard_{t:g}"], alone + hard)
    torch.testing.assert_close(values["beside"], values["hard_1"])
    kept = [x.detach()[~ignored] for x in bodies["masked"][1].inputs[:2]]
    torch.testing.assert_close(values["masked"].detach(), spec.function(*kept))


def test_the_suite_runs_and_reports(tmp_path: Path) -> None:
    pytest.importorskip("pytest_benchmark")
    chosen = "cifar100_b64 and -kd- and (eager or floor or triton)"
    options = ["--device", "cpu", "--budget", "0.01", "--output", str(tmp_path), "-k", chosen]
    assert run.main(options) == 0
    (data,) = tmp_path.glob("*.json")
    written = json.loads(data.read_text())
    assert {(r["contender"], r["mode"]) for r in written["results"]} == {
        (name, mode) for name in ("eager", "floor") for mode in MODES
    }
    assert all(r["median_s"] > 0 and r["peak_bytes"] >= 0 for r in written["results"])
    assert "interpreted" in written["skipped"]["triton"]
    assert "| CIFAR-100 64x100 | KD |" in data.with_suffix(".md").read_text()


def test_the_suite_runs_embedding_losses(tmp_path: Path) -> None:
    pytest.importorskip("pytest_benchmark")
    chosen = "(local_classes or factors) and forward_backward and not compile"
    options = ["--device", "cpu", "--budget", "0.01", "--output", str(tmp_path), "-k", chosen]
    assert run.main(options) == 0
    (data,) = tmp_path.glob("*.json")
    timed = {(r["loss"], r["contender"]) for r in json.loads(data.read_text())["results"]}
    ours = contenders.ours(SPECS["iekd"], "cpu")
    assert timed == {
        ("local_classifier", "eager"), ("local_classifier", "composed"),
        ("iekd", "eager"), ("iekd", ours), ("iekd", "floor"),
    }  # fmt: skip
    assert "| Factors 128x64x8x8 | IE-KD |" in data.with_suffix(".md").read_text()


def test_info_reports_every_loss_and_backend() -> None:
    facts = info.info()
    assert facts["losses"]["cpu"].keys() == SPECS.keys()
    assert all(not backends["reference"] for backends in facts["losses"]["cpu"].values())
    text = "\n".join(info.lines(facts))
    assert all(name in text for name in SPECS) and "extension:" in text


def test_info_is_a_command() -> None:
    command = [sys.executable, "-m", "kdkernels.info"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert shown.stdout.startswith("kdkernels ") and "reference" in shown.stdout


@pytest.mark.parametrize("budget", [400, 300])
def test_a_small_cache(
    budget: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Every step of the benchmark of teachers on disk, in this process."""
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    monkeypatch.setattr(teacher_cache, "alone", lambda function, *a: (function(*a), 0))
    monkeypatch.setattr(teacher_cache, "BUDGET", budget)
    sizes = ["--tokens", "8100", "--length", "500", "--vocab", "400", "--rows", "2"]
    monkeypatch.setattr(sys, "argv", ["teacher_cache", *sizes, "--folder", str(tmp_path)])
    assert teacher_cache.main() == (budget == 300)
    printed = capsys.readouterr().out
    assert "8000 tokens, K = 64:" in printed and "read shuffled" in printed
    assert ("MISS: more than 300 bytes a token" in printed) == (budget == 300)
    assert not list(tmp_path.iterdir()), "it cleans up"

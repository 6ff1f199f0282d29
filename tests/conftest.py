"""Settings of the test run: Triton's interpreter, threads, hypothesis, the demand for a GPU.

Nothing here is a fixture for numbers: inputs are in ``inputs.py``, the judgement of results in
``oracle.py``, the enumeration of losses and backends in ``cases.py``.
"""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

# Triton reads the variable when it is imported: without a GPU its kernels are interpreted.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from hypothesis import HealthCheck, settings

# The tests run side by side in processes; test_threads.py raises the number for itself.
torch.set_num_threads(1)

if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    import interpreter

    interpreter.patch()

# Fixed examples: a failure seen once is seen always.
settings.register_profile(
    "kdkernels",
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("kdkernels")

REQUIRE_GPU = os.environ.get("KDKERNELS_REQUIRE_GPU") == "1"
_gpu_tests_passed = 0


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: the test runs on a GPU")
    # Infinities and NaN are the point of many tests; NumPy, which interprets, would remark on each.
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton.runtime.interpreter")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    global _gpu_tests_passed
    if report.when == "call" and report.passed and "gpu" in report.keywords:
        _gpu_tests_passed += 1


def pytest_sessionfinish(session: pytest.Session) -> None:
    worker = hasattr(session.config, "workerinput")
    if REQUIRE_GPU and not worker and not _gpu_tests_passed:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if REQUIRE_GPU and not _gpu_tests_passed:
        terminalreporter.write_line("KDKERNELS_REQUIRE_GPU=1, and no GPU test passed", red=True)

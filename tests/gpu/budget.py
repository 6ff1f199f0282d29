"""A pytest plugin for one session on a GPU: a deadline, memory given back, fresh workers.

Loaded by check.py (``-p budget``). After ``KDKERNELS_DEADLINE`` (seconds of ``time.time``) every
further test is skipped with that reason, so that what was found is reported and not killed. After
an error that poisons the process's CUDA context the worker ends, since every later test would
fail for it; pytest-xdist starts another one.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Generator
from typing import Any

import pytest
import torch

KEPT = 1 << 30
"""Bytes of the caching allocator that a test may leave to the next one of its process."""
POISON = re.compile(
    r"illegal memory access|misaligned address|unspecified launch failure|illegal instruction"
    r"|device-side assert triggered"
    r"|CUDA error: (?:an illegal|the launch timed out|hardware stack|invalid pc)"
)

_poisoned = False


def deadline() -> float:
    return float(os.environ.get("KDKERNELS_DEADLINE", "inf"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if time.time() > deadline():
        pytest.skip("the time budget is spent")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: Any) -> Generator[None, Any, None]:
    global _poisoned
    outcome = yield
    report = outcome.get_result()
    if report.failed and POISON.search(str(report.longrepr)):
        _poisoned = True


def pytest_runtest_teardown(item: pytest.Item) -> None:
    if torch.cuda.is_initialized() and not _poisoned and torch.cuda.memory_reserved() > KEPT:
        torch.cuda.empty_cache()


def pytest_runtest_logfinish(nodeid: str) -> None:
    """The reports of the test have been sent."""
    if _poisoned and "PYTEST_XDIST_WORKER" in os.environ:
        print(f"the CUDA context is lost after {nodeid}", file=sys.stderr, flush=True)
        os._exit(3)

"""The trimmed results of a run, and the ratios that are drawn from them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .contenders import COMPOSED, KERNELS

KEPT = ("loss", "workload", "shape", "dtype", "mode", "contender", "floor_bytes", "peak_bytes")
OURS = (*KERNELS, COMPOSED, "reference")
Result = dict[str, Any]


def trim(report: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
    """Reduce pytest-benchmark's report to the medians and what identifies them."""
    results = []
    for entry in report["benchmarks"]:
        stats = entry["stats"]
        results.append(
            {key: entry["extra_info"][key] for key in KEPT}
            | {"median_s": stats["median"], "iqr_s": stats["iqr"], "rounds": stats["rounds"]}
            | {"iterations": stats["iterations"]}
        )
    return {"machine": facts, "results": results}


@dataclass(frozen=True)
class Comparison:
    """All contenders at one loss, workload, dtype and mode."""

    loss: str
    workload: str
    shape: tuple[int, ...]
    dtype: str
    mode: str
    by_name: dict[str, Result]

    @property
    def ours(self) -> Result | None:
        """The library: its first backend that was timed."""
        return next((self.by_name[name] for name in OURS if name in self.by_name), None)

    def result(self, name: str) -> Result | None:
        return self.ours if name == "ours" else self.by_name.get(name)

    def seconds(self, name: str) -> float | None:
        found = self.result(name)
        return None if found is None else found["median_s"]

    def peak_bytes(self, name: str) -> int | None:
        found = self.result(name)
        return None if found is None else found["peak_bytes"]

    def gradients(self, name: str) -> float | None:
        """Peak memory as a multiple of the gradient, the least that a backward pass returns."""
        found = self.result(name)
        return None if found is None else found["peak_bytes"] / (found["floor_bytes"] / 3)

    def speedup(self, name: str) -> float | None:
        """How many times faster the library is than ``name``."""
        return ratio(self.seconds(name), self.seconds("ours"))

    def times_floor(self, name: str) -> float | None:
        """The time of ``name`` as a multiple of the floor's."""
        return ratio(self.seconds(name), self.seconds("floor"))

    def times_eager(self, name: str) -> float | None:
        """The time of ``name`` as a multiple of eager's."""
        return ratio(self.seconds(name), self.seconds("eager"))


def ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or not b else a / b


def compare(results: Iterable[Result]) -> list[Comparison]:
    """Group the results by everything but the contender, in the order of the run."""
    groups: dict[tuple[Any, ...], Comparison] = {}
    for result in results:
        key = tuple(result[name] for name in ("loss", "workload", "dtype", "mode"))
        if key not in groups:
            loss, workload, dtype, mode = key
            groups[key] = Comparison(loss, workload, tuple(result["shape"]), dtype, mode, {})
        groups[key].by_name[result["contender"]] = result
    return list(groups.values())


def select(groups: Iterable[Comparison], *, dtype: str, mode: str) -> list[Comparison]:
    return [group for group in groups if group.dtype == dtype and group.mode == mode]

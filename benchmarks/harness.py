"""What every benchmark needs: timing, peak memory, and one file format for its results."""

from __future__ import annotations

import json
import statistics
import sys
import time
import tracemalloc
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from rich.console import Console
from rich.table import Table

import rocket.usage
from rocket.reporting.environment import machine, versions

RESULTS = Path(__file__).parent / "results"


class Timing(NamedTuple):
    """Wall-clock seconds: the median of the runs, and the slowest minus the fastest."""

    median: float
    spread: float


def measure(fn: Callable[[], object], repeats: int = 5) -> Timing:
    """Time `fn` `repeats` times after one untimed call; on a GPU let `fn` end with a synchronization."""
    fn()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        fn()
        seconds.append(time.perf_counter() - start)
    return Timing(statistics.median(seconds), max(seconds) - min(seconds))


def peak_memory_mb(fn: Callable[[], object]) -> float:
    """MB (10^6 bytes) by which this process's resident memory grew at its highest during one call of `fn`.

    Counts every allocator (Python, numpy, torch, C++), not GPU memory, and not memory that was resident but free
    before the call: run it before anything else that needs as much. See `rocket.usage.measure`.
    """
    before = psutil.Process().memory_info().rss / 1e6
    with rocket.usage.measure() as usage:
        fn()
    return max(0.0, usage.peak_mb - before)


def peak_allocated_mb(fn: Callable[[], object]) -> float:
    """MB (10^6 bytes) that Python objects and numpy arrays allocated during one call of `fn` held at their highest.

    Repeatable where `peak_memory_mb` depends on what ran before, but blind to torch and C++; slows `fn` down.
    """
    tracemalloc.start()
    try:
        fn()
        return tracemalloc.get_traced_memory()[1] / 1e6
    finally:
        tracemalloc.stop()


def write_results(name: str, rows: Sequence[Mapping[str, Any]], after: str = "") -> Path:
    """Print the rows as a table and write benchmarks/results/NAME.json with what is needed to repeat them.

    rows: JSON values only; one row per configuration, columns may differ between rows.
    after: the commands that made those of the rows that this one did not.
    """
    spec = sys.modules["__main__"].__spec__
    command = " ".join(["python -m", spec.name if spec else f"benchmarks.{name}", *sys.argv[1:]])
    results = {
        "command": f"{after} ; {command}" if after else command,
        "date": datetime.now(timezone.utc).date().isoformat(),
        "machine": machine(),
        "versions": versions(),
        "rows": list(rows),
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(results, indent=1, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")
    _print_table(command, rows)
    return path


def _print_table(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(*(_cell(row.get(column)) for column in columns))
    # A pipe has no width, and 80 columns would cut the figures.
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)

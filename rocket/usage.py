"""Work while it goes on and what it took: progress bars, time, memory."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Item = TypeVar("Item")


def track(items: Iterable[Item], description: str) -> Generator[Item]:
    """Iterate with a progress bar and ETA on standard error; silent when that is no terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as progress:
        yield from progress.track(list(items), description=description)


@dataclass
class Usage:
    """What a piece of work took: wall seconds and peak memory in MB of the process, and of the GPU if there is one.

    ``energy_kwh`` and ``co2_kg`` are there where a run was told to take them, ``energy_source`` says how they were
    (`reporting.energy`).
    """

    seconds: float = 0.0
    peak_mb: float = 0.0
    gpu_peak_mb: float | None = None
    energy_kwh: float | None = None
    co2_kg: float | None = None
    energy_source: str | None = None


@contextmanager
def measure() -> Iterator[Usage]:
    """Time and peak memory of the block. Linux resets the peak; elsewhere it is the peak since the process began."""
    usage = Usage()
    with_gpu = torch.cuda.is_available()
    if with_gpu:
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    start = time.perf_counter()
    try:
        yield usage
    finally:
        usage.seconds = time.perf_counter() - start
        usage.peak_mb = _peak_resident_bytes() / 1e6
        if with_gpu:
            usage.gpu_peak_mb = torch.cuda.max_memory_allocated() / 1e6


def _peak_resident_bytes() -> int:
    told = process_bytes("VmHWM")
    if told is not None:
        return told
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def process_bytes(field: str) -> int | None:
    """A size that Linux tells of this process in /proc/self/status, such as VmRSS; None elsewhere."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    return None

"""The run directory: atomic artifacts that know which inputs made them, a lock, a log.

    config.yaml  calibration/*.safetensors  profiles/LAYER.json  plans/BUDGET.json  models/BUDGET/
    evaluation/*.json  usage.json  report.html  log.jsonl

An artifact carries the fingerprint of everything it depends on and a checksum of what it holds. `RunDirectory.read_*`
returns None when there is no artifact with that fingerprint (it must be made), and raises when there is one that was
truncated or edited. Only JSON and safetensors are read or written: nothing that executes when opened.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import resource
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rocket.config.errors import RocketError

FORMAT_VERSION = 3
UNCHECKED = "README.md"
"""What a folder's manifest leaves out: prose, which is completed and edited after the folder is whole."""
Item = TypeVar("Item")


def fingerprint(**parts: object) -> str:
    """SHA-256 over the named parts (anything JSON can hold) and the version of the artifact format.

    >>> fingerprint(a=1, b="x") == fingerprint(b="x", a=1) != fingerprint(a=2, b="x")
    True
    """
    return hashlib.sha256(_canonical({"format": FORMAT_VERSION, **parts})).hexdigest()


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=str).encode()


def file_checksum(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def _tensor_checksum(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous().cpu()
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()


class RunDirectory:
    """Everything one run made.

    ``identity`` says what the run is about (model, calibration set). Raises RocketError if the directory cannot be
    written, holds something else, belongs to a run of another identity, or is in use by another process.
    """

    def __init__(self, path: Path, identity: Mapping[str, object]) -> None:
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            is_new_lock = not (path / ".lock").exists()
            self._lock = (path / ".lock").open("w")
        except OSError as error:
            raise RocketError(f"output_dir {path} cannot be written: {error.strerror}") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise RocketError(
                f"output_dir {path} is in use by another process; wait for it or choose another"
            ) from None
        try:
            self._check_identity(dict(identity))
        except BaseException:
            self.close()
            if is_new_lock:
                (path / ".lock").unlink()
            raise

    def close(self) -> None:
        """Give the lock back."""
        self._lock.close()

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_identity(self, identity: dict[str, object]) -> None:
        content = self.read_json("run.json", expected=None)
        if content is None:
            strangers = sorted({entry.name for entry in self.path.iterdir()} - {".lock", ".run.json.tmp"})
            if strangers:
                raise RocketError(
                    f"output_dir {self.path} is not empty and holds no run (found {strangers[0]}); choose another"
                )
            self.write_json("run.json", fingerprint(), identity)
            return
        for key in sorted(identity.keys() | content.keys()):
            before, now = content.get(key), json.loads(_canonical(identity.get(key)))
            if before != now:
                raise RocketError(
                    f"output_dir {self.path} belongs to a run with {key}={before!r}, this one has {now!r}; "
                    "choose another with --set output_dir=..."
                )

    def write_text(self, name: str, text: str) -> Path:
        """Write a text file atomically; one that says the same already is left as it is."""
        path, data = self.path / name, text.encode()
        return path if path.exists() and path.read_bytes() == data else self._write(name, data)

    def write_json(self, name: str, fingerprint: str, content: Mapping[str, Any]) -> Path:
        """Write a JSON artifact atomically."""
        body = {"fingerprint": fingerprint, "checksum": hashlib.sha256(_canonical(content)).hexdigest()}
        return self._write(name, json.dumps({**body, "content": content}, indent=1, default=str).encode() + b"\n")

    def read_json(self, name: str, expected: str | None) -> dict[str, Any] | None:
        """The content of a JSON artifact, or None if there is none with the fingerprint (None: any will do)."""
        path = self.path / name
        if not path.exists():
            return None
        try:
            artifact = json.loads(path.read_bytes())
            content: dict[str, Any] = artifact["content"]
            intact = artifact["checksum"] == hashlib.sha256(_canonical(content)).hexdigest()
            found = artifact["fingerprint"]
        except (ValueError, KeyError, TypeError):
            intact, found, content = False, None, {}
        if not intact:
            raise RocketError(f"{path} is truncated or was edited; delete it and run again")
        return content if expected in (None, found) else None

    def write_tensors(self, name: str, fingerprint: str, tensors: Mapping[str, Tensor]) -> Path:
        """Write a safetensors artifact atomically."""
        tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")
        save_file(tensors, temporary, {"fingerprint": fingerprint, "checksum": _tensor_checksum(tensors)})
        _publish(temporary, path)
        return path

    def read_tensors(self, name: str, expected: str) -> dict[str, Tensor] | None:
        """The tensors of a safetensors artifact, or None if there is none with the fingerprint."""
        path = self.path / name
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("fingerprint") != expected:
                    return None
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
        except SafetensorError:
            tensors, metadata = {}, {}
        if not tensors or metadata.get("checksum") != _tensor_checksum(tensors):
            raise RocketError(f"{path} is truncated or was edited; delete it and run again")
        return tensors

    @contextmanager
    def new_directory(self, name: str, fingerprint: str) -> Iterator[Path]:
        """A folder to fill; it takes its name, with a manifest of its files (`UNCHECKED` apart) when all is written."""
        final = self.path / name
        temporary = final.with_name(f".{final.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        files = {str(file.relative_to(temporary)): file_checksum(file) for file in _files(temporary)}
        files.pop(UNCHECKED, None)
        manifest = {"fingerprint": fingerprint, "files": files}
        (temporary / "rocket-manifest.json").write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
        for file in _files(temporary):
            _sync(file)
        shutil.rmtree(final, ignore_errors=True)
        _publish(temporary, final)

    def has_directory(self, name: str, expected: str) -> bool:
        """Whether the folder is there, with this fingerprint. Raises RocketError if a file of it was changed."""
        manifest_path = self.path / name / "rocket-manifest.json"
        if not manifest_path.exists():
            return False
        try:
            manifest = json.loads(manifest_path.read_bytes())
            found, files = manifest["fingerprint"], dict(manifest["files"])
        except (ValueError, KeyError, TypeError):
            raise RocketError(f"{manifest_path} is truncated or was edited; delete {manifest_path.parent}") from None
        if found != expected:
            return False
        for file, checksum in files.items():
            path = self.path / name / file
            if not path.exists() or file_checksum(path) != checksum:
                raise RocketError(f"{path} is missing, truncated or was edited; delete {manifest_path.parent}")
        return True

    def log(self, event: str, **fields: object) -> None:
        """Append a line to log.jsonl."""
        record = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "event": event, **fields}
        with (self.path / "log.jsonl").open("a") as file:
            file.write(json.dumps(record, default=str) + "\n")

    def _write(self, name: str, data: bytes) -> Path:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_bytes(data)
        _publish(temporary, path)
        return path


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _publish(temporary: Path, path: Path) -> None:
    _sync(temporary)
    os.replace(temporary, path)
    _sync(path.parent)


def track(items: Iterable[Item], description: str, total: int | None = None) -> Iterator[Item]:
    """Iterate with a progress bar and ETA on standard error; silent when that is no terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as progress:
        if total is None:
            items = list(items)
            total = len(items)
        yield from progress.track(items, total=total, description=description)


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
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024

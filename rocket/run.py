"""The run directory: atomic artifacts that know which inputs made them, a lock, a log.

    config.yaml  original/  calibration/*.safetensors  profiles/LAYER.json  plans/BUDGET.json  models/BUDGET/
    evaluation/*.json  usage.json  report.html  log.jsonl

An artifact carries the fingerprint of everything it depends on and a checksum of its name and what it holds.
`RunDirectory.read_*` returns None when there is no artifact with that fingerprint (it must be made), and raises when
there is one that was truncated or edited. Only JSON and safetensors are read or written: nothing that executes when
opened. Nothing outside the directory is read or written, whatever its files say: there are no links in it, and names
that an artifact tells are taken only if they stay inside.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, Literal, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rocket.config.errors import RocketError, first_line

FORMAT_VERSION = 7
MANIFEST = "rocket-manifest.json"
MAX_JSON_BYTES = 1 << 25
"""Of an artifact; the plan of a model with 40 000 experts takes a quarter of it."""
_UNIQUE = secrets.token_hex(4)  # of this process, among all that write here

MADE_AT_ONCE = {"run.json", "config.yaml", "log.jsonl", "usage.json"}
"""What a run writes before it has any result."""

UNCHECKED = "README.md"
"""What a folder's manifest leaves out: prose, which is completed and edited after the folder is whole."""


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


def seal_json(name: str, fingerprint: str, content: Mapping[str, Any]) -> dict[str, Any]:
    """What a JSON artifact of this name holds: its content, what made it, and the checksum of both name and content."""
    return {"fingerprint": fingerprint, "checksum": _json_checksum(name, content), "content": content}


def _json_checksum(name: str, content: object) -> str:
    return hashlib.sha256(name.encode() + b":" + _canonical(content)).hexdigest()


def _tensor_checksum(file: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(f"{file}:".encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous().cpu()
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()


class RunDirectory:
    """Everything one run made.

    ``identity`` says what the run is about (model, calibration set). ``lock``: alone, together with others that share
    it, or under that of another process of this run. Raises RocketError if the directory cannot be
    written, holds something else, belongs to a run of another identity, or is in use by another process.
    """

    def __init__(
        self, path: Path, identity: Mapping[str, object], lock: Literal["alone", "shared"] | None = "alone"
    ) -> None:
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            is_new_lock = not (path / ".lock").exists()
            self._lock = os.fdopen(os.open(path / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "w")
        except (OSError, ValueError) as error:
            raise RocketError(f"output_dir {path} cannot be written: {_reason(error)}") from None
        try:
            if lock is not None:
                fcntl.flock(self._lock, (fcntl.LOCK_EX if lock == "alone" else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            problem = f"cannot be locked: {_reason(error)}; choose one on a file system that has locks"
            if isinstance(error, BlockingIOError):
                problem = "is in use by another process; wait for it or choose another"
            raise RocketError(f"output_dir {path} {problem}") from None
        try:
            if (path / "run.json").exists():
                self._check_files()
            self._check_identity(dict(identity), may_take_over=lock == "alone")
            if lock == "alone":
                self._clear()
        except BaseException:
            if is_new_lock:
                (path / ".lock").unlink(missing_ok=True)
            self.close()
            raise

    def _clear(self) -> None:
        """Remove what killed processes left unfinished; no other is at work here."""
        for left in [*self.path.rglob(".*.tmp"), self.path / "states"]:
            if left.is_dir():
                shutil.rmtree(left)
            else:
                left.unlink(missing_ok=True)

    def close(self) -> None:
        """Give the lock back."""
        self._lock.close()

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_files(self) -> None:
        for folder, folders, files in os.walk(self.path):
            for entry in (Path(folder, name) for name in (*folders, *files)):
                try:
                    mode = entry.lstat().st_mode
                except FileNotFoundError:  # another process of this run has renamed it
                    continue
                if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                    raise RocketError(
                        f"{entry} is a link or no plain file; rocket follows none in output_dir: remove it"
                    )

    def _check_identity(self, identity: dict[str, object], may_take_over: bool) -> None:
        content = self.read_json("run.json", expected=None)
        own = {".lock", *(entry.name for entry in self.path.glob(".run.json.*.tmp"))}  # of one killed at its start
        found = {entry.name for entry in self.path.iterdir()} - own
        # To be had: an empty one, and that of a run that failed before it made anything, of a mistyped model for one.
        if not found if content is None else may_take_over and found <= MADE_AT_ONCE:
            self.write_json("run.json", fingerprint(), identity)
            return
        if content is None:
            raise RocketError(
                f"output_dir {self.path} is not empty and holds no run (found {min(found)}); choose another"
            )
        for key in sorted(identity.keys() | content.keys()):
            before, now = content.get(key), json.loads(_canonical(identity.get(key)))
            if before != now:
                raise RocketError(
                    f"output_dir {self.path} belongs to a run with {key:.80}={before!r:.200}, this one has "
                    f"{now!r:.200}; choose another with --set output_dir=..."
                )

    def has_file(self, name: str) -> bool:
        """Whether there is an artifact of this name, made from whatever."""
        return self._inside(name).exists()

    def write_text(self, name: str, text: str) -> Path:
        """Write a text file atomically; one that says the same already is left as it is."""
        path, data = self._inside(name), text.encode()
        if path.exists() and path.read_bytes() == data:
            return path
        return self._write(name, lambda temporary: temporary.write_bytes(data))

    def write_json(self, name: str, fingerprint: str, content: Mapping[str, Any]) -> Path:
        """Write a JSON artifact atomically."""
        return self.write_text(name, json.dumps(seal_json(name, fingerprint, content), indent=1, default=str) + "\n")

    def read_json(self, name: str, expected: str | None) -> dict[str, Any] | None:
        """The content of a JSON artifact, or None if there is none with the fingerprint (None: any will do)."""
        path = self._inside(name)
        if not path.exists():
            return None
        artifact = _load_json(path)
        content = artifact.get("content")
        try:
            intact = isinstance(content, dict) and artifact.get("checksum") == _json_checksum(name, content)
        except RecursionError:
            intact = False
        if not intact:
            raise RocketError(f"{path} is truncated or was edited; delete it and run again")
        return cast(dict[str, Any], content) if expected in (None, artifact.get("fingerprint")) else None

    def write_tensors(self, name: str, fingerprint: str, tensors: Mapping[str, Tensor]) -> Path:
        """Write a safetensors artifact atomically."""
        tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        metadata = {"fingerprint": fingerprint, "checksum": _tensor_checksum(name, tensors)}
        return self._write(name, lambda temporary: save_file(tensors, temporary, metadata))

    def read_tensors(self, name: str, expected: str) -> dict[str, Tensor] | None:
        """The tensors of a safetensors artifact, or None if there is none with the fingerprint."""
        path = self._inside(name)
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("fingerprint") != expected:
                    return None
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
        except (SafetensorError, OSError, ValueError, RuntimeError):
            tensors, metadata = {}, {}
        if not tensors or metadata.get("checksum") != _tensor_checksum(name, tensors):
            raise RocketError(f"{path} is truncated or was edited; delete it and run again")
        return tensors

    def has_tensors(self, name: str, expected: str) -> bool:
        """Whether a safetensors artifact with the fingerprint is there; its tensors are not looked at."""
        path = self._inside(name)
        try:
            with safe_open(path, framework="pt") as file:
                return (file.metadata() or {}).get("fingerprint") == expected
        except (OSError, SafetensorError):
            return False

    def remove(self, name: str) -> None:
        """Remove a file or folder of the run directory, if it is there."""
        path = self._inside(name)
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    @contextmanager
    def new_directory(self, name: str, fingerprint: str) -> Iterator[Path]:
        """A folder to fill; it takes its name, with a manifest of its files but `UNCHECKED`, when all is written."""
        final = self._inside(name)
        temporary = final.with_name(f".{final.name}.{_UNIQUE}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            with _writing(final):
                temporary.mkdir(parents=True)
                yield temporary
                files = {str(file.relative_to(temporary)): file_checksum(file) for file in _files(temporary)}
                files.pop(UNCHECKED, None)
                manifest = {"fingerprint": fingerprint, "files": files}
                (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
                for file in _files(temporary):
                    _sync(file)
                shutil.rmtree(final, ignore_errors=True)
                _publish(temporary, final)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def has_directory(self, name: str, expected: str) -> bool:
        """Whether the folder is there, with this fingerprint. Raises RocketError if a file of it was changed."""
        directory = self._inside(name)
        path = directory / MANIFEST
        if not path.exists():
            return False
        manifest = _load_json(path)
        files = manifest.get("files")
        if not isinstance(files, dict):
            raise RocketError(f"{path} is truncated or was edited; delete {directory}")
        if manifest.get("fingerprint") != expected:
            return False
        checked = [file for file in _files(directory) if file not in (path, directory / UNCHECKED)]
        there = {str(file.relative_to(directory)): file for file in checked if not file.match(f".{UNCHECKED}.*.tmp")}
        for file in sorted(there.keys() | files.keys()):
            if file not in files:
                raise RocketError(f"{there[file]} was added; delete {directory}")
            if file not in there or file_checksum(there[file]) != files[file]:
                raise RocketError(f"{directory / file} is missing, truncated or was edited; delete {directory}")
        return True

    def log(self, event: str, **fields: object) -> None:
        """Append a line to log.jsonl."""
        record = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "event": event, **fields}
        path = self.path / "log.jsonl"
        with _writing(path), path.open("a") as file:
            file.write(json.dumps(record, default=str) + "\n")

    def _inside(self, name: str) -> Path:
        """The path of an artifact. Raises RocketError for a name that leads out of the directory."""
        parts = PurePosixPath(name).parts
        if not parts or "\0" in name or name.startswith("/") or ".." in parts:
            raise RocketError(
                f"{name[:200]!r} is no name of an artifact; {self.path} was edited: delete it and run again"
            )
        return self.path / name

    def _write(self, name: str, write: Callable[[Path], object]) -> Path:
        """Let ``write`` write a file under another name, and give it this one when it is on the disk."""
        path = self._inside(name)
        temporary = path.with_name(f".{path.name}.{_UNIQUE}.tmp")
        with _writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            write(temporary)
            _publish(temporary, path)
        return path


def _load_json(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file; an empty one if it holds none. Raises RocketError for what cannot be read."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise RocketError(f"{path} is larger than any that rocket writes; delete it and run again")
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise RocketError(f"{path} cannot be read: {_reason(error)}") from None
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Errors of the disk become a sentence with the file, the disk and the room left on it."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno is None:  # not from the system: from a library that reads
            raise
        raise RocketError(
            f"{path} cannot be written: {_reason(error)}{_disk_of(path)}; what was finished before is kept"
        ) from error


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or first_line(error)


def _disk_of(path: Path) -> str:
    """`` (disk mounted at /data, 12 MB free)``; nothing where that cannot be told."""
    folder = next((parent for parent in path.absolute().parents if parent.exists()), Path("/"))
    mount = next((parent for parent in (folder, *folder.parents) if os.path.ismount(parent)), folder)
    try:
        free = shutil.disk_usage(mount).free
    except OSError:
        return ""
    return f" (disk mounted at {mount}, {free / 1e6:,.0f} MB free)"


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

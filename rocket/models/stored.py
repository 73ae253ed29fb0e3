"""What a checkpoint says of itself, config.json and the headers of its files, before anything of its size is made.

Checkpoints come from strangers. transformers makes what config.json describes, and fills what the files do not hold
with random numbers; here such a checkpoint is refused, before there is memory or time to lose.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from rocket.config.errors import RocketError, first_line

INDEX = "model.safetensors.index.json"

MAX_COUNTS = {r"(layers?|blocks?|depths?|stages?)$": 2048, r"experts$": 1 << 14, r"labels$": 1 << 17}
"""How many a config.json may ask for, by the ending of the key: transformers makes a module or an entry for each."""

MAX_MISSING = 1 << 27
"""Values of a model that its checkpoint may lack: a new head, what is computed from the config. 512 MB in float32."""

MAX_CONFIG_BYTES = 1 << 26
MAX_NAME = 512


@dataclass(frozen=True)
class StoredTensor:
    """A tensor's entry in the header of its file; ``dtype`` as safetensors calls it."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def is_floating_point(self) -> bool:
        return self.dtype in ("F64", "F32", "F16", "BF16")


def read_headers(files: Iterable[str | Path]) -> dict[str, StoredTensor]:
    """The tensors of some files by name, without reading any. Raises RocketError for what is no safetensors file."""
    stored: dict[str, StoredTensor] = {}
    for file in map(Path, files):
        if file.suffix != ".safetensors":
            raise RocketError(f"{file}: only safetensors are read, which hold no code; convert it")
        try:
            with safe_open(file, framework="pt") as handle:
                for key in handle.keys():  # noqa: SIM118 (no mapping)
                    entry = handle.get_slice(key)
                    stored[key] = StoredTensor(tuple(entry.get_shape()), entry.get_dtype())
        except (SafetensorError, OSError) as error:
            raise RocketError(f"{file} is no safetensors file that can be read: {first_line(error)}") from None
    longest = max(stored, key=len, default="")
    if len(longest) > MAX_NAME:
        raise RocketError(f"the checkpoint has a tensor with a name of {len(longest):,} letters: {longest[:80]}...")
    return stored


def check_places(source: str | os.PathLike[str], files: Iterable[str | Path]) -> None:
    """Raise RocketError if a checkpoint's index leads to a file that is not in its own directory."""
    is_local = os.path.isdir(source)
    for file in files:
        root = source if is_local else _snapshot(Path(file))
        if root is None:
            inside = ".." not in Path(file).parts
        else:
            inside = os.path.abspath(file).startswith(os.path.join(os.path.abspath(root), ""))
        if not inside or len(Path(file).name) > MAX_NAME:
            raise RocketError(f"the index of {source} names {str(file)[:200]}, which is not in it")


def _snapshot(file: Path) -> Path | None:
    """The folder of the hub's cache that a file of a repository is in, .../models--OWNER--NAME/snapshots/COMMIT."""
    for number, part in enumerate(file.parts[:-2]):
        if part.startswith("models--") and file.parts[number + 1] == "snapshots":
            return Path(*file.parts[: number + 3])
    return None


def indexed_files(index: Path) -> list[Path]:
    """The files that a checkpoint's index names. Raises RocketError if one is not in the index's own directory."""
    files = sorted({index.parent / str(name) for name in json.loads(index.read_bytes())["weight_map"].values()})
    check_places(index.parent, files)
    return files


def check_config_file(file: str | Path) -> None:
    """Raise RocketError if a config.json is none, or asks for more than any model has (`check_counts`)."""
    try:
        size = os.path.getsize(file)
        if size > MAX_CONFIG_BYTES:
            raise RocketError(f"{file} has {size:,} bytes; no model needs more than {MAX_CONFIG_BYTES:,}")
        values = json.loads(Path(file).read_bytes())
    except OSError as error:
        raise RocketError(f"{file} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise RocketError(f"{file} is not JSON: {first_line(error)}") from None
    if not isinstance(values, dict):
        raise RocketError(f"{file} holds no mapping")
    check_counts(values)


def check_counts(values: Mapping[str, Any]) -> None:
    """Raise RocketError if a config asks for more layers, experts or labels than `MAX_COUNTS`.

    >>> check_counts({"text_config": {"num_hidden_layers": 10**9}})
    Traceback (most recent call last):
    rocket.config.errors.RocketError: config.json: num_hidden_layers=1000000000 is more than any model has (2048)
    """
    for key, value in values.items():
        if isinstance(value, Mapping):
            check_counts(value)
        most = next((most for ending, most in MAX_COUNTS.items() if re.search(ending, str(key))), None)
        for count in value if isinstance(value, list) else [value]:
            if most is not None and isinstance(count, int | float) and count > most:
                raise RocketError(f"config.json: {key}={count!r:.30} is more than any model has ({most})")


def check_size(missing: int) -> None:
    """Raise RocketError if a model has more values that its checkpoint does not hold than `MAX_MISSING`."""
    if missing > MAX_MISSING:
        raise RocketError(f"config.json makes a model with {missing:,} values that the checkpoint's files do not hold")


class Endings:
    """Names, to be found by what another class of models calls them: with a prefix more, or one less.

    >>> names = Endings(["model.layers.0.up", "model.layers.1.up"])
    >>> names.find("layers.1.up"), names.find("lm.model.layers.0.up"), names.find("up")
    ('model.layers.1.up', 'model.layers.0.up', None)
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._names = set(names)
        self._by_ending: dict[str, str | None] = {}
        for name in self._names:
            for ending in _endings(name)[1:]:
                self._by_ending[ending] = name if ending not in self._by_ending else None

    def find(self, name: str) -> str | None:
        """The name itself; else the longest of its endings, of two components or more, that is one; else the only name
        that ends in it."""
        shorter = (ending for ending in _endings(name) if ending in self._names and ("." in ending or ending == name))
        return next(shorter, None) or self._by_ending.get(name)


def _endings(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]

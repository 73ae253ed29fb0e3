"""Read the tensors of a CTranslate2 model file (`model.bin`)."""

from __future__ import annotations

import math
import struct
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rocket.config.errors import RocketError

OLDEST_VERSION = 4
DTYPES = {0: "<f4", 1: "<i1", 2: "<i2", 3: "<i4", 4: "<f2"}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of the file by its name; names that are aliases of others too, of the same tensor.

    Layout, all little-endian: version u32; the specification's name and its revision u32; the number of tensors u32;
    for each its name, rank u8, sizes u32, type u8, bytes u32 and values, row by row; then the number of aliases u32,
    and for each its name and the tensor's. A name is its length u16 and so many bytes, the last of which is zero.

    Raises RocketError when the file cannot be read, is shorter or longer than it says, or holds another kind of data.
    """
    try:
        reader = _Reader(path, path.read_bytes())
    except OSError as error:
        raise RocketError(f"{path}: cannot be read ({error.strerror})") from error
    version = reader.number("I")
    if version < OLDEST_VERSION:
        raise RocketError(f"{path}: CTranslate2 files of version {version} are not read; convert the model again")
    reader.name()
    reader.number("I")
    tensors = dict(reader.tensor() for _ in range(reader.number("I")))
    for _ in range(reader.number("I")):
        alias, name = reader.name(), reader.name()
        if name not in tensors:
            raise reader.damaged(f"{alias} stands for {name}, which is not there")
        tensors[alias] = tensors[name]
    reader.finish()
    return tensors


class _Reader:
    """A position in the file's bytes; nothing is taken beyond their end."""

    def __init__(self, path: Path, content: bytes) -> None:
        self._path = path
        self._content = memoryview(content)
        self._position = 0

    def number(self, kind: str) -> int:
        """An unsigned integer: B, H or I of `struct`."""
        return int(struct.unpack(f"<{kind}", self._take(struct.calcsize(f"<{kind}")))[0])

    def name(self) -> str:
        raw = bytes(self._take(self.number("H")))
        try:
            return raw.rstrip(b"\0").decode()
        except UnicodeDecodeError:
            raise self.damaged("a name is not UTF-8") from None

    def tensor(self) -> tuple[str, Tensor]:
        name = self.name()
        shape = [self.number("I") for _ in range(self.number("B"))]
        kind, size = self.number("B"), self.number("I")
        if kind not in DTYPES:
            raise self.damaged(f"{name} has the unknown type {kind}")
        dtype = np.dtype(DTYPES[kind])
        if size != math.prod(shape) * dtype.itemsize:
            raise self.damaged(f"{name} has {size} bytes, which are not {shape} values of {dtype}")
        return name, torch.from_numpy(np.frombuffer(self._take(size), dtype).reshape(shape).copy())

    def finish(self) -> None:
        if self._position != len(self._content):
            raise self.damaged(f"{len(self._content) - self._position} bytes follow its end")

    def damaged(self, what: str) -> RocketError:
        return RocketError(f"{self._path}: damaged, or no CTranslate2 model: {what}; get the file again")

    def _take(self, size: int) -> memoryview:
        end = self._position + size
        if end > len(self._content):
            raise self.damaged(f"it ends at byte {len(self._content)}, {end - len(self._content)} too early")
        start, self._position = self._position, end
        return self._content[start:end]

"""Finds and loads the compiled CPU kernels (`cpu.cpp`); without them everything still works, through torch."""

import ctypes
import functools
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any, cast

import torch

from rocket.config.errors import RocketError

logger = logging.getLogger(__name__)

PATHS = ("portable", "avx2", "avx512", "avx512_bf16", "amx")
"""Instruction sets as `Path` in cpu.cpp numbers them, each faster than those before it."""

PATH_VARIABLE = "ROCKET_KERNEL"
"""Environment variable that forces one of `PATHS`, or `torch`: no compiled kernel at all."""

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Types of x that the kernels know, as `Type` in cpu_common.h numbers them. Values are of the same type, or int8."""

_STATUS = {
    1: "offsets and values disagree: offsets must be row_offsets(mask), and its last entry the number of values",
    2: "out of memory",
    3: "this processor or this build has no such kernel, or matrices of one product do not fit together",
}

_INT, _LONG, _POINTER = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
_CHOICE = (_INT, _INT, _INT)  # path, type, threads
_INPUTS = (_POINTER, _LONG, _LONG)  # x, batch, columns
_DENSE = (_POINTER, _POINTER, _LONG)  # values, scale or null, rows
_SPARSE = (_POINTER, _POINTER, _POINTER, _POINTER, _LONG, _LONG)  # values, scale, mask, offsets, values' number, rows
_PARTS = (_POINTER, _LONG)  # an array of `Part`, see `parts`, and its length
_RESULT = (_POINTER, _POINTER)  # bias or null, y


@dataclass(frozen=True)
class Kernels:
    """One build of cpu.cpp: its functions, which raise on failure, and the instruction set to pass them."""

    path: int
    available: tuple[str, ...]
    dense_linear: Callable[..., int]
    packed_linears: Callable[..., int]
    expand: Callable[..., int]


def open_kernels(file: Path, wanted: str | None = None) -> Kernels:
    """Loads a build of cpu.cpp.

    Args:
        file: the shared library.
        wanted: one of `PATHS`; the fastest that can run here where it is None.

    Raises:
        OSError: the file cannot be loaded.
        RocketError: this processor or this build cannot run the wanted instruction set.
    """
    # torch comes first (imported above): the library's OpenMP symbols bind to the runtime that torch brought.
    library = ctypes.CDLL(str(file))
    paths = library.rocket_paths()
    available = tuple(name for i, name in enumerate(PATHS) if paths >> i & 1)
    if wanted is not None and wanted not in available:
        raise RocketError(f"{PATH_VARIABLE}={wanted} cannot run here; choose one of: torch {' '.join(available)}")

    def function(name: str, *arguments: type) -> Callable[..., int]:
        found: Any = library[name]
        found.argtypes = (*_CHOICE, *arguments)
        found.restype = _INT
        found.errcheck = _raise_status
        return cast(Callable[..., int], found)

    return Kernels(
        path=PATHS.index(wanted or available[-1]),
        available=available,
        dense_linear=function("rocket_dense_linear", *_INPUTS, *_DENSE, *_RESULT),
        packed_linears=function("rocket_packed_linears", *_INPUTS, *_PARTS),
        expand=function("rocket_expand", *_SPARSE, _LONG, _POINTER),
    )


@functools.cache
def load() -> Kernels | None:
    """The compiled kernels of this installation, or None where torch must do: not built, not loadable, or not wanted.

    Raises:
        RocketError: the environment asks for an instruction set that cannot run here.
    """
    wanted = os.environ.get(PATH_VARIABLE) or None
    if wanted == "torch":
        return None
    file = next(filter(Path.exists, (Path(__file__).with_name("_cpu" + suffix) for suffix in EXTENSION_SUFFIXES)), None)
    if file is None:
        logger.info("no compiled kernels in %s: sparse products go through torch, slowly", Path(__file__).parent)
        return None
    try:
        return open_kernels(file, wanted)
    except OSError as error:
        logger.warning("%s cannot be loaded (%s): sparse products go through torch, slowly", file, error)
        return None


PART_FIELDS = 12
"""Of a `Part`: values, scale, mask, offsets, nnz, rows, cols, bias, dictionary, dictionary's scale, rank, y."""


def parts(fields: Sequence[int]) -> Any:
    """The C array of `Part` with these fields, `PART_FIELDS` a part."""
    return (_LONG * len(fields))(*fields)


def _raise_status(status: int, function: object, arguments: tuple[object, ...]) -> int:
    if status:
        raise RuntimeError(_STATUS[status])
    return status

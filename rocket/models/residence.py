"""Models larger than memory: weights stay in the checkpoint's files until a block needs them, and go when it is done.

transformers maps safetensors into memory rather than reading them, where they need no conversion; so a model that was
just opened takes no memory, and its weights come in page by page as they are used. What is left to do is to let the
pages go again, and to copy weights to the accelerator for as long as they are needed there.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
import tempfile
import threading
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rocket.models.structure import find_blocks

MADV_DONTNEED = 4
MADV_PAGEOUT = 21
SMALL = 1 << 20
RELEASE_SECONDS = 0.1


def stream(model: nn.Module, device: torch.device, states: Path | None = None) -> None:
    """From now on the blocks of a model, on the CPU, come to ``device`` when they are called and go when they return.

    Everything outside the blocks moves to ``device`` and stays. ``states`` is a folder where hidden states wait while
    all batches pass a block in step (None: they wait in memory).
    """
    blocks = find_blocks(model)
    inside = {id(parameter) for block in blocks.values() for parameter in _tensors(block)}
    for tensor in _tensors(model):
        if id(tensor) not in inside:
            tensor.data = tensor.data.to(device)
    residence = _Residence(model, device, states)
    for block in blocks.values():
        block.register_forward_pre_hook(lambda block, _: residence.enter(block))
        block.register_forward_hook(lambda block, *_: residence.leave(block))
    model._residence = residence  # type: ignore[assignment]


def unmapped(model: nn.Module) -> str | None:
    """The name of a large tensor of a block that lies in memory instead of a mapped file; None if none does.

    Linux only; elsewhere none is found.
    """
    if not sys.platform.startswith("linux"):
        return None
    mapped = _mapped_files()
    for block, module in find_blocks(model).items():
        for name, tensor in module.named_parameters(prefix=block):
            if tensor.numel() >= SMALL and _mapped_until(tensor, mapped) is None:
                return name
    return None


def is_streamed(model: nn.Module) -> bool:
    """Whether `stream` was called for a model."""
    return _residence_of(model) is not None


def _residence_of(model: nn.Module) -> _Residence | None:
    residence: _Residence | None = getattr(model, "_residence", None)
    return residence


@contextmanager
def hold(model: nn.Module, block: str) -> Iterator[None]:
    """While it lasts, the weights of a block are on the device; a model that is not streamed is left alone."""
    residence = _residence_of(model)
    if residence is None:
        yield
        return
    module = model.get_submodule(block)
    residence.enter(module, held=True)
    try:
        yield
    finally:
        residence.leave(module, held=True)


def spill(model: nn.Module, hidden: Tensor | None) -> Spilled | None:
    """Write a hidden state to disk, if the model's wait there, and free its memory."""
    residence = _residence_of(model)
    if residence is None or residence.states is None or hidden is None:
        return None
    storage = hidden.untyped_storage()
    is_whole = storage.nbytes() == hidden.numel() * hidden.element_size() and storage.resizable()
    if not is_whole or storage.data_ptr() in residence.weights:
        return None  # a part of something else, which may be in use
    return Spilled(hidden, residence.states)


@contextmanager
def in_step(model: nn.Module) -> Iterator[None]:
    """While it lasts, blocks come and go by `hold` alone, not when they are called."""
    residence = _residence_of(model)
    if residence is None:
        yield
        return
    before, residence.in_step = residence.in_step, True
    try:
        yield
    finally:
        residence.in_step = before
        release_pages(_tensors(model))  # what is outside of blocks


class Spilled:
    """A tensor whose numbers are in a file until they are asked for; the file goes with this."""

    def __init__(self, tensor: Tensor, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=directory, delete=False) as file:
            self._path = Path(file.name)
            storage = tensor.detach().untyped_storage()
            self._bytes = storage.nbytes()
            numbers = torch.tensor([], dtype=torch.uint8, device=tensor.device).set_(storage)
            numbers.to("cpu", copy=True).numpy().tofile(file)  # what numpy has seen cannot be freed
        weakref.finalize(self, self._path.unlink, missing_ok=True)
        self._device = tensor.device
        self._like = torch.empty_like(tensor, device="meta")
        self._empty: torch.UntypedStorage | None = storage
        storage.resize_(0)

    def load(self) -> None:
        """The numbers back into the tensor, which is its own from then on."""
        if self._empty is not None:
            self._empty.resize_(self._bytes)
            self._read_into(self._empty)
            self._empty = None

    def read(self) -> Tensor:
        """A tensor like it, of its own."""
        tensor = torch.empty_like(self._like, device=self._device)
        self._read_into(tensor.untyped_storage())
        return tensor

    def _read_into(self, storage: torch.UntypedStorage) -> None:
        numbers = torch.from_file(str(self._path), shared=False, size=self._bytes, dtype=torch.uint8)
        torch.tensor([], dtype=torch.uint8, device=self._device).set_(storage).copy_(numbers)


class _Residence:
    """The blocks that are on the device now, with where their tensors were."""

    def __init__(self, model: nn.Module, device: torch.device, states: Path | None) -> None:
        self._device = device
        self.states = states
        self.weights = {tensor.untyped_storage().data_ptr() for tensor in _tensors(model)}
        self.in_step = False
        self._held: set[nn.Module] = set()
        self._homes: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {}

    def enter(self, block: nn.Module, held: bool = False) -> None:
        if self.in_step and not held:
            return
        if held:
            self._held.add(block)
        if self._device.type != "cpu" and block not in self._homes:
            self._homes[block] = [(tensor, tensor.data) for tensor in _tensors(block)]
            for tensor, home in self._homes[block]:
                tensor.data = home.to(self._device)

    def leave(self, block: nn.Module, held: bool = False) -> None:
        if self.in_step and not held:
            return
        if held:
            self._held.discard(block)
        if block in self._held:
            return
        for tensor, home in self._homes.pop(block, []):
            tensor.data = home
        release_pages(_tensors(block))


def release_pages(tensors: Iterable[Tensor]) -> None:
    """Give back the memory of tensors that lie in mapped files; the next use reads them again. Others are kept.

    Mapped weights must not have been written to: what was written would be lost. Linux only; elsewhere the system gives
    pages back by itself when memory is short.
    """
    if not sys.platform.startswith("linux"):
        return
    mapped = _mapped_files()
    for tensor in tensors:
        if tensor.device.type == "cpu" and tensor.numel():
            until = _mapped_until(tensor, mapped)
            if until is not None:
                start = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
                end = min(tensor.data_ptr() + tensor.numel() * tensor.element_size(), until)
                _madvise()(start, end - start, MADV_DONTNEED)


def _mapped_until(tensor: Tensor, mapped: Sequence[tuple[int, int]]) -> int | None:
    """The end of the mapped file that a tensor begins in; None if it lies in memory."""
    place = bisect_right(mapped, (tensor.data_ptr(), sys.maxsize)) - 1
    return mapped[place][1] if place >= 0 and tensor.data_ptr() < mapped[place][1] else None


def _mapped_files(ending: str = "") -> list[tuple[int, int]]:
    """Where files, whose names end so, are mapped, in order: (first address, end)."""
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, *_, inode = line.split(maxsplit=5)[:5]
        if inode != "0" and line.endswith(ending):
            start, end = addresses.split("-")
            found.append((int(start, 16), int(end, 16)))
    return found


@contextmanager
def releasing(model: nn.Module, *others: nn.Module) -> Iterator[None]:
    """While it lasts, pages of a streamed model, and of others in files, are given back several times a second.

    For what walks through all weights, in other libraries' code too, as saving does.
    """
    tensors = [tensor for part in (model, *others) for tensor in _tensors(part)] if is_streamed(model) else []
    with _repeating(lambda: release_pages(tensors)) if tensors else nullcontext():
        yield


@contextmanager
def releasing_files() -> Iterator[None]:
    """While it lasts, pages of mapped safetensors files are given back several times a second.

    For what reads a checkpoint through without keeping it. Others map and unmap these files meanwhile, so pages are
    only paged out, which loses nothing wherever it hits; the system does so for files of one's own.
    """
    if not sys.platform.startswith("linux"):
        yield
        return

    def release() -> None:
        for start, end in _mapped_files(".safetensors"):
            _madvise()(start, end - start, MADV_PAGEOUT)

    with _repeating(release):
        yield


@contextmanager
def _repeating(release: Callable[[], None]) -> Iterator[None]:
    """While it lasts, and once more in the end, in a thread."""
    done = threading.Event()

    def repeat() -> None:
        while not done.wait(RELEASE_SECONDS):
            release()

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        release()


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


@cache
def _madvise() -> Any:
    function = ctypes.CDLL(None).madvise
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function

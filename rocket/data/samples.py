"""Images, speech and pairs with text: what models take that do not read text alone."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, get_args

import torch

from rocket.config.errors import RocketError
from rocket.data.splits import Split, is_held_out

if TYPE_CHECKING:
    import numpy as np

SAMPLING_RATE = 16_000


@dataclass(frozen=True, eq=False)
class Sample:
    """One input of a model, with whatever is known of it.

    ``image`` is a PIL image. ``audio`` is float32 [n], mono, at 16 kHz. ``text`` is a caption, a transcript or an
    answer; ``label`` the number of a class.
    """

    text: str | None = None
    image: Any = None
    audio: np.ndarray[Any, Any] | None = None
    label: int | None = None


@dataclass(frozen=True)
class SampleCorpus:
    """What a source of samples hands over: (key, how to read the sample), to be iterated over once.

    A source may hold more than memory does, so a sample is only kept when it is called for; local files are read once
    before, for the hash of what is in them.

    ``splits`` has either ``calibration`` and ``held_out`` (or one of them), where the source brings its own splits, or
    the one key ``all``, which is split by the hash of the keys: samples of the same key are always on the same side.
    """

    splits: Mapping[Split, Iterable[tuple[str, Callable[[], Sample]]]]

    def select(self, split: Split) -> Iterator[Callable[[], Sample]]:
        """How to read each sample of a split."""
        by_hash = "all" in self.splits and split != "all"
        parts = self.splits.values() if by_hash or split == "all" else [self.splits.get(split, ())]
        for key, read in chain.from_iterable(parts):
            if not by_hash or is_held_out(key) == (split == "held_out"):
                yield read


def load_samples(source: str, split: Split, count: int | None = None, seed: int = 0) -> tuple[Sample, ...]:
    """Read the samples of a source. Memory: those that are returned, images as they are decoded.

    Args:
        source: A name of `sources.SAMPLE_SOURCES`; a folder of images, of ``.wav`` or ``.flac`` files with transcripts
            (``clip.txt`` beside ``clip.wav``, or a ``metadata.jsonl`` of ``{"file": ..., "text": ...}``); or a
            ``.jsonl`` file whose lines have an ``image`` or ``audio`` (a path, from the file's folder), and maybe a
            ``text`` and a ``label``.
        split: ``calibration``, ``held_out``, or ``all`` for the evaluation of a source that is never calibrated on.
            About 10 % is held out, by the hash of each file's bytes, unless the source brings its own splits.
        count: Samples wanted, drawn at random and in random order; fewer, if there are no more. None for all, in order.
        seed: Of the draw.

    Raises:
        RocketError: The source is unknown, not installed, malformed, or has no sample in this split.
    """
    reads = list(_select(source, split))
    if not reads:
        raise RocketError(_nothing_to_read(source, split))
    if count is not None:
        order = torch.randperm(len(reads), generator=torch.Generator().manual_seed(seed), device="cpu")
        reads = [reads[index] for index in order[:count].tolist()]
    return tuple(read() for read in reads)


def check_samples(source: str, split: Split) -> None:
    """Raise the error of `load_samples` for a source without a sample in a split, reading none."""
    if next(_select(source, split), None) is None:
        raise RocketError(_nothing_to_read(source, split))


def _select(source: str, split: Split) -> Iterator[Callable[[], Sample]]:
    from rocket.data.sources import open_samples  # here, as sources are made of samples

    if split not in get_args(Split):
        raise RocketError(f"split={split!r}: must be one of {', '.join(get_args(Split))}")
    return open_samples(source).select(split)


def _nothing_to_read(source: str, split: Split) -> str:
    return (
        f"{source}: has no sample in the {split} split; name another source for it, or, where a source is split by "
        "hash (about 10 % are held out), add samples"
    )


def key_of(content: bytes) -> str:
    """The key of a sample that is known by its content."""
    return hashlib.sha256(content).hexdigest()

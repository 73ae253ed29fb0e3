"""Images, speech and pairs with text: what models take that do not read text alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rocket.data.splits import Split

if TYPE_CHECKING:
    import numpy as np


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
    """What a source of samples hands over: (key, sample), not read before they are iterated over, and then only once.

    ``splits`` has either the keys ``calibration`` and ``held_out``, where the source brings its own splits, or the one
    key ``all``, which is split by the hash of the keys: samples of the same key are always on the same side.
    """

    splits: Mapping[Split, Iterable[tuple[str, Sample]]]

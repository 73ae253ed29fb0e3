"""What a model takes in, whatever its modality."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Sample:
    """One input: text, an image, or audio (float32 [n], mono, 16 kHz), with a class label where there is one."""

    text: str | None = None
    image: Image | None = None
    audio: np.ndarray[Any, np.dtype[np.float32]] | None = None
    label: int | None = None

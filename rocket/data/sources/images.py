"""`embedded:images`: square pieces of sixteen photographs that scikit-image and scikit-learn ship; needs no network.

It brings its own split, by photograph: ten to calibrate on, six held out, with something of each kind (people, things,
scenes, textures, instruments) on both sides. By hash, one or two would be held out. No photograph is on both sides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from rocket.data.samples import Sample, SampleCorpus
from rocket.data.sources.installed import data_folder

SIDE = 224  # pixels: what vision encoders read
PIECES = {"calibration": 32, "held_out": 8}  # of each photograph
_CALIBRATION = (
    "skimage/brick.png",
    "skimage/camera.png",
    "skimage/chelsea.png",
    "skimage/coins.png",
    "skimage/grass.png",
    "skimage/hubble_deep_field.jpg",
    "skimage/ihc.png",
    "skimage/retina.jpg",
    "skimage/rocket.jpg",
    "sklearn/flower.jpg",
)
_HELD_OUT = (
    "skimage/astronaut.png",
    "skimage/coffee.png",
    "skimage/gravel.png",
    "skimage/moon.png",
    "skimage/motorcycle_left.png",
    "sklearn/china.jpg",
)


def read() -> SampleCorpus:
    """320 samples for calibration and 48 held out, 224x224 pixels each; the key is the photograph's name.

    The first sample of a photograph is the largest square in its middle; the others are squares at random places, from
    224 pixels to the photograph's shorter side wide, half of them mirrored. Samples go round the photographs, so the
    first n are as varied as they can be. The same packages always give the same samples.
    """
    folders = {
        "skimage": data_folder("skimage", "data", "scikit-image==0.26.0"),
        "sklearn": data_folder("sklearn", "datasets/images", "scikit-learn"),
    }

    def pieces(names: Sequence[str], count: int) -> Iterator[tuple[str, Callable[[], Sample]]]:
        photographs = {name: _open(folders[name.partition("/")[0]] / name.partition("/")[2]) for name in names}
        for number in range(count):
            for name, photograph in photographs.items():
                yield name, partial(_sample, photograph, name, number)

    return SampleCorpus(
        {
            "calibration": pieces(_CALIBRATION, PIECES["calibration"]),
            "held_out": pieces(_HELD_OUT, PIECES["held_out"]),
        }
    )


def _sample(photograph: Any, name: str, number: int) -> Sample:
    return Sample(image=_middle(photograph) if number == 0 else _piece(photograph, f"{name} {number}"))


def _open(path: Path) -> Any:
    from PIL import Image  # slow to import, and most sources do without

    return Image.open(path).convert("RGB")


def _middle(photograph: Any) -> Any:
    side = min(photograph.size)
    return _square(photograph, (photograph.width - side) // 2, (photograph.height - side) // 2, side)


def _piece(photograph: Any, seed: str) -> Any:
    from PIL import ImageOps

    random = Random(seed)
    side = random.randint(SIDE, min(photograph.size))
    left, top = random.randint(0, photograph.width - side), random.randint(0, photograph.height - side)
    piece = _square(photograph, left, top, side)
    return ImageOps.mirror(piece) if random.random() < 0.5 else piece


def _square(photograph: Any, left: int, top: int, side: int) -> Any:
    from PIL import Image

    return photograph.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))

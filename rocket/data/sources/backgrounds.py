"""`embedded:backgrounds`: 25 photographs that two of Debian's packages ship, all of them held out; needs no network.

Nature, rooms and things, by several photographers: images from elsewhere than the calibration set's, each in one piece,
as `embedded:boolq` is text from elsewhere.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from rocket.config.errors import RocketError
from rocket.data.samples import Sample, SampleCorpus

FOLDER = Path("/usr/share/backgrounds")
PACKAGES = "mate-backgrounds lomiri-wallpapers-16.04"
DECODED_SIDE = 448  # pixels: JPEG files are read at the smallest scale that has so many each way
# The packages' other images are drawings and patterns.
PHOTOGRAPHS = (
    "mate/nature/Aqua.jpg",
    "mate/nature/Blinds.jpg",
    "mate/nature/Dune.jpg",
    "mate/nature/FreshFlower.jpg",
    "mate/nature/Garden.jpg",
    "mate/nature/GreenMeadow.jpg",
    "mate/nature/LadyBird.jpg",
    "mate/nature/RainDrops.jpg",
    "mate/nature/Storm.jpg",
    "mate/nature/TwoWings.jpg",
    "mate/nature/Wood.jpg",
    "mate/nature/YellowFlower.jpg",
    "Bridge_by_Sander_Klootwijk.jpg",
    "Dragonfly_by_Bolly.jpg",
    "Picture_0B_by_freespace.jpg",
    "Picture_1A_by_freespace.jpg",
    "Wine_by_Jakkub_Mede.jpg",
    "aitzgorri_by_Aitzol_Berasategi.jpg",
    "free_by_Peter_Nerlich.jpg",
    "friends_by_Aitzol_Berasategi.jpg",
    "greentock_by_Peter_Nerlich.jpg",
    "life_by_Aitzol_Berasategi.jpg",
    "picosdeeuropa_by_Aitzol_Berasategi.jpg",
    "seeding_by_Clements_Engelhardt.jpg",
    "sunset_by_Aitzol_Berasategi.jpg",
)


def read() -> SampleCorpus:
    """The key of a sample is the photograph's name. Raises RocketError if a package is not installed."""
    missing = next((path for name in PHOTOGRAPHS if not (path := FOLDER / name).is_file()), None)
    if missing is not None:
        raise RocketError(f"{missing} is not installed; on Debian: apt-get install {PACKAGES}")
    return SampleCorpus({"calibration": (), "held_out": [(name, partial(_photograph, name)) for name in PHOTOGRAPHS]})


def _photograph(name: str) -> Sample:
    from PIL import Image  # slow to import, and most sources do without

    photograph = Image.open(FOLDER / name)
    photograph.draft("RGB", (DECODED_SIDE, DECODED_SIDE))
    return Sample(image=photograph.convert("RGB"))

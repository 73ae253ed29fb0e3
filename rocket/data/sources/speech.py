"""`embedded:speech`: real English speech with transcripts, from two Debian packages.

Held out: the ten clips of pocketsphinx-testdata (five sentences of an audio book, five of spoken playing cards), and
the prompts of a telephone exchange (asterisk-core-sounds-en-wav) that have six words or more and belong to any system
but voice mail. Calibration: the prompts of voice mail, and variations of them. So no recording is on both sides, nor
any text.
"""

from __future__ import annotations

import gzip
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np

from rocket.config.errors import RocketError
from rocket.data.samples import SAMPLING_RATE, Sample, SampleCorpus
from rocket.data.sources.audio import Audio, add_noise, change_speed, join, read_wav

SHARE = Path("/usr/share")
POCKETSPHINX = "pocketsphinx/test/data"
PROMPTS = "asterisk/sounds/en_US_f_Allison"
PROMPT_TEXTS = "doc/asterisk-core-sounds-en/core-sounds-en.txt.gz"
PACKAGES = "pocketsphinx-testdata asterisk-core-sounds-en asterisk-core-sounds-en-wav"

VARIATIONS = 3
SPEEDS = (Fraction(9, 10), Fraction(1), Fraction(11, 10))
NOISE_DECIBELS = (10.0, 20.0, np.inf)
PAUSE = 0.4
WINDOW = 28.0
SEED = 0


@dataclass(frozen=True)
class Clip:
    """A recording, its transcript and what it is called."""

    name: str
    audio: Audio
    text: str

    @property
    def seconds(self) -> float:
        return len(self.audio) / SAMPLING_RATE

    @property
    def words(self) -> int:
        return len(self.text.split())


def read() -> SampleCorpus:
    """Named samples of both splits; those of calibration are windows of up to 28 s, the original recordings first.

    Raises RocketError when a package is missing.
    """
    prompts = list(read_prompts(SHARE))
    voice_mail = [clip for clip in prompts if clip.name.startswith("vm-")]
    spoken = {_letters(clip.text) for clip in voice_mail}
    held_out = list(read_pocketsphinx(SHARE)) + [
        clip
        for clip in prompts
        if not clip.name.startswith("vm-") and clip.words >= 6 and _letters(clip.text) not in spoken
    ]
    calibration = list(windows(voice_mail, "voice mail"))
    for number in range(VARIATIONS):
        calibration += vary(voice_mail, number)
    return SampleCorpus({"calibration": map(_named, calibration), "held_out": map(_named, held_out)})


def read_pocketsphinx(share: Path) -> Iterator[Clip]:
    """The clips that pocketsphinx-testdata has transcripts of; lines like `<s> two of clubs </s> (001)`."""
    for folder, transcripts in (("librivox", "transcription"), ("cards", "cards.transcription")):
        path = share / POCKETSPHINX / folder
        for line in _lines(path / transcripts):
            match = re.fullmatch(r"<s>(.*)</s>\s*\((.*)\)", line)
            if match is None:
                raise RocketError(f"{path / transcripts}: {line!r} is no transcript; install {PACKAGES} again")
            yield Clip(f"{folder}/{match[2]}", read_wav(path / f"{match[2]}.wav"), match[1].strip())


def read_prompts(share: Path) -> Iterator[Clip]:
    """The telephone prompts; those that are no speech, longer than 30 s or not just what is written are left out."""
    for line in _lines(share / PROMPT_TEXTS):
        name, _, text = line.partition(":")
        path = share / PROMPTS / f"{name}.wav"
        if line.startswith(";") or re.search(r"[\[\]()<>*#@]", text) or not path.is_file():
            continue
        clip = Clip(name, read_wav(path), " ".join(text.replace("...", " ").split()))
        if clip.seconds <= 30:
            yield clip


def windows(clips: Sequence[Clip], name: str) -> Iterator[Clip]:
    """Clips joined to windows as long as a model of 30 s takes in."""
    pending: list[Clip] = []
    number = 0
    for clip in clips:
        if pending and sum(each.seconds + PAUSE for each in pending) + clip.seconds > WINDOW:
            yield _joined(pending, f"{name} {number}")
            pending, number = [], number + 1
        pending.append(clip)
    if pending:
        yield _joined(pending, f"{name} {number}")


def vary(clips: Sequence[Clip], number: int) -> Iterator[Clip]:
    """Windows of the clips in another order, each clip at a random speed, each window with noise of a random level."""
    generator = np.random.default_rng((SEED, number))
    shuffled = [clips[index] for index in generator.permutation(len(clips))]
    spoken = [
        Clip(clip.name, change_speed(clip.audio, SPEEDS[generator.integers(len(SPEEDS))]), clip.text)
        for clip in shuffled
    ]
    for clip in windows(spoken, f"variation {number}"):
        yield Clip(clip.name, add_noise(clip.audio, generator.choice(NOISE_DECIBELS), generator), clip.text)


def _joined(clips: Sequence[Clip], name: str) -> Clip:
    return Clip(name, join([clip.audio for clip in clips], PAUSE), " ".join(clip.text for clip in clips))


def _named(clip: Clip) -> tuple[str, Callable[[], Sample]]:
    return clip.name, partial(Sample, text=clip.text, audio=clip.audio)


def _letters(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower())


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise RocketError(f"{path} is missing: apt-get install {PACKAGES}")
    content = path.read_bytes()
    text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode()
    return [line.strip() for line in text.splitlines() if line.strip()]

"""`embedded:speech`: what the Debian packages hold, and that nothing of it is on both sides."""

import gzip
from pathlib import Path

import numpy as np
import pytest

from rocket.config.errors import RocketError
from rocket.data.sources import speech
from rocket.data.sources.speech import Clip

from .test_audio import tone, write_wav


@pytest.fixture
def share(tmp_path: Path) -> Path:
    """A small /usr/share with the packages' layout."""
    for folder, file in (("librivox", "transcription"), ("cards", "cards.transcription")):
        path = tmp_path / speech.POCKETSPHINX / folder
        path.mkdir(parents=True)
        write_wav(path / "one.wav", tone(300, 16_000))
        (path / file).write_text("<s> two of clubs  </s> (one)\n")
    prompts = tmp_path / speech.PROMPTS
    (prompts / "digits").mkdir(parents=True)
    for name in ("hello", "tone", "note", "digits/1", "vm-long"):
        write_wav(prompts / f"{name}.wav", tone(300, 8_000, 31 if name == "vm-long" else 1), 8_000)
    texts = tmp_path / speech.PROMPT_TEXTS
    texts.parent.mkdir(parents=True)
    lines = [
        "; a comment",
        "",
        "hello: ...  Hello, world: again...",
        "tone: [a tone]",
        "note: press * (a note)",
        "vm-long: too long",
        "gone: not there",
        "digits/1: one",
    ]
    texts.write_bytes(gzip.compress("\n".join(lines).encode()))
    return tmp_path


def test_transcripts_are_parsed(share):
    clips = list(speech.read_pocketsphinx(share))
    assert [(clip.name, clip.text, clip.seconds) for clip in clips] == [
        ("librivox/one", "two of clubs", 1.0),
        ("cards/one", "two of clubs", 1.0),
    ]


def test_prompts_that_are_speech(share):
    clips = list(speech.read_prompts(share))
    assert [(clip.name, clip.text, len(clip.audio)) for clip in clips] == [
        ("hello", "Hello, world: again", 16_000),
        ("digits/1", "one", 16_000),
    ]


def test_package_is_missing_or_damaged(share):
    with pytest.raises(RocketError, match="is missing: apt-get install pocketsphinx-testdata asterisk-core-sounds-en "):
        list(speech.read_prompts(share / "elsewhere"))
    (share / speech.POCKETSPHINX / "cards" / "cards.transcription").write_text("two of clubs")
    with pytest.raises(RocketError, match="'two of clubs' is no transcript"):
        list(speech.read_pocketsphinx(share))


def clip(number: int, seconds: float) -> Clip:
    return Clip(f"clip {number}", tone(200 + number, 16_000, seconds), f"word{number}")


def test_windows_are_full_and_lose_nothing():
    clips = [clip(number, 1 + number % 7) for number in range(30)]
    made = list(speech.windows(clips, "window"))
    assert " ".join(window.text for window in made) == " ".join(each.text for each in clips)
    assert [window.name for window in made] == [f"window {number}" for number in range(len(made))]
    assert all(speech.WINDOW - 8 < window.seconds <= speech.WINDOW for window in made[:-1])


def test_variations_repeat_and_differ():
    clips = [clip(number, 2.0) for number in range(20)]
    first, again, second = (list(speech.vary(clips, number)) for number in (0, 0, 1))
    assert all(np.array_equal(one.audio, other.audio) for one, other in zip(first, again, strict=True))
    assert [window.text for window in first] != [window.text for window in second]
    for made in (first, second):
        assert sorted(word for window in made for word in window.text.split()) == sorted(each.text for each in clips)
        assert all(window.seconds <= speech.WINDOW for window in made)


@pytest.fixture(scope="module")
def installed():
    try:
        return {split: [(name, read()) for name, read in part] for split, part in speech.read().splits.items()}
    except RocketError as missing:
        pytest.skip(str(missing))


def test_real_clips(installed):
    held_out = [sample for _, sample in installed["held_out"]]
    assert len(held_out) == 118
    assert sum(len(sample.text.split()) for sample in held_out) == 1616
    assert held_out[1].text == "he was not an ill disposed young man"
    for _, sample in [*installed["calibration"], *installed["held_out"]]:
        assert sample.audio.dtype == np.float32
        assert 0.3 * 16_000 < len(sample.audio) <= 30 * 16_000
        assert 0.01 < np.abs(sample.audio).max() < 4


def test_calibration_and_held_out_are_disjoint(installed):
    """No recording and no text of the held-out clips is in the calibration windows, which are all voice mail."""
    voice_mail = {each.name for each in speech.read_prompts(speech.SHARE) if each.name.startswith("vm-")}
    names = {name for name, _ in installed["held_out"]}
    assert len(names) == len(installed["held_out"])
    assert not names & voice_mail
    calibration = " ".join(sample.text.lower() for _, sample in installed["calibration"])
    assert not [sample.text for _, sample in installed["held_out"] if sample.text.lower() in calibration]
    heard = np.concatenate([sample.audio for name, sample in installed["calibration"] if "voice mail" in name])
    assert _contains(heard, installed["calibration"][2][1].audio[8_000:8_064])
    for _, sample in installed["held_out"]:
        start = len(sample.audio) // 3
        assert not _contains(heard, sample.audio[start : start + 64])


def _contains(audio: np.ndarray, piece: np.ndarray) -> bool:
    """Whether a piece is somewhere in the audio, sample by sample."""
    starts = np.flatnonzero(audio[: len(audio) - len(piece)] == piece[0])
    return bool(np.abs(piece).max() > 0) and any(np.array_equal(audio[at : at + len(piece)], piece) for at in starts)

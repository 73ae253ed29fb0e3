"""Sound files, and what is made of them."""

import tracemalloc
import wave
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from rocket.config.errors import RocketError
from rocket.data.sources.audio import add_noise, change_speed, join, read_wav, resample


def tone(hertz: float, rate: int, seconds: float = 1.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(round(rate * seconds)) / rate)).astype(np.float32)


def write_wav(path: Path, audio: np.ndarray, rate: int = 16_000, channels: int = 1, width: int = 2) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes((audio * 32767).astype("<i2").tobytes())
    return path


def test_16_khz_is_read_as_it_is(tmp_path):
    audio = np.array([0, 16384, -32768, 32767], "<i2")
    path = write_wav(tmp_path / "a.wav", np.zeros(4))
    path.write_bytes(path.read_bytes()[:-8] + audio.tobytes())
    read = read_wav(path)
    assert read.dtype == np.float32
    assert read.tolist() == [0, 0.5, -1, 32767 / 32768]


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100])
def test_other_rates_become_16_khz(tmp_path, rate):
    read = read_wav(write_wav(tmp_path / "a.wav", tone(440, rate), rate))
    assert len(read) == 16_000
    # Not at the edges, where a tone that begins at once is no band-limited sound.
    assert np.abs(read - tone(440, 16_000))[200:-200].max() < 5e-3


def test_channels_are_averaged(tmp_path):
    sides = np.stack([tone(440, 8_000), np.zeros(8_000, np.float32)], axis=1)
    read = read_wav(write_wav(tmp_path / "stereo.wav", sides, 8_000, channels=2))
    assert read.shape == (16_000,)
    assert np.abs(read - tone(440, 16_000) / 2)[200:-200].max() < 5e-3


def test_a_file_without_sound(tmp_path):
    assert read_wav(write_wav(tmp_path / "a.wav", np.zeros(0), 8_000)).shape == (0,)


def test_what_does_not_fit_is_left_out():
    assert np.abs(resample(tone(6_000, 16_000), Fraction(1, 2)))[200:-200].max() < 5e-3


def test_files_that_are_none(tmp_path):
    (tmp_path / "text.wav").write_text("no sound at all")
    with pytest.raises(RocketError, match=r"text\.wav: no readable WAV file"):
        read_wav(tmp_path / "text.wav")
    (tmp_path / "empty.wav").write_text("")
    with pytest.raises(RocketError, match=r"no readable WAV file .*cut short"):
        read_wav(tmp_path / "empty.wav")
    with pytest.raises(RocketError, match="no readable WAV file"):
        read_wav(tmp_path / "nowhere.wav")
    with pytest.raises(RocketError, match=r"wide\.wav: has 32 bits a sample, not 16; convert it"):
        read_wav(write_wav(tmp_path / "wide.wav", np.zeros(8), width=4))
    path = write_wav(tmp_path / "short.wav", np.zeros(1000))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(RocketError, match="is cut short"):
        read_wav(path)


def test_speed_moves_length_and_pitch():
    faster = change_speed(tone(500, 16_000), Fraction(11, 10))
    assert len(faster) == 14_545
    spectrum = np.abs(np.fft.rfft(faster))
    assert spectrum.argmax() * 16_000 / len(faster) == pytest.approx(550, abs=2)
    assert change_speed(faster, Fraction(1)) is faster


def test_noise_has_the_level_asked_for():
    audio = tone(500, 16_000)
    noise = add_noise(audio, 20.0, np.random.default_rng(0)) - audio
    assert 10 * np.log10(np.mean(audio**2) / np.mean(noise**2)) == pytest.approx(20, abs=0.2)
    assert np.array_equal(add_noise(audio, np.inf, np.random.default_rng(0)), audio)


def test_joined_pieces_have_pauses_between_them():
    ones, twos = np.ones(3, np.float32), np.full(2, 2, np.float32)
    joined = join([ones, twos, ones], pause=1 / 4000)
    assert joined.tolist() == [1, 1, 1, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 1, 1]
    assert joined.dtype == np.float32


@pytest.mark.parametrize("rate", [44_101, 11_127])
def test_odd_rates_take_no_more_than_they_should(tmp_path, rate):
    """Transforms of 44101 x 1024 values took gigabytes for a tenth of a second."""
    path = write_wav(tmp_path / "a.wav", tone(440, rate, 0.1), rate)
    tracemalloc.start()
    read = read_wav(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.abs(read - tone(440, 16_000, 0.1))[200:-200].max() < 5e-3
    assert peak < 20e6


def test_a_file_from_a_pipe_does_not_know_its_length(tmp_path):
    path = write_wav(tmp_path / "a.wav", tone(440, 16_000))
    content = bytearray(path.read_bytes())
    content[4:8] = content[40:44] = b"\xff\xff\xff\xff"
    path.write_bytes(content)
    assert read_wav(path).shape == (16_000,)


def test_a_rate_of_zero(tmp_path):
    path = write_wav(tmp_path / "a.wav", tone(440, 16_000))
    content = bytearray(path.read_bytes())
    content[24:28] = bytes(4)
    path.write_bytes(content)
    with pytest.raises(RocketError, match="has a sampling rate of 0"):
        read_wav(path)

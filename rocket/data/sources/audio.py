"""Sound as Whisper and wav2vec2 take it: float32, mono, 16 kHz; and seeded variations of it."""

from __future__ import annotations

import wave
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from rocket.config.errors import RocketError
from rocket.data.samples import SAMPLING_RATE

FFT_BLOCK = 1024
UNTOLD_SIZE = 0xFFFFFF00  # and above: what stands in the place of a size that was not known
Audio: TypeAlias = np.ndarray[Any, np.dtype[np.float32]]


def read_wav(path: Path) -> Audio:
    """The samples [n] of a 16-bit PCM file, between -1 and 1, its channels averaged, at 16 kHz whatever its own rate.

    Raises RocketError when the file is of another kind or shorter than it says; those written into a pipe, whose
    beginning could not be completed, do not say how long they are.
    """
    try:
        with wave.open(str(path), "rb") as file:
            channels, width = file.getnchannels(), file.getsampwidth()
            rate, frames = file.getframerate(), file.getnframes()
            content = file.readframes(frames)
    except (OSError, EOFError, wave.Error) as error:
        reason = str(error) or "it is cut short"
        raise RocketError(f"{path}: no readable WAV file ({reason}); write it as 16-bit PCM") from error
    if width != 2:
        raise RocketError(f"{path}: has {8 * width} bits a sample, not 16; convert it")
    if rate < 1:
        raise RocketError(f"{path}: has a sampling rate of {rate}; write it again")
    frame = 2 * channels
    if len(content) != frame * frames and frame * frames < UNTOLD_SIZE:
        raise RocketError(f"{path}: is cut short; get the file again")
    whole = len(content) // frame * frame
    samples = np.frombuffer(content[:whole], "<i2").reshape(-1, channels) / np.float32(32768)
    return as_mono(samples, rate)


def as_mono(signal: np.ndarray[Any, Any], rate: int) -> Audio:
    """The mean [n] of the channels of a signal [frames, channels], at 16 kHz."""
    mono: Audio = signal.mean(axis=1, dtype=np.float32)
    return resample(mono, Fraction(SAMPLING_RATE, rate))


def resample(audio: Audio, ratio: Fraction) -> Audio:
    """The same sound in ``ratio`` times as many samples, band-limited: what the fewer samples cannot hold is left out.

    >>> tone = np.sin(2 * np.pi * 100 * np.arange(8192) / 8192).astype(np.float32)
    >>> expected = np.sin(2 * np.pi * 100 * np.arange(16384) / 16384)
    >>> bool(np.allclose(resample(tone, Fraction(2)), expected, atol=1e-5))
    True
    """
    if ratio == 1 or not len(audio):
        return audio
    # Lengths with small prime factors make the transforms fast; where the ratio has large ones, there are none.
    block = ratio.denominator * (FFT_BLOCK if ratio.denominator <= FFT_BLOCK else 1)
    length = -(-len(audio) // block) * block
    resampled = int(length * ratio)
    spectrum = np.fft.rfft(audio.astype(np.float64), length)[: resampled // 2 + 1]
    sound = np.fft.irfft(spectrum, resampled)[: round(len(audio) * ratio)]
    return (sound * float(ratio)).astype(np.float32)


def change_speed(audio: Audio, speed: Fraction) -> Audio:
    """Faster (above 1) or slower, as a tape would play it: the pitch changes with it.

    >>> change_speed(np.zeros(1100, np.float32), Fraction(11, 10)).shape
    (1000,)
    """
    return resample(audio, 1 / speed)


def add_noise(audio: Audio, decibels: float, generator: np.random.Generator) -> Audio:
    """White noise added so that the sound is this many decibels above it (signal-to-noise ratio)."""
    noise = generator.standard_normal(len(audio))
    level = np.sqrt(np.mean(audio.astype(np.float64) ** 2)) * 10 ** (-decibels / 20)
    noisy: Audio = (audio + level * noise).astype(np.float32)
    return noisy


def join(pieces: list[Audio], pause: float) -> Audio:
    """One after the other, with so many seconds of silence between them."""
    silence = np.zeros(round(pause * SAMPLING_RATE), np.float32)
    return np.concatenate([part for piece in pieces for part in (piece, silence)][:-1])

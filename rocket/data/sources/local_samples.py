"""A folder of images, a folder of audio with transcripts, or a .jsonl file that names images or audio."""

from __future__ import annotations

import io
import json
import wave
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rocket.config.errors import RocketError
from rocket.data.samples import SAMPLING_RATE, Sample, SampleCorpus, key_of

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
AUDIO = (".wav", ".flac")
METADATA = "metadata.jsonl"


def holds_samples(path: Path) -> bool:
    """Whether a file or folder is a source of samples rather than of text."""
    if path.is_dir():
        return any(file.suffix.lower() in (*IMAGES, *AUDIO) for file in path.rglob("*"))
    if path.suffix != ".jsonl" or not path.is_file():
        return False
    with path.open(encoding="utf-8-sig") as file:
        first = next((line for line in file if line.strip()), "{}")
    try:
        row = json.loads(first)
    except json.JSONDecodeError:
        return False
    return isinstance(row, dict) and not row.keys().isdisjoint(("image", "audio"))


def read(path: Path) -> SampleCorpus:
    """The samples of a folder, searched recursively in sorted order, or of a .jsonl file."""
    return SampleCorpus({"all": _folder(path) if path.is_dir() else _jsonl(path)})


def referenced_files(path: Path) -> list[Path]:
    """The files that a source of samples consists of, sorted."""
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.is_file())
    rows = [row for _, row in _rows(path)]
    return [path, *sorted({path.parent / row[field] for row in rows for field in ("image", "audio") if field in row})]


def _folder(path: Path) -> Iterator[tuple[str, Sample]]:
    texts = _transcripts(path)
    for file in sorted(path.rglob("*")):
        kind = "image" if file.suffix.lower() in IMAGES else "audio" if file.suffix.lower() in AUDIO else None
        if kind is not None:
            beside = file.with_suffix(".txt")
            text = beside.read_text(encoding="utf-8-sig").strip() if beside.is_file() else texts.get(file)
            yield _sample(file, kind, text, None)


def _transcripts(path: Path) -> dict[Path, str]:
    """Texts by file, from the folder's metadata.jsonl."""
    metadata = path / METADATA
    if not metadata.is_file():
        return {}
    texts = {}
    for where, row in _rows(metadata):
        if not isinstance(row.get("file"), str) or not isinstance(row.get("text"), str):
            raise RocketError(f'{where}: must have a file and a text, like {{"file": "clip.wav", "text": "..."}}')
        texts[path / row["file"]] = row["text"]
    return texts


def _jsonl(path: Path) -> Iterator[tuple[str, Sample]]:
    for where, row in _rows(path):
        kind = next((kind for kind in ("image", "audio") if isinstance(row.get(kind), str)), None)
        if kind is None:
            raise RocketError(f"{where}: names no image and no audio file; each line must")
        text, label = row.get("text"), row.get("label")
        if not isinstance(text, str | None) or not isinstance(label, int | None):
            raise RocketError(f"{where}: text must be a string and label a whole number")
        yield _sample(path.parent / row[kind], kind, text, label)


def _rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(where, row) of each line."""
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise RocketError(f"{path}:{number}: not valid JSON ({error.msg}); correct or remove it") from error
            if not isinstance(row, dict):
                raise RocketError(f"{path}:{number}: not a JSON object")
            yield f"{path}:{number}", row


def _sample(file: Path, kind: str, text: str | None, label: int | None) -> tuple[str, Sample]:
    try:
        content = file.read_bytes()
    except OSError as error:
        raise RocketError(f"{file}: cannot be read ({error.strerror})") from error
    if kind == "image":
        return key_of(content), Sample(text=text, image=_image(file, content), label=label)
    return key_of(content), Sample(text=text, audio=_audio(file, content), label=label)


def _image(file: Path, content: bytes) -> Any:
    from PIL import Image  # slow to import, and most sources do without

    try:
        return Image.open(io.BytesIO(content)).convert("RGB")
    except OSError as error:
        raise RocketError(f"{file}: no image that can be read; write it again or remove it") from error


def _audio(file: Path, content: bytes) -> np.ndarray[Any, Any]:
    signal, rate = _pcm(file, content) if file.suffix.lower() == ".wav" else _flac(file, content)
    if rate != SAMPLING_RATE:
        raise RocketError(f"{file}: is sampled at {rate} Hz, not at 16000; convert it: ffmpeg -i IN -ar 16000 OUT")
    mono: np.ndarray[Any, Any] = signal.mean(axis=1, dtype=np.float32)
    return mono


def _pcm(file: Path, content: bytes) -> tuple[np.ndarray[Any, Any], int]:
    """(signal [n, channels], Hz) of a 16-bit WAV file."""
    try:
        with wave.open(io.BytesIO(content)) as reader:
            if reader.getsampwidth() != 2:
                raise RocketError(f"{file}: has {8 * reader.getsampwidth()} bits a sample, not 16; convert it")
            frames = np.frombuffer(reader.readframes(reader.getnframes()), "<i2")
            return frames.reshape(-1, reader.getnchannels()) / np.float32(2**15), reader.getframerate()
    except (wave.Error, EOFError) as error:
        raise RocketError(f"{file}: no WAV file of 16-bit samples ({error}); convert it") from error


def _flac(file: Path, content: bytes) -> tuple[np.ndarray[Any, Any], int]:
    try:
        import soundfile
    except ImportError:
        raise RocketError(f"{file}: reading FLAC needs a package: pip install soundfile") from None
    signal, rate = soundfile.read(io.BytesIO(content), dtype="float32", always_2d=True)
    return signal, rate

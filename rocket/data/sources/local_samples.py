"""A folder of images, a folder of audio with transcripts, or a .jsonl file that names images or audio."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from rocket.config.errors import RocketError
from rocket.data.samples import Sample, SampleCorpus, key_of
from rocket.data.sources.audio import Audio, as_mono, read_wav
from rocket.data.sources.rows import in_utf8, json_rows

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
AUDIO = (".wav", ".flac")
KINDS = ("image", "audio")
METADATA = "metadata.jsonl"
METADATA_ROW = '{"file": "clip.wav", "text": "..."}'
ROW = '{"image": "cat.jpg", "text": "..."}'

Read = Callable[[], Sample]


def holds_samples(path: Path) -> bool:
    """Whether a file or folder is a source of samples rather than of text."""
    if path.is_dir():
        return any(file.suffix.lower() in (*IMAGES, *AUDIO) for file in path.rglob("*"))
    if path.suffix.lower() != ".jsonl" or not path.is_file():
        return False
    try:
        with path.open(encoding="utf-8-sig") as file:
            row = json.loads(next((line for line in file if line.strip()), "{}"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        return False
    return isinstance(row, dict) and not row.keys().isdisjoint(KINDS)


def read(path: Path) -> SampleCorpus:
    """The samples of a folder, searched recursively in sorted order, or of a .jsonl file."""
    return SampleCorpus({"all": _folder(path) if path.is_dir() else _jsonl(path)})


def referenced_files(path: Path) -> list[Path]:
    """The files that a source of samples consists of, sorted."""
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.is_file())
    values = [row.get(kind) for _, row in json_rows(path, ROW) for kind in KINDS]
    return [path, *sorted({path.parent / value for value in values if isinstance(value, str)})]


def _folder(path: Path) -> Iterator[tuple[str, Read]]:
    texts = _transcripts(path)
    for file in sorted(path.rglob("*")):
        kind = "image" if file.suffix.lower() in IMAGES else "audio" if file.suffix.lower() in AUDIO else None
        if kind is not None and not file.is_dir():
            beside = file.with_suffix(".txt")
            with in_utf8(beside):
                text = beside.read_text(encoding="utf-8-sig").strip() if beside.is_file() else texts.get(file)
            yield key_of(_content(file)), partial(_sample, file, kind, text, None)


def _transcripts(path: Path) -> dict[Path, str]:
    """Texts by file, from the folder's metadata.jsonl."""
    metadata = path / METADATA
    if not metadata.is_file():
        return {}
    texts = {}
    for where, row in json_rows(metadata, METADATA_ROW):
        if not isinstance(row.get("file"), str) or not isinstance(row.get("text"), str):
            raise RocketError(f"{where}: must have a file and a text, like {METADATA_ROW}")
        texts[path / row["file"]] = row["text"]
    return texts


def _jsonl(path: Path) -> Iterator[tuple[str, Read]]:
    for where, row in json_rows(path, ROW):
        kind = next((kind for kind in KINDS if isinstance(row.get(kind), str)), None)
        if kind is None:
            raise RocketError(f"{where}: names no image and no audio file; each line must")
        text, label = row.get("text"), row.get("label")
        if not isinstance(text, str | None) or not isinstance(label, int | None):
            raise RocketError(f"{where}: text must be a string and label a whole number")
        file = path.parent / row[kind]
        yield key_of(_content(file)), partial(_sample, file, kind, text, label)


def _content(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise RocketError(f"{file}: cannot be read ({error.strerror})") from error


def _sample(file: Path, kind: str, text: str | None, label: int | None) -> Sample:
    if kind == "image":
        return Sample(text=text, image=_image(file, _content(file)), label=label)
    audio = read_wav(file) if file.suffix.lower() == ".wav" else _flac(file, _content(file))
    return Sample(text=text, audio=audio, label=label)


def _image(file: Path, content: bytes) -> Any:
    from PIL import Image, ImageOps, UnidentifiedImageError  # slow to import, and most sources do without

    try:
        image: Any = Image.open(io.BytesIO(content))
        if image.mode == "F" or (image.mode == "I" and image.format != "PNG"):
            raise RocketError(f"{file}: has pixels of 32 bits, of a range that it does not tell; write it with 8 or 16")
        if image.mode.startswith("I"):  # 16 bits, which Pillow would cut off at 255
            image = Image.fromarray((np.asarray(image).astype(np.int32) >> 8).clip(0, 255).astype(np.uint8))
        return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = "of no known kind" if isinstance(error, UnidentifiedImageError) else error
        raise RocketError(f"{file}: no image that can be read ({reason}); write it again or remove it") from error


def _flac(file: Path, content: bytes) -> Audio:
    try:
        import soundfile
    except ImportError:
        raise RocketError(f"{file}: reading FLAC needs a package: pip install soundfile") from None
    try:
        return as_mono(*soundfile.read(io.BytesIO(content), dtype="float32", always_2d=True))
    except soundfile.SoundFileError as error:
        raise RocketError(f"{file}: no FLAC file that can be read ({error}); write it again or remove it") from error

"""Samples from folders and .jsonl files: what they hold, how they split, what is said of those that cannot be read."""

import json
import sys
import wave
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from rocket import data
from rocket.config.errors import RocketError
from rocket.data import check_samples, holds_samples, load_samples, source_stamp, sources
from rocket.data.samples import Sample, SampleCorpus


def write_image(path: Path, seed: int) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def write_audio(path: Path, signal: np.ndarray, rate: int = 16_000, width: int = 2) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1 if signal.ndim == 1 else signal.shape[1])
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes((signal * (2**15 - 1)).astype("<i2").tobytes())
    return path


@pytest.fixture
def image_folder(tmp_path) -> Path:
    folder = tmp_path / "images"
    (folder / "deeper").mkdir(parents=True)
    for number in range(40):
        write_image(folder / ("deeper" if number % 2 else "") / f"{number:02}.png", number)
    return folder


def test_a_folder_of_images(image_folder):
    (image_folder / "notes.md").write_text("no image")
    found = load_samples(str(image_folder), "all")
    assert len(found) == 40
    assert all(sample.image.size == (5, 6) and sample.image.mode == "RGB" for sample in found)
    assert all(sample.text is sample.audio is sample.label is None for sample in found)


def pixels(found: tuple[Sample, ...]) -> set[bytes]:
    return {sample.image.tobytes() for sample in found}


def test_splits_do_not_overlap_and_follow_the_content(image_folder):
    calibration, held_out = (load_samples(str(image_folder), split) for split in ("calibration", "held_out"))
    assert len(calibration) + len(held_out) == 40
    assert 0 < len(held_out) < 10
    assert not pixels(calibration) & pixels(held_out)
    first = sorted(image_folder.glob("*.png"))[0]
    first.rename(image_folder / "zzz.png")
    assert pixels(load_samples(str(image_folder), "held_out")) == pixels(held_out)


def test_audio_with_transcripts(tmp_path):
    signal = np.sin(np.arange(800) / 10).astype(np.float32)
    write_audio(tmp_path / "a.wav", signal)
    (tmp_path / "a.txt").write_text("a tone\n")
    write_audio(tmp_path / "b.wav", np.stack([signal, -signal], axis=1))
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file": "b.wav", "text": "silence"}) + "\n\n")
    write_audio(tmp_path / "c.wav", signal[:10])
    first, second, third = load_samples(str(tmp_path), "all")
    assert (first.text, second.text, third.text) == ("a tone", "silence", None)
    assert first.audio.dtype == np.float32
    np.testing.assert_allclose(first.audio, signal, atol=1e-4)
    assert np.abs(second.audio).max() < 1e-4


def test_jsonl_of_images_with_texts_and_labels(tmp_path, image_folder):
    path = tmp_path / "pairs.jsonl"
    rows = [{"image": f"images/{n:02}.png", "text": f"number {n}", "label": n} for n in (0, 2)]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    found = load_samples(str(path), "all")
    assert [(sample.text, sample.label) for sample in found] == [("number 0", 0), ("number 2", 2)]
    assert found[0].image.size == (5, 6)
    before = source_stamp(str(path))
    assert source_stamp(str(path)) == before
    write_image(image_folder / "02.png", 77)
    assert source_stamp(str(path)) != before


def test_a_field_that_is_null_names_no_file(tmp_path):
    write_audio(tmp_path / "a.wav", np.zeros(10))
    path = tmp_path / "clips.jsonl"
    path.write_text('{"image": null, "audio": "a.wav", "text": "rain"}')
    assert source_stamp(str(path)) == source_stamp(str(path))
    (sample,) = load_samples(str(path), "all")
    assert (sample.text, len(sample.audio), sample.image) == ("rain", 10, None)


def test_images_are_turned_as_the_camera_was(tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (5, 6)).save(tmp_path / "a.jpg", exif=turned)
    (sample,) = load_samples(str(tmp_path), "all")
    assert sample.image.size == (6, 5)


def test_other_rates_become_16_khz(tmp_path):
    write_audio(tmp_path / "a.wav", np.zeros(400), rate=8000)
    (sample,) = load_samples(str(tmp_path), "all")
    assert sample.audio.shape == (800,)


def test_flac(tmp_path, monkeypatch):
    class LibsndfileError(RuntimeError):
        pass

    def read(file, dtype, always_2d):
        if file.read() != b"fLaC":
            raise LibsndfileError("format not recognised")
        return np.tile(np.array([1, 0], dtype), (400, 1)), 8000

    monkeypatch.setitem(sys.modules, "soundfile", SimpleNamespace(read=read, SoundFileError=RuntimeError))
    (tmp_path / "a.flac").write_bytes(b"fLaC")
    (sample,) = load_samples(str(tmp_path), "all")
    assert sample.audio.shape == (800,)
    assert abs(sample.audio[400] - 0.5) < 0.01
    (tmp_path / "b.flac").write_bytes(b"none")
    with pytest.raises(RocketError, match=r"b\.flac: no FLAC file that can be read \(format not recognised\)"):
        load_samples(str(tmp_path), "all")


@pytest.mark.parametrize("error", [Image.DecompressionBombError, SyntaxError, ValueError])
def test_images_that_break_while_they_are_read(tmp_path, monkeypatch, error):
    def fail(_):
        raise error("broken")

    write_image(tmp_path / "a.png", 0)
    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(RocketError, match=r"a\.png: no image that can be read \(broken\)"):
        load_samples(str(tmp_path), "all")


def test_what_holds_samples(tmp_path, image_folder):
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "words"}')
    assert holds_samples(str(image_folder))
    assert not holds_samples(str(text))
    assert not holds_samples("embedded")
    assert not holds_samples("hub:owner/images")
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes(b'{"text": "caf\xe9"}')
    assert not holds_samples(str(latin))
    with pytest.raises(RocketError, match=r"text\.jsonl: holds text, not images or speech"):
        load_samples(str(text), "all")
    with pytest.raises(RocketError, match="no such source or file"):
        load_samples(str(tmp_path / "nowhere"), "all")


def test_registered_sources_keep_their_splits(monkeypatch):
    def read() -> SampleCorpus:
        part = [("a", partial(Sample, text="one")), ("b", partial(Sample, text="two"))]
        return SampleCorpus({"calibration": part[:1], "held_out": part[1:]})

    monkeypatch.setitem(sources.SAMPLE_SOURCES, "embedded:test", read)
    assert holds_samples("embedded:test")
    texts = [[sample.text for sample in load_samples("embedded:test", s)] for s in ("calibration", "held_out", "all")]
    assert texts == [["one"], ["two"], ["one", "two"]]
    monkeypatch.setitem(sources.SAMPLE_SOURCES, "embedded:test", lambda: SampleCorpus({"held_out": [("a", Sample)]}))
    with pytest.raises(RocketError, match="embedded:test: has no sample in the calibration split"):
        load_samples("embedded:test", "calibration")


def test_only_what_is_drawn_is_read(monkeypatch):
    read = []

    def sample(number: int) -> Sample:
        read.append(number)
        return Sample(label=number)

    corpus = SampleCorpus({"calibration": [(str(number), partial(sample, number)) for number in range(9)]})
    monkeypatch.setitem(sources.SAMPLE_SOURCES, "embedded:test", lambda: corpus)
    check_samples("embedded:test", "calibration")
    assert not read
    drawn = [sample.label for sample in load_samples("embedded:test", "calibration", 3, seed=1)]
    assert drawn == read
    assert len(set(drawn)) == 3
    assert [sample.label for sample in load_samples("embedded:test", "calibration", 3, seed=1)] == drawn
    assert [sample.label for sample in load_samples("embedded:test", "calibration", 3, seed=2)] != drawn
    assert sorted(sample.label for sample in load_samples("embedded:test", "calibration", 99)) == list(range(9))
    with pytest.raises(RocketError, match="embedded:test: has no sample in the held_out split"):
        check_samples("embedded:test", "held_out")


def broken_image(folder: Path) -> None:
    (folder / "a.png").write_text("no image")


def wide_audio(folder: Path) -> None:
    write_audio(folder / "a.wav", np.zeros(10), width=4)


def no_audio(folder: Path) -> None:
    (folder / "a.wav").write_text("no audio")


def no_text(folder: Path) -> None:
    write_audio(folder / "a.wav", np.zeros(10))
    (folder / "metadata.jsonl").write_text('{"file": "a.wav"}')


def latin_transcript(folder: Path) -> None:
    write_audio(folder / "a.wav", np.zeros(10))
    (folder / "a.txt").write_bytes(b"caf\xe9")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (latin_transcript, r"a\.txt: not UTF-8 text"),
        (broken_image, r"a\.png: no image that can be read"),
        (wide_audio, r"a\.wav: has 32 bits a sample, not 16"),
        (no_audio, r"a\.wav: no readable WAV file"),
        (no_text, r"metadata\.jsonl:1: must have a file and a text"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, spoil, message):
    spoil(tmp_path)
    with pytest.raises(RocketError, match=message):
        load_samples(str(tmp_path), "all")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"image": "a.png", ', r"p\.jsonl:2: not valid JSON"),
        ("[]", r"p\.jsonl:2: not a JSON object"),
        ('{"text": "b"}', r"p\.jsonl:2: names no image and no audio file"),
        ('{"image": "nowhere.png"}', r"nowhere\.png: cannot be read"),
        ('{"image": "a.png", "label": "cat"}', r"p\.jsonl:2: text must be a string and label a whole number"),
    ],
)
def test_lines_that_cannot_be_read(tmp_path, line, message):
    write_image(tmp_path / "a.png", 0)
    (tmp_path / "p.jsonl").write_text('{"image": "a.png"}\n' + line)
    with pytest.raises(RocketError, match=message):
        load_samples(str(tmp_path / "p.jsonl"), "all")


def test_nothing_held_out(tmp_path, monkeypatch):
    write_image(tmp_path / "a.png", 0)
    monkeypatch.setattr(data.samples, "is_held_out", lambda key: False)
    with pytest.raises(RocketError, match="has no sample in the held_out split"):
        load_samples(str(tmp_path), "held_out")


@pytest.mark.parametrize(("kind", "name"), [(np.uint16, "deep.png"), (np.uint16, "deep.tif")])
def test_images_of_16_bits_keep_their_shades(tmp_path, kind, name):
    shades = np.linspace(0, 65535, 256).astype(kind).reshape(16, 16)
    Image.fromarray(shades).save(tmp_path / name)
    (sample,) = load_samples(str(tmp_path), "all")
    assert sample.image.mode == "RGB"
    assert np.array_equal(np.asarray(sample.image)[..., 0].ravel(), np.arange(256))


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_images_of_32_bits_do_not_tell_their_range(tmp_path, kind):
    Image.fromarray(np.linspace(0, 1, 256).astype(kind).reshape(16, 16)).save(tmp_path / "deep.tif")
    with pytest.raises(RocketError, match=r"deep.tif: has pixels of 32 bits"):
        load_samples(str(tmp_path), "all")

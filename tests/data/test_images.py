"""Photographs: two splits that share none, the same each time, not read before they are asked for."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from rocket.config.errors import RocketError
from rocket.data.sources import backgrounds, images


@pytest.fixture(scope="module")
def packages():
    image = pytest.importorskip("PIL.Image")
    if importlib.util.find_spec("skimage") is None:
        pytest.skip("pip install --no-deps scikit-image==0.26.0")
    return image


@pytest.fixture(scope="module")
def samples(packages) -> dict[str, list]:
    return {split: [(name, read()) for name, read in part] for split, part in images.read().splits.items()}


def test_no_photograph_is_on_both_sides(samples):
    names = {split: {name for name, _ in part} for split, part in samples.items()}
    assert {split: len(part) for split, part in names.items()} == {"calibration": 10, "held_out": 6}
    assert not names["calibration"] & names["held_out"]
    pixels = {split: {sample.image.tobytes() for _, sample in part} for split, part in samples.items()}
    assert not pixels["calibration"] & pixels["held_out"]
    assert {split: len(part) for split, part in pixels.items()} == {"calibration": 320, "held_out": 48}


def test_samples_are_pieces_of_their_photographs(samples, packages):
    for part in samples.values():
        assert {(sample.image.mode, sample.image.size) for _, sample in part} == {("RGB", (224, 224))}
    # The largest square of a photograph of 640x427 pixels, by another reader and reduction.
    path = Path(importlib.util.find_spec("sklearn").origin).parent / "datasets" / "images" / "china.jpg"
    expected = packages.open(path).crop((106, 0, 533, 427)).reduce(61)
    middle = dict(reversed(samples["held_out"]))["sklearn/china.jpg"].image.reduce(32)
    assert np.abs(np.asarray(middle, dtype=float) - np.asarray(expected, dtype=float)).max() < 8


def test_first_samples_go_round_the_photographs(samples):
    assert len({name for name, _ in samples["calibration"][:10]}) == 10
    assert len({name for name, _ in samples["held_out"][:6]}) == 6


def test_samples_are_always_the_same(samples):
    again = images.read().splits["held_out"]
    for (name, read), (expected, other) in zip(again, samples["held_out"], strict=True):
        assert name == expected
        assert read().image.tobytes() == other.image.tobytes()


def test_nothing_is_opened_before_it_is_asked_for(packages, monkeypatch):
    def refuse(*_):
        raise AssertionError("opened an image")

    monkeypatch.setattr(packages, "open", refuse)
    parts = images.read().splits
    with pytest.raises(AssertionError, match="opened an image"):
        next(iter(parts["calibration"]))


def test_package_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RocketError, match=r"pip install --no-deps scikit-image==0\.26\.0"):
        images.read()


def test_backgrounds():
    if not (backgrounds.FOLDER / backgrounds.PHOTOGRAPHS[0]).is_file():
        pytest.skip(f"apt-get install {backgrounds.PACKAGES}")
    parts = backgrounds.read().splits
    assert not list(parts["calibration"])
    held_out = [(name, read()) for name, read in parts["held_out"]]
    assert len({sample.image.tobytes() for _, sample in held_out}) == len({name for name, _ in held_out}) == 25
    assert all(min(sample.image.size) >= 224 and sample.image.mode == "RGB" for _, sample in held_out)


def test_backgrounds_that_are_not_installed(monkeypatch, tmp_path):
    monkeypatch.setattr(backgrounds, "FOLDER", tmp_path)
    with pytest.raises(RocketError, match=r"Aqua\.jpg is not installed; on Debian: apt-get install mate-backgrounds"):
        backgrounds.read()

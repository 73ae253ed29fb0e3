import logging

import pytest

from rocket.config.errors import RocketError
from rocket.data import check_documents, documents, load_documents, sources
from rocket.data.splits import Corpus, is_held_out

TEXTS = [f"document number {i}" for i in range(300)]


@pytest.fixture
def source(write):
    return str(write("corpus.txt", "\n\n".join(TEXTS)))


def test_splits_share_no_document_and_lose_none(source):
    calibration, held_out = load_documents(source, "calibration"), load_documents(source, "held_out")
    assert not set(calibration) & set(held_out)
    assert sorted(calibration + held_out) == sorted(TEXTS)
    assert load_documents(source, "all") == tuple(TEXTS)


def test_about_a_tenth_is_held_out(source):
    assert 15 <= len(load_documents(source, "held_out")) <= 45


def test_equal_documents_fall_on_the_same_side():
    assert all(is_held_out(text) == is_held_out(f"\n {text}  \n") for text in TEXTS)


def test_side_of_a_document_is_fixed_for_ever():
    # Changing the hash would move calibration text into evaluation sets that users already reported numbers on.
    assert [i for i in range(40) if is_held_out(f"document number {i}")] == [20, 35, 36]


def test_blank_documents_are_dropped(write):
    path = write("rows.jsonl", '{"text": "a"}\n{"text": "  \\n"}\n{"text": null}\n{"text": "b"}\n')
    assert load_documents(str(path), "all") == ("a", "b")


def test_unknown_split(source):
    with pytest.raises(RocketError, match=r"split='test': must be one of calibration, held_out, all"):
        load_documents(source, "test")


@pytest.mark.parametrize(
    ("empty_side", "other_side", "hint"),
    [("held_out", "calibration", "evaluate on another"), ("calibration", "held_out", "name another")],
)
def test_side_left_empty_by_the_hash_split(write, empty_side, other_side, hint):
    text = next(text for text in TEXTS if is_held_out(text) == (other_side == "held_out"))
    path = write("one.txt", text)
    with pytest.raises(
        RocketError,
        match=rf"has 1 document\(s\), none of which .* {empty_side}.*; add documents, or part them by .*, or {hint}",
    ) as error:
        load_documents(str(path), empty_side)
    assert "\n" not in str(error.value)
    with pytest.raises(RocketError, match=rf"none of which .* {empty_side}"):
        check_documents(str(path), empty_side, "text")
    check_documents(str(path), other_side, "text")
    assert load_documents(str(path), other_side) == (text,)


def test_source_without_any_text(write):
    with pytest.raises(RocketError, match=r"blank\.txt: holds no text"):
        load_documents(str(write("blank.txt", " \n\n \n")), "all")


def test_streams_are_cut_when_no_number_is_given(fake_hub, monkeypatch, caplog):
    monkeypatch.setattr(documents, "STREAM_LIMIT", 5)
    fake_hub({"train": TEXTS, "test": TEXTS[:3]})
    with caplog.at_level(logging.INFO):
        assert len(load_documents("c4", "calibration")) == 5
    assert "c4: the first 5 documents of the stream" in caplog.text
    assert len(load_documents("c4", "calibration", stream_limit=7)) == 7


def test_a_source_larger_than_memory_is_thinned_evenly(monkeypatch):
    texts = [f"document {number:02d}" for number in range(20)]
    monkeypatch.setitem(sources.SOURCES, "large", lambda: Corpus({"held_out": texts, "calibration": texts}))
    monkeypatch.setattr("rocket.data.documents.MOST_CHARACTERS", 6 * len(texts[0]))
    assert load_documents("large", "held_out") == tuple(texts[::4])

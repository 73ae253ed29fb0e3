import datasets
import pytest

from rocket.config.errors import RocketError
from rocket.data import load_documents

TEXTS = [f"document number {i}" for i in range(100)]


@pytest.mark.parametrize(
    ("source", "asked"),
    [
        ("c4", ("allenai/c4", "en", True)),
        ("fineweb", ("HuggingFaceFW/fineweb", "sample-10BT", True)),
        ("alpaca", ("tatsu-lab/alpaca", None, True)),
        ("wikitext", ("Salesforce/wikitext", "wikitext-2-raw-v1", True)),
        ("hub:owner/name", ("owner/name", None, True)),
        ("hub:owner/name:config", ("owner/name", "config", True)),
    ],
)
def test_what_is_asked_of_the_hub(fake_hub, source, asked):
    calls = fake_hub({"train": TEXTS})
    load_documents(source, "all")
    assert calls == [asked]


@pytest.mark.parametrize("held_out", ["test", "validation"])
def test_native_splits_are_kept(fake_hub, held_out):
    fake_hub({"train": ["a", "b"], held_out: ["c"]})
    assert load_documents("hub:owner/name", "calibration") == ("a", "b")
    assert load_documents("hub:owner/name", "held_out") == ("c",)
    assert load_documents("hub:owner/name", "all") == ("a", "b", "c")


def test_test_split_goes_before_validation(fake_hub):
    fake_hub({"train": ["a"], "validation": ["b"], "test": ["c"]})
    assert load_documents("hub:owner/name", "held_out") == ("c",)


@pytest.mark.parametrize("source", ["fineweb", "alpaca", "hub:owner/name"])
def test_without_native_splits_documents_are_split_by_hash(fake_hub, source):
    fake_hub({"train": TEXTS})
    calibration, held_out = load_documents(source, "calibration"), load_documents(source, "held_out")
    assert held_out
    assert sorted(calibration + held_out) == sorted(TEXTS)


def test_text_field_of_a_hub_source(fake_hub):
    fake_hub({"train": ["a"]}, column="body")
    assert load_documents("hub:owner/name", "all", text_field="body") == ("a",)


def test_presets_know_their_own_field(fake_hub):
    fake_hub({"train": ["a"], "test": ["b"]})
    assert load_documents("c4", "all", text_field="body") == ("a", "b")


def test_wikitext_rows_are_joined_to_articles(fake_hub):
    rows = ["", " = One = \n", "", "words\n", " = = Section = = \n", "words\n", "", " = Two = \n", "words\n"]
    fake_hub({"train": rows, "test": rows})
    articles = load_documents("wikitext", "held_out")
    assert len(articles) == 2
    assert articles[1] == " = Two = \n\n\nwords\n"
    # The string that published wikitext-2 perplexities are measured on.
    assert "\n\n".join(articles) == "\n\n".join(rows)


def test_missing_column_lists_those_there_are(fake_hub):
    fake_hub({"train": ["a"]}, column="body")
    with pytest.raises(RocketError, match=r"owner/name: has no field 'text'; it has: body; .*text_field"):
        load_documents("hub:owner/name", "all")


def test_hub_source_without_a_name():
    with pytest.raises(RocketError, match=r"hub:: .*hub:owner/name\[:config\]"):
        load_documents("hub:", "all")


def raising(error):
    def load_dataset(*args, **options):
        raise error

    return load_dataset


@pytest.mark.parametrize("source", ["wikitext", "hub:owner/name"])
@pytest.mark.parametrize("error", [ConnectionError("Couldn't reach it\non the Hub"), RuntimeError("proxy says no")])
def test_hub_that_cannot_be_reached(monkeypatch, source, error):
    monkeypatch.setattr(datasets, "load_dataset", raising(error))
    with pytest.raises(RocketError, match=r"cannot be read from the Hugging Face hub .*`embedded`") as caught:
        load_documents(source, "all")
    assert "\n" not in str(caught.value)


def test_connection_lost_while_streaming(monkeypatch):
    def rows():
        yield {"text": "a"}
        raise ConnectionError("gone")

    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: {"train": rows()})
    with pytest.raises(RocketError, match=r"owner/name: cannot be read .*gone"):
        load_documents("hub:owner/name", "all")


def test_data_set_that_is_not_on_the_hub(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", raising(datasets.exceptions.DatasetNotFoundError("no such")))
    with pytest.raises(RocketError, match=r"owner/name: no such data set on the Hugging Face hub"):
        load_documents("hub:owner/name", "all")


def test_wrong_configuration(monkeypatch):
    error = ValueError("BuilderConfig 'x' not found.\nAvailable: ['y', 'z']")
    monkeypatch.setattr(datasets, "load_dataset", raising(error))
    with pytest.raises(RocketError, match=r"owner/name: .*Available: \['y', 'z'\].*hub:owner/name:CONFIG"):
        load_documents("hub:owner/name:x", "all")

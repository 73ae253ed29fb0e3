"""The registries of sources, of text and of samples: the name in the YAML, the `read` of the file of that name."""

import difflib
from collections.abc import Callable
from pathlib import Path

from rocket.config.errors import RocketError
from rocket.data.samples import SampleCorpus
from rocket.data.sources import (
    alpaca,
    backgrounds,
    boolq,
    c4,
    fineweb,
    hub,
    images,
    local,
    local_samples,
    mixed,
    sotu,
    speech,
    wikitext,
)
from rocket.data.splits import Corpus

SOURCES: dict[str, Callable[[], Corpus]] = {
    "embedded": sotu.read,
    "embedded:sotu": sotu.read,
    "embedded:boolq": boolq.read,
    "embedded:mixed": mixed.read,
    "wikitext": wikitext.read,
    "c4": c4.read,
    "fineweb": fineweb.read,
    "alpaca": alpaca.read,
}
SAMPLE_SOURCES: dict[str, Callable[[], SampleCorpus]] = {
    "embedded:images": images.read,
    "embedded:backgrounds": backgrounds.read,
    "embedded:speech": speech.read,
}


def open_source(source: str, text_field: str) -> Corpus:
    """Find a source by its name; names of the registry go before paths (write ./c4 for a folder of that name).

    Raises:
        RocketError: There is no such source or file.
    """
    if source in SOURCES:
        return SOURCES[source]()
    if source.startswith("hub:"):
        name, _, config = source.removeprefix("hub:").partition(":")
        return hub.read(name, config or None, text_field)
    check_source(source)
    if source in SAMPLE_SOURCES:
        raise RocketError(f"{source}: holds images or speech, not text; it is for models that take them")
    return local.read(Path(source).expanduser(), text_field)


def open_samples(source: str) -> SampleCorpus:
    """Find a source of samples by its name or path.

    Raises:
        RocketError: There is no such source, or it holds text alone.
    """
    if source in SAMPLE_SOURCES:
        return SAMPLE_SOURCES[source]()
    check_source(source)
    if not holds_samples(source):
        raise RocketError(
            f"{source}: holds text, not images or speech (such sources: {', '.join([*SAMPLE_SOURCES, 'a folder'])} "
            "of images or .wav files, or a .jsonl file that names them)"
        )
    return local_samples.read(Path(source).expanduser())


def holds_samples(source: str) -> bool:
    """Whether a source holds images or speech, maybe with text, rather than text alone."""
    if source in SAMPLE_SOURCES:
        return True
    named = source in SOURCES or source.startswith("hub:")
    return not named and local_samples.holds_samples(Path(source).expanduser())


def check_source(source: str) -> None:
    """Raise the error of `open_source` for an unknown name, without opening anything."""
    path = Path(source).expanduser()
    named = source in SOURCES or source in SAMPLE_SOURCES or source.startswith("hub:")
    if not (named or (source and path.exists())):
        raise RocketError(_unknown(source, path))


def _unknown(source: str, path: Path) -> str:
    neighbours = [str(entry) for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(source, [*SOURCES, *SAMPLE_SOURCES, *neighbours], n=1)
    question = f"; did you mean {close[0]}?" if close else ""
    return (
        f"{source!r}: no such source or file{question} (sources: {', '.join([*SOURCES, *SAMPLE_SOURCES])}, "
        f"hub:owner/name[:config], or the path of a {', '.join(local.READERS)} file or of a folder of them)"
    )

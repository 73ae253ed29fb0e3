"""From the name of a source to its documents."""

import logging
from itertools import islice
from pathlib import Path
from typing import get_args

from rocket.config.errors import RocketError
from rocket.data.sources import holds_samples, local_samples, open_source
from rocket.data.splits import Corpus, Split

logger = logging.getLogger(__name__)

# Several million tokens of web pages, more than calibration needs; all of fineweb would not fit in memory.
STREAM_LIMIT = 10_000
MOST_CHARACTERS = 1 << 28
"""Kept of a source: more than calibration and evaluation ever use."""


def load_documents(
    source: str,
    split: Split,
    *,
    text_field: str = "text",
    stream_limit: int | None = None,
) -> tuple[str, ...]:
    """Read the documents of a source, each a text.

    Of sources beyond `MOST_CHARACTERS` every second document is read, or every fourth, and so on.
    Held-out text never overlaps calibration text. Sources without splits of their own are split by the hash of each
    document: about 10 % is held out, equal documents always fall on the same side, whatever else the source holds.
    Sources on the hub that have splits keep them; being streamed, they are not searched for documents that are in both.

    Args:
        source: `embedded` (or `embedded:sotu`; presidential addresses), `embedded:boolq` (Wikipedia passages),
            `embedded:mixed` (prose of many kinds, none of it Wikipedia's); `wikitext`, `c4`, `fineweb`, `alpaca`;
            `hub:owner/name[:config]` for any other data set on the Hugging Face hub; or the path of a .txt, .jsonl or
            .parquet file, or of a folder of them (searched recursively, in sorted order). A .txt file is one document,
            unless it is the only file: then blank lines part the documents.
        split: `calibration`, `held_out`, or `all` for the evaluation of a source that is never calibrated on.
        text_field: The column that holds the text, for .jsonl, .parquet and `hub:` sources.
        stream_limit: Documents to take of a source on the hub, which is streamed; by default 10000.

    Raises:
        RocketError: The source is unknown, unreachable, not installed, malformed, or has no document in this split.

    >>> import pathlib, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder, "notes.txt")
    ...     _ = path.write_text("A first note.\\n\\nA second one.")
    ...     load_documents(str(path), "all")
    ('A first note.', 'A second one.')
    """
    corpus = _open(source, split, text_field)
    limit = (stream_limit or STREAM_LIMIT) if corpus.streamed else None
    texts: list[str] = []
    seen, found, characters, step = 0, 0, 0, 1
    for text, wanted in corpus.select(split):
        seen += 1
        if not wanted:
            continue
        if found % step == 0:
            texts.append(text)
            characters += len(text)
        found += 1
        if len(texts) == limit:
            logger.info("%s: the first %d documents of the stream", source, limit)
            break
        if characters > MOST_CHARACTERS and len(texts) > 1:
            texts, step = texts[::2], 2 * step
            characters = sum(map(len, texts))
    if not texts:
        raise RocketError(_nothing_to_read(source, split, seen))
    if step > 1:
        logger.info("%s: one in %d of its %d documents, to fit in memory", source, step, found)
    return tuple(texts)


def check_documents(source: str, split: Split, text_field: str) -> None:
    """Raise the error of `load_documents` for a source without a document in a split, reading no further than one."""
    seen = 0
    for _, wanted in islice(_open(source, split, text_field).select(split), STREAM_LIMIT):
        seen += 1
        if wanted:
            return
    raise RocketError(_nothing_to_read(source, split, seen))


def _open(source: str, split: Split, text_field: str) -> Corpus:
    if split not in get_args(Split):
        raise RocketError(f"split={split!r}: must be one of {', '.join(get_args(Split))}")
    return open_source(source, text_field)


def _nothing_to_read(source: str, split: Split, seen: int) -> str:
    if not seen:
        return f"{source}: holds no text; name a source that does"
    other = "evaluate on another source (in Python: split='all')" if split == "held_out" else "name another source"
    if source.lower().endswith(".txt"):
        other = f"part them by blank lines, or {other}"
    return (
        f"{source}: has {seen} document(s), none of which falls into the {split} split (about 10 % are held out, by "
        f"their hash); add documents, or {other}"
    )


def source_stamp(source: str) -> list[str]:
    """What tells that a local source changed, without reading it: names, sizes and times of its files.

    Empty for every other source: packages and hub data sets are known by their name.
    """
    path = Path(source).expanduser()
    if path.exists() and holds_samples(source):
        files = local_samples.referenced_files(path)
    else:
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return [
        f"{file}:{file.stat().st_size}:{file.stat().st_mtime_ns}"
        for file in files
        if file.is_file() and not source.startswith("hub:")
    ]

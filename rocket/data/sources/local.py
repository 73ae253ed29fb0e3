"""A path: a .txt, .jsonl or .parquet file, or a folder of them."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from rocket.config.errors import RocketError, first_line
from rocket.data.sources.rows import in_utf8, json_rows, no_such_field, text_of
from rocket.data.splits import Corpus

Reader = Callable[[Path, str], Iterator[str]]


def read(path: Path, text_field: str) -> Corpus:
    """Find the files: in a folder recursively, sorted by path."""
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in READERS and not file.is_dir())
    elif path.suffix.lower() in READERS:
        files = [path]
    else:
        raise RocketError(f"{path}: cannot read files of this kind; give one of {', '.join(READERS)}")
    if not files:
        raise RocketError(f"{path}: no {', '.join(READERS)} file in this folder")
    only_file_is_txt = [file.suffix.lower() for file in files] == [".txt"]
    readers = {".txt": _paragraphs} if only_file_is_txt else READERS
    return Corpus({"all": _texts(files, readers, text_field)})


def _texts(files: list[Path], readers: Mapping[str, Reader], text_field: str) -> Iterator[str]:
    for path in files:
        try:
            with in_utf8(path):
                yield from readers[path.suffix.lower()](path, text_field)
        except OSError as error:
            raise RocketError(f"{path}: cannot be read ({error.strerror or first_line(error)})") from error


def _whole(path: Path, _text_field: str) -> Iterator[str]:
    yield path.read_text(encoding="utf-8-sig")


def _paragraphs(path: Path, _text_field: str) -> Iterator[str]:
    lines: list[str] = []
    with path.open(encoding="utf-8-sig") as file:
        for line in file:
            if line.strip():
                lines.append(line)
            elif lines:
                yield "".join(lines).rstrip("\n")
                lines = []
    yield "".join(lines).rstrip("\n")


def _jsonl(path: Path, text_field: str) -> Iterator[str]:
    for where, row in json_rows(path, f"{{{text_field!r}: ...}}"):
        yield text_of(row, text_field, where)


def _parquet(path: Path, text_field: str) -> Iterator[str]:
    import pyarrow  # slow to import, and most sources do without
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            if text_field not in table.schema_arrow.names:
                raise no_such_field(text_field, table.schema_arrow.names, str(path))
            for batch in table.iter_batches(columns=[text_field]):
                for row in batch.to_pylist():
                    yield text_of(row, text_field, str(path))
    except pyarrow.ArrowInvalid as error:
        raise RocketError(f"{path}: not a readable parquet file; write it again") from error


READERS: Mapping[str, Reader] = {".txt": _whole, ".jsonl": _jsonl, ".parquet": _parquet}

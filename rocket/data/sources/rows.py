"""Rows of a .jsonl file, and the text of one row of a table."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rocket.config.errors import RocketError, first_line


@contextmanager
def in_utf8(path: Path) -> Iterator[None]:
    """Reads a file's text. Raises RocketError if it is in another encoding than UTF-8."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise RocketError(f"{path}: not UTF-8 text ({error.reason}); convert it, for example with iconv") from error


def json_rows(path: Path, example: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(where, row) of each line that is not blank; ``example`` is what a line could be.

    Raises:
        RocketError: A line is no JSON object, or the file is not UTF-8.
    """
    with path.open(encoding="utf-8-sig") as file, in_utf8(path):
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                reason = error.msg if isinstance(error, json.JSONDecodeError) else first_line(error)
                raise RocketError(f"{where}: not valid JSON ({reason}); correct or remove the line") from error
            if not isinstance(row, dict):
                raise RocketError(f"{where}: not a JSON object; each line must be one, like {example}")
            yield where, row


def text_of(row: Mapping[str, Any], field: str, where: str) -> str:
    """Read the text of a row; a null is an empty text.

    Raises:
        RocketError: The row has no such field, or it holds something else; `where` names the row.
    """
    if field not in row:
        raise no_such_field(field, list(row), where)
    value = row[field]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise RocketError(f"{where}: field {field!r} holds {type(value).__name__}, not text; name another text_field")
    # JSON can escape half a surrogate pair, web crawls do, and tokenizers refuse it.
    return value.encode("utf-8", "replace").decode("utf-8")


def no_such_field(field: str, fields: list[str], where: str) -> RocketError:
    return RocketError(f"{where}: has no field {field!r}; it has: {', '.join(sorted(fields))}; name one as text_field")

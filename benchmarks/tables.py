"""Results as Markdown tables; `docs/generate.py` writes them into the README and the docs."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.harness import RESULTS

Row = Mapping[str, Any]


def pivot(
    results: Iterable[Row],
    rows: Sequence[str],
    values: Sequence[str],
    columns: str | None = None,
    where: Mapping[str, Sequence[Any]] | None = None,
    format: str = ".3g",
    spread: bool = False,
    stacked: bool = False,
) -> str:
    """A Markdown table: a line for each combination of the fields ``rows``, a column for each value of ``columns``.

    ``columns`` is a number. A cell is the mean of a field of ``values`` over all results that belong there (seeds,
    say), with the least and the greatest behind it if ``spread``; results without the field are passed over. ``where``
    chooses by a field's values, and orders by the order that it names them in; else lines come as the results do.
    Several ``values`` stand side by side, or, ``stacked``, on a line each. Raises ValueError if nothing is left.

    >>> print(pivot([{"m": "a", "size": 0.2, "x": 1.0}, {"m": "a", "size": 0.2, "x": 2.0}], ["m"], ["x"], "size"))
    | m | size 0.2 |
    | --- | --- |
    | a | 1.5 |
    """
    where = where or {}
    found: dict[tuple[Any, ...], dict[tuple[Any, str], list[Any]]] = {}
    for result in results:
        if any(result.get(field) not in allowed for field, allowed in where.items()):
            continue
        for value in values:
            if result.get(value) is not None:
                at = _key(result.get(columns)) if columns else None
                key, head = tuple(_key(result.get(field)) for field in rows), (at, value)
                if stacked:
                    key, head = (*key, _words(value)), (at, "")
                found.setdefault(key, {}).setdefault(head, []).append(result[value])
    if not found:
        raise ValueError(f"no result has {' or '.join(values)} where {dict(where)}")
    heads = list(dict.fromkeys(head for line in found.values() for head in line))
    heads.sort(key=lambda head: (head[0] or 0.0, stacked or values.index(head[1])))
    orders = [where.get(field) for field in rows]
    keys = sorted(
        found, key=lambda key: [order.index(part) if order else 0 for part, order in zip(key, orders, strict=False)]
    )
    titles = [_title(columns, *head, alone=stacked or len(values) == 1) for head in heads]
    names = [*map(_words, rows), *([""] if stacked else [])]
    lines = [[*names, *titles], ["---"] * (len(names) + len(heads))]
    lines += [
        [*(_cell([part], "", False) for part in key), *(_cell(found[key].get(head), format, spread) for head in heads)]
        for key in keys
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def source(file: str) -> str:
    """Where a result file's figures come from, as Markdown: machine, versions, date and the commands that made it."""
    results = json.loads((RESULTS / file).read_text(encoding="utf-8"))
    machine = results["machine"]
    parts = [machine["cpu"], f"{machine['cores']} cores", f"{machine['memory_gib']} GiB", machine["gpu"] or "no GPU"]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items() if version)
    commands = "\n".join(results["command"].split(" ; "))
    return (
        f"[{file}](../benchmarks/results/{file}), {results['date']}, on {', '.join(parts)}; {versions}.\n\n"
        f"<!-- not run: the measurement itself -->\n```bash\n{commands}\n```"
    )


def table(file: str, **choice: Any) -> str:
    """`pivot` of a file in benchmarks/results."""
    return pivot(json.loads((RESULTS / file).read_text(encoding="utf-8"))["rows"], **choice)


def _key(value: Any) -> Any:
    """Sizes that were aimed at alike belong together, though they were met to the fourth digit only."""
    return round(value, 3) if isinstance(value, float) else value


def _title(columns: str | None, at: Any, value: str, alone: bool) -> str:
    if columns is None:
        return _words(value)
    where = f"{100 * at:.0f} % removed" if columns.endswith("removed_ratio") else f"{_words(columns)} {at}"
    return where if alone else f"{_words(value)}, {where}"


def _words(field: str) -> str:
    return field.replace("_", " ")


def _cell(values: Sequence[Any] | None, format: str, spread: bool) -> str:
    if not values:
        return ""
    if not all(isinstance(value, int | float) for value in values):
        return ", ".join(dict.fromkeys("" if value is None else str(value) for value in values))
    mean = values[0] if len(values) == 1 else statistics.mean(values)
    text = f"{mean:{format}}"
    return f"{text} ({min(values):{format}} to {max(values):{format}})" if spread and len(values) > 1 else text

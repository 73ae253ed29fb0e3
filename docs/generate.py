"""Writes the parts of README.md and docs/ that follow from code and results, between their markers:

    <!-- config -->               every key of the config, from rocket/config/schema.py
    <!-- commands -->             every command and its options
    <!-- source: FILE -->         machine, versions, date and commands of a file in benchmarks/results
    <!-- table: {file: ...} -->   a table of one; the arguments of benchmarks.tables.table, as YAML
    <!-- end -->

`make docs` runs it. tests/test_docs.py fails where a page is not what it would write.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import typer
import yaml
from pydantic import BaseModel

from benchmarks.tables import source, table
from rocket.config.schema import Config
from rocket.scripts.main import main as rocket_command

ROOT = Path(__file__).parents[1]
PROJECT = ROOT / "pyproject.toml"
MARKED = re.compile(r"(<!-- (config|commands|source|table)(?:: ([^\n]*))? -->\n).*?(<!-- end -->)", re.DOTALL)


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def filled(text: str) -> str:
    """A page with what belongs between its markers."""
    makers: dict[str, Callable[[str], str]] = {
        "config": lambda _: config_reference(),
        "commands": lambda _: command_reference(),
        "source": source,
        "table": lambda choice: table(**yaml.safe_load(choice)),
    }
    return MARKED.sub(lambda found: f"{found[1]}\n{makers[found[2]](found[3])}\n\n{found[4]}", text)


def config_reference() -> str:
    """Each section of the config: what it is, an example, a table of its keys."""
    schema = Config.model_json_schema()
    parts = [_keys("", Config, schema)]
    for name, field in Config.model_fields.items():
        for kind in (field.annotation, *get_args(field.annotation)):  # a section that may be null is one of its choices
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                parts += [f"## {name}", inspect.getdoc(kind) or "", _keys(name, kind, schema)]
    return "\n\n".join(parts)


def _keys(section: str, model: type[BaseModel], schema: dict[str, Any]) -> str:
    properties = (schema["$defs"][model.__name__] if section else schema)["properties"]
    lines = ["| key | type | default | |", "| --- | --- | --- | --- |"]
    for name, field in model.model_fields.items():
        if field.description is not None:
            key = f"{section}.{name}" if section else name
            default = field.get_default(call_default_factory=True)
            shown = json.dumps(str(default) if isinstance(default, Path) else default)
            description = field.description.replace("|", "\\|")
            lines.append(f"| `{key}` | {_type(properties[name])} | `{shown}` | {description} |")
    return "\n".join(lines)


TECHNICAL = 2**31 - 1  # a bound that is there against overflow, not of interest
LIMITS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


def _type(described: dict[str, Any]) -> str:
    """A JSON schema in a few words.

    >>> _type({"type": "array", "items": {"type": "number", "exclusiveMinimum": 0.0}})
    'list of number > 0'
    """
    if "anyOf" in described:
        return " or ".join(_type(choice) for choice in described["anyOf"])
    if "$ref" in described:
        return "section"
    if "enum" in described:
        return ", ".join(f"`{choice}`" for choice in described["enum"])
    if described["type"] == "array":
        return f"list of {_type(described['items'])}"
    limits = [
        f"{sign} {described[limit]:g}" for limit, sign in LIMITS.items() if described.get(limit, TECHNICAL) < TECHNICAL
    ]
    return " ".join([described["type"], ", ".join(limits)]).strip()


def command_reference() -> str:
    """Each command: what it does, its options, and the console script that is the same."""
    found = re.findall(r'^(rocket-[\w-]+) = "([\w.]+):main"$', PROJECT.read_text(encoding="utf-8"), re.MULTILINE)
    scripts = {module: script for script, module in found}
    group = typer.main.get_command(rocket_command)
    parts = []
    for name, command in group.commands.items():
        context = command.make_context(f"rocket {name}", [], resilient_parsing=True)
        same = scripts.get(command.callback.__module__)
        also = f" Also called `{same}`." if same else ""
        options = "\n".join(f"- {line}" for line in _options(command, context))
        parts.append(f"## rocket {name}\n\n{inspect.cleandoc(command.help)}{also}\n\n{options}")
    return "\n\n".join(parts)


def _options(command: Any, context: Any) -> Iterator[str]:
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if record is not None and "--help" not in parameter.opts:
            yield f"`{record[0]}`: {record[1]}"


def main() -> None:
    for path in pages():
        text = path.read_text(encoding="utf-8")
        new = filled(text)
        if new != text:
            path.write_text(new, encoding="utf-8")
            print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()

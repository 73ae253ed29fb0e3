"""From a YAML file and ``--set key=value`` overrides to a `Config`, or to one line that says what is wrong."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from rocket.config.errors import RocketError
from rocket.config.schema import Config

MAX_FILE_BYTES = 1_000_000
MAX_QUOTED = 200
HINTS = {
    "list_type": "must be a list; write [a, b]",
    "model_type": "must be a section of keys and values",
    "path_type": "must be the path of a file or folder",
    "bool_parsing": "must be true or false",
}
"""Of pydantic's kinds of errors, what its words do not tell those who write YAML."""

# The constructors of PyYAML raise whatever int(), float() or a dictionary raises on what they are given.
_NOT_YAML = (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, RecursionError)


def load_config(path: Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read a config file (None: all defaults) and apply overrides such as ``calib.num_samples=64``.

    Raises RocketError naming the key, its value and, for a misspelt key, the likely right one.
    """
    values: dict[str, Any] = {}
    if path is not None:
        values = read_yaml(path)
    for override in overrides:
        _apply(values, override)
    values = {key: value for key, value in values.items() if value is not None or not _has_defaults(key)}
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise RocketError(explain_invalid(error)) from None


def _has_defaults(key: object) -> bool:
    """Whether a key names a section that is there by default, so that an empty one says nothing."""
    field = Config.model_fields.get(str(key))
    return field is not None and isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises RocketError if it is missing, no YAML, or no mapping."""
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise RocketError(f"config file {path} has {size:,} bytes; a config has at most {MAX_FILE_BYTES:,}")
        values = _parse(path.read_text())
    except OSError as error:
        raise RocketError(f"config file {path}: {error.strerror}") from None
    except _NOT_YAML as error:
        raise RocketError(f"config file {path} is not YAML: {_shortened(' '.join(str(error).split()))}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise RocketError(f"config file {path} holds a {type(values).__name__}; expected keys and values")
    return values


class _Loader(yaml.SafeLoader):
    """YAML without aliases: a few lines of them are a value that takes forever to print."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not read; write the value out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        """Refuses a key that is there twice, whose first value YAML would forget."""
        seen: set[object] = set()
        for key_node, _ in node.value:
            if key_node.tag != "tag:yaml.org,2002:merge":
                key = self.construct_object(key_node, deep=True)
                if key in seen:
                    raise yaml.YAMLError(f"{key} is there twice; write one of it")
                seen.add(key)
        return super().construct_mapping(node, deep)


def _parse(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)  # a subclass of SafeLoader


def _shortened(text: str) -> str:
    return text if len(text) <= MAX_QUOTED else f"{text[:MAX_QUOTED]}..."


def dump_config(config: Config) -> str:
    """The resolved config as YAML that `load_config` reads back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _apply(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    override = _shortened(" ".join(override.split()))
    if not separator or not key:
        raise RocketError(f"--set {override}: write key=value, for example --set calib.num_samples=64")
    try:
        value = _parse(text)
    except _NOT_YAML:
        value = text
    *parents, leaf = key.strip().split(".")
    section = values
    for parent in parents:
        if section.get(parent) is None:  # absent, or a section that is left out by null
            section[parent] = {}
        section = section[parent]
        if not isinstance(section, dict):
            raise RocketError(f"--set {override}: {parent} is not a section")
    if parents == ["compression"] and leaf in ("removed_ratio", "kept_parameters", "bytes"):
        section.clear()  # the three are alternatives: an override replaces the budget of the file
    section[leaf] = value


def explain_invalid(error: ValidationError, whole: str = "config") -> str:
    """What is wrong, in one line: each key with its value; ``whole`` is what all keys are of."""
    return "; ".join(_explain(dict(item), whole) for item in error.errors()[:3])


def _explain(item: dict[str, Any], whole: str) -> str:
    location = tuple(_shortened(str(part)) for part in item["loc"])
    key = ".".join(location) or whole
    if item["type"] == "extra_forbidden":
        known = _known_keys(location[:-1])
        close = difflib.get_close_matches(location[-1], known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}"
        return f"unknown key {key!r}: {hint}"
    message = HINTS.get(item["type"]) or _shortened(item["msg"].removeprefix("Value error, "))
    return (
        f"{key}={_shortened(_quoted(item['input']))}: {message}"
        if location and not isinstance(item["input"], dict)
        else f"{key}: {message}"
    )


def _quoted(value: object) -> str:
    try:
        return repr(value)
    except ValueError:  # an integer of more digits than Python prints
        return "a number of thousands of digits"


def _known_keys(path: tuple[str, ...]) -> list[str]:
    section: type[BaseModel] = Config
    for part in path:
        annotation = section.model_fields[part].annotation if part in section.model_fields else None
        kinds = get_args(annotation) or (annotation,)
        sections = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if not sections:
            return []
        (section,) = sections
    return list(section.model_fields)

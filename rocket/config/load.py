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


def load_config(path: Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read a config file (None: all defaults) and apply overrides such as ``calib.num_samples=64``.

    Raises RocketError naming the key, its value and, for a misspelt key, the likely right one.
    """
    values: dict[str, Any] = {}
    if path is not None:
        values = read_yaml(path)
    for override in overrides:
        _apply(values, override)
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise RocketError("; ".join(_explain(dict(item)) for item in error.errors()[:3])) from None


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises RocketError if it is missing, no YAML, or no mapping."""
    try:
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        raise RocketError(f"config file {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RocketError(f"config file {path} is not YAML: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise RocketError(f"config file {path} holds a {type(values).__name__}; expected keys and values")
    return values


def dump_config(config: Config) -> str:
    """The resolved config as YAML that `load_config` reads back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _apply(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise RocketError(f"--set {override}: write key=value, for example --set calib.num_samples=64")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
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


def _explain(item: dict[str, Any]) -> str:
    location = tuple(str(part) for part in item["loc"])
    key = ".".join(location) or "config"
    if item["type"] == "extra_forbidden":
        known = _known_keys(location[:-1])
        close = difflib.get_close_matches(location[-1], known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}"
        return f"unknown key {key!r}: {hint}"
    message = item["msg"].removeprefix("Value error, ")
    return (
        f"{key}={item['input']!r}: {message}"
        if location and not isinstance(item["input"], dict)
        else f"{key}: {message}"
    )


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

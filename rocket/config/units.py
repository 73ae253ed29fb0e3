"""Sizes and counts as people write them: 6GB, 8e9, 8B."""

from __future__ import annotations

import re

UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}


def parse_bytes(value: object) -> object:
    """Bytes from a number or from text with a unit.

    >>> parse_bytes("6GB"), parse_bytes("1.5 MiB"), parse_bytes(4096)
    (6000000000, 1572864, 4096)
    """
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([KMGT]?I?B)?\s*", value.upper().replace("E", "e"))
    if match is None:
        raise ValueError(f"{value!r} is not a size; write for example 6GB, 500MB or 2GiB")
    size = float(match[1]) * UNITS[match[2] or ""]
    if not size < 2**63:
        raise ValueError(f"{value!r} is beyond any checkpoint")
    return int(size)


def parse_count(value: object) -> object:
    """A whole number that may be written as 8e9 or 8B.

    >>> parse_count("8B"), parse_count("135e6"), parse_count(7)
    (8000000000, 135000000, 7)
    """
    if isinstance(value, str):
        text = value.strip().upper()
        power = "KMBT".find(text[-1:]) + 1 if text else 0
        try:
            value = round(float(text[:-1] if power else text) * 1000.0**power, 3)
        except ValueError:
            raise ValueError(f"{value!r} is no number; write for example 8e9 or 8B") from None
    return int(value) if isinstance(value, float) and value.is_integer() else value

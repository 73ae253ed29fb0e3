"""From JSON that anyone may have written to one of our dataclasses, or to one line that says what is wrong with it."""

from __future__ import annotations

import functools
import json
from collections.abc import Hashable
from typing import Annotated, Any, TypeVar, cast

from pydantic import Field, TypeAdapter, ValidationError

from rocket.config.errors import RocketError

MOST = 2**40
"""Values that one layer may have: two terabytes of them. Sums over a model's layers then fit 64-bit integers."""

Whole = Annotated[int, Field(ge=0, le=MOST)]
Positive = Annotated[int, Field(ge=1, le=MOST)]
Cost = Annotated[float, Field(ge=0.0, le=1e30, allow_inf_nan=False)]

Record = TypeVar("Record")


def read_record(kind: type[Record], values: object, where: object) -> Record:
    """``values``, as `json` reads them, as a ``kind``: a dataclass, or a container of them.

    Types are taken at their word: true is no number, "3" and 3.0 are no integers. Raises RocketError naming ``where``,
    the field and what it should be; what was found there is not repeated, it may be of any size.

    >>> read_record(dict[str, Whole], {"a": 3}, "x.json")
    {'a': 3}
    """
    try:
        record: Record = _adapter(cast(Hashable, kind)).validate_json(json.dumps(values), strict=True)
        return record
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        field = ".".join(str(part)[:80] for part in first["loc"])
        raise RocketError(f"{where}: {field or 'content'}: {first['msg']}") from None


@functools.cache
def _adapter(kind: Hashable) -> TypeAdapter[Any]:
    return TypeAdapter(cast(Any, kind))

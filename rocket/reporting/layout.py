"""Where a plan's layers lie: towers of blocks, and in each block layers of the same kinds."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from rocket.allocation import Plan, Planner

LETTERS = {"dense": "·", "low_rank": "l", "dictionary": "d", "sparse": "s", "sparse_low_rank": "m"}
LETTERS |= {f"{form} int8": letter.upper() for form, letter in LETTERS.items()} | {"dense int8": "8"}


@dataclass(frozen=True)
class Cell:
    """The layers of one kind in one block: one, or as many as there are experts.

    ``removed_ratio`` is the removed share of their parameters, ``cost`` the sum of their costs as in `Plan`, ``forms``
    how many take each form.
    """

    layers: tuple[str, ...]
    forms: Mapping[str, int]
    removed_ratio: float
    cost: float


@dataclass(frozen=True)
class Tower:
    """Blocks that follow each other: ``model.layers``, or an encoder beside a decoder.

    ``blocks`` are their numbers, ``kinds`` what their layers are called; not every block has every kind.
    """

    name: str
    blocks: Sequence[str]
    kinds: Sequence[str]
    cells: Mapping[tuple[str, str], Cell]


def towers_of(planner: Planner, plan: Plan) -> list[Tower]:
    """The plan as maps of block by kind, in the order of the model."""
    dense = {profile.layer: profile.parameters for profile in planner.profiles}
    groups: dict[str, dict[tuple[str, str], list[str]]] = {}
    for layer in plan.choices:
        tower, block, kind = locate_layer(layer)
        groups.setdefault(tower, {}).setdefault((block, kind), []).append(layer)
    return [
        Tower(
            tower,
            list(dict.fromkeys(block for block, _ in cells)),
            list(dict.fromkeys(kind for _, kind in cells)),
            {where: _cell(plan, dense, layers) for where, layers in cells.items()},
        )
        for tower, cells in groups.items()
    ]


def _cell(plan: Plan, dense: Mapping[str, int], layers: Sequence[str]) -> Cell:
    options = [plan.choices[layer] for layer in layers]
    forms = [option.label for option in options]
    kept = sum(option.parameters for option in options) / sum(dense[layer] for layer in layers)
    return Cell(
        tuple(layers),
        {form: forms.count(form) for form in sorted(set(forms))},
        1.0 - kept,
        sum(option.cost for option in options),
    )


def layers_by_kind(layers: Iterable[str]) -> dict[str, list[str]]:
    """Layers by their kind, in the order of the model."""
    kinds: dict[str, list[str]] = {}
    for layer in layers:
        kinds.setdefault(locate_layer(layer)[2], []).append(layer)
    return kinds


def locate_layer(layer: str) -> tuple[str, str, str]:
    """Tower, number of the block, and kind: the name within the block, numbers (of experts) left out.

    >>> locate_layer("model.layers.7.mlp.experts.3.up_proj")
    ('model.layers', '7', 'mlp.experts.*.up_proj')
    >>> locate_layer("decoder.layers.0.fc1"), locate_layer("head")
    (('decoder.layers', '0', 'fc1'), ('', '', 'head'))
    """
    found = re.match(r"(?:(.*?)\.)?(\d+)(?:\.(.+))?$", layer)
    if found is None:
        return "", "", layer
    return found[1] or "", found[2], re.sub(r"(?<![^.])\d+(?![^.])", "*", found[3] or "(itself)")


def form_letters(forms: Iterable[str]) -> str:
    """One letter a form, a capital where its values are int8, as cells of a map show it; without one, a question mark.

    >>> form_letters(["sparse", "dense"]), form_letters(["sparse int8", "dense int8"])
    ('s·', '8S')
    """
    return "".join(sorted({LETTERS.get(form, "?") for form in forms}))

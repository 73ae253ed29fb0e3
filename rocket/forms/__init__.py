"""What a layer may become. A form is a module of this folder with `options` and `build`, and its line in `FORMS`."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

import torch
from torch import Tensor

from rocket.config.errors import RocketError
from rocket.config.schema import ProfilingConfig
from rocket.factorization.problem import LayerProblem
from rocket.forms import dense, dictionary, low_rank, sparse, sparse_low_rank
from rocket.forms.base import Form, Option
from rocket.forms.precision import in_int8, quantize_state

FORMS: dict[str, Form] = {
    "dense": dense,
    "low_rank": low_rank,
    "dictionary": dictionary,
    "sparse": sparse,
    "sparse_low_rank": sparse_low_rank,
}


def select_forms(names: Sequence[str]) -> list[Form]:
    """The forms of these names, and dense, which is always possible. Raises RocketError for an unknown name."""
    for name in names:
        if name not in FORMS:
            close = difflib.get_close_matches(name, FORMS, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(FORMS)}"
            raise RocketError(f"profiling.forms: no form {name!r}; {hint}")
    return [FORMS[name] for name in dict.fromkeys(["dense", *names])]


def options_of(problem: LayerProblem, forms: Sequence[Form], settings: ProfilingConfig) -> tuple[Option, ...]:
    """All options of a layer, form by form, each with the precisions that the settings allow."""
    found: list[Option] = []
    for form in forms:
        options = list(form.options(problem, settings))
        if "float" in settings.precisions:
            found += options
        if "int8" in settings.precisions:
            found += in_int8(form, options, problem, settings)
    return tuple(found)


def build(problem: LayerProblem, option: Option, settings: ProfilingConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of the layer that an option makes, under the names of its class in `rocket.nn`.

    In float64; or, of an int8 option, int8 with scales of type ``dtype``.
    """
    state = FORMS[option.form].build(problem, option, settings)
    if not option.scales:
        return state
    return quantize_state(state, option.spec(problem.in_features, problem.out_features, "").columns, dtype)


__all__ = ["FORMS", "Form", "Option", "build", "options_of", "select_forms"]

"""Any form with its values in int8: half the bytes of bfloat16, for an error that is measured on every layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from rocket.config.schema import ProfilingConfig
from rocket.factorization.basis import positive
from rocket.factorization.problem import LayerProblem
from rocket.forms.base import Form, Option
from rocket.kernels import bitmap, int8
from rocket.nn import LAYERS


def in_int8(form: Form, options: Sequence[Option], problem: LayerProblem, settings: ProfilingConfig) -> list[Option]:
    """The options of a form once more, with int8 values; none of a form whose layer has no such values.

    What rounding adds to the squared error is measured on drafts of the largest and of the smallest, and interpolated.
    At half the values it is up to twice that of a draft, but then a few per cent of the error.
    """
    if not options or "int8" not in LAYERS[form.name].precisions:
        return []
    power = problem.power
    prices = {}
    for option in {max(options, key=_size), min(options, key=_size)}:
        columns = option.spec(problem.in_features, problem.out_features, "").columns
        exact = form.build(problem, option, settings, draft=True)
        rounded = quantize_state(exact, columns, problem.weight.dtype)
        before, after = (problem.evaluate(_multiplied_out(state, columns)) for state in (exact, rounded))
        prices[_size(option)] = max(after**power - before**power, 0.0)
    sizes = sorted(prices)
    found = []
    for option in options:
        price = float(np.interp(_size(option), sizes, [prices[size] for size in sizes]))
        cost = float((option.cost**power + price) ** (1 / power))
        found.append(replace(option, cost=cost, scales=problem.out_features + option.rank))
    return found


def _size(option: Option) -> int:
    return option.parameters


def quantize_state(state: Mapping[str, Tensor], columns: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """A layer's tensors (`Form.build`) with ``weight``, of so many columns, and ``dictionary`` in int8.

    Their scales, of type ``dtype``, lie beside them. Atoms that are all there is are first made as long as their
    columns of coefficients: all coefficients of an output share a scale, and so the small ones lose less.
    """
    quantized = dict(state)
    weight, mask = _matrix(state, "weight", columns), state.get("mask")
    if "dictionary" in state:
        dictionary = state["dictionary"]
        if columns == len(dictionary):
            lengths = (positive(dictionary.norm(dim=1)) / positive(weight.norm(dim=0))).sqrt()
            weight, dictionary = weight * lengths, dictionary / lengths.unsqueeze(1)
        quantized["dictionary"], quantized["dictionary_scale"] = int8.quantize(dictionary, dtype)
    values, quantized["weight_scale"] = int8.quantize(weight, dtype)
    if mask is not None:
        values = bitmap.pick(values, mask)
    quantized["weight"] = values if "dictionary" in state else values.flatten()
    return quantized


def _multiplied_out(state: Mapping[str, Tensor], columns: int) -> Tensor:
    weight = _matrix(state, "weight", columns)
    if "dictionary" not in state:
        return weight
    dictionary = _matrix(state, "dictionary", columns)
    product = weight[:, : len(dictionary)] @ dictionary
    return product if columns == len(dictionary) else product + weight[:, len(dictionary) :]


def _matrix(state: Mapping[str, Tensor], name: str, columns: int) -> Tensor:
    """``weight`` or ``dictionary`` as a dense matrix in float64."""
    values, scale = state[name], state.get(f"{name}_scale")
    if name == "weight" and "mask" in state:
        values = bitmap.unpack(values, state["mask"], columns)
    elif name == "weight":
        values = values.view(-1, columns)
    return values.double() if scale is None else int8.dequantize(values, scale.double())

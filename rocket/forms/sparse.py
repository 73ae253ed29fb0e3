"""W sparse, with no dictionary: values and a bit mask.

Finding a support costs some twenty matrix products, so it is done at a few sizes (`KNOTS`); costs between them are
interpolated in the logarithm, where they are smooth.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from rocket.config.schema import ProfilingConfig
from rocket.factorization.problem import LayerProblem
from rocket.factorization.sparse import scale_problem
from rocket.forms.base import Option, as_state, keep_ratio_budget, padded_bits
from rocket.kernels import bitmap

name = "sparse"

KNOTS = (0.05, 0.2, 0.4, 0.7)


def options(problem: LayerProblem, settings: ProfilingConfig) -> list[Option]:
    """One option a removed ratio, of as many non-zeros as fit."""
    scaled = scale_problem(problem.tempered)
    knots = knots_for(settings.removed_ratios)
    costs = []
    for knot in knots:
        approximation, _ = scaled.sparsify(int(keep_ratio_budget(problem, knot)))
        costs.append(problem.evaluate(scaled.unscale(approximation)))
    bits = padded_bits(problem.out_features, problem.in_features)
    found = []
    for removed_ratio in settings.removed_ratios:
        count = int(keep_ratio_budget(problem, removed_ratio))
        if count > 0:
            cost = interpolate(removed_ratio, knots, costs)
            found.append(Option(name, count, mask_bits=bits, cost=cost, nnz=count))
    return found


def knots_for(removed_ratios: list[float]) -> list[float]:
    """Where costs are computed: at the ends and at `KNOTS` between them, or at all ratios if these are as few."""
    first, last = removed_ratios[0], removed_ratios[-1]
    knots = sorted({first, *(knot for knot in KNOTS if first < knot < last), last})
    return knots if len(knots) < len(removed_ratios) else removed_ratios


def build(problem: LayerProblem, option: Option, settings: ProfilingConfig) -> dict[str, Tensor]:
    scaled = scale_problem(problem.tempered)
    approximation, mask = scaled.sparsify(option.nnz)
    values, packed = bitmap.pack(scaled.unscale(approximation), mask)
    return {**as_state(weight=values), "mask": packed}


def interpolate(removed_ratio: float, knots: list[float], costs: list[float]) -> float:
    """The cost at a removed ratio, between and beyond knots.

    The slope of log(cost) over log(ratio) changes slowly with the ratio, so log(cost) is a sum of 1, log r, r and r²
    (as many of them as there are knots; fitted by least squares where there are more knots).

    >>> round(interpolate(0.2, [0.1, 0.4], [1.0, 16.0]), 6)
    4.0
    """
    if min(costs) <= 0.0:
        return float(np.interp(removed_ratio, knots, costs))
    terms = min(len(knots), 4)
    weights = np.linalg.lstsq(_smooth(np.array(knots), terms), np.log(costs), rcond=None)[0]
    return float(np.exp(_smooth(np.array([removed_ratio]), terms) @ weights)[0])


def _smooth(ratios: np.ndarray, terms: int) -> np.ndarray:
    return np.stack([np.ones_like(ratios), np.log(ratios), ratios, ratios**2], axis=1)[:, :terms]

"""Costs at a few sizes, between them, and after more iterations: for forms whose every price takes a fit."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from rocket.factorization.problem import LayerProblem


def knots_for(removed_ratios: list[float], wanted: Sequence[float]) -> list[float]:
    """Where costs are computed: at the ends and at ``wanted`` between them, or at all ratios if these are as few."""
    first, last = removed_ratios[0], removed_ratios[-1]
    knots = sorted({first, *(knot for knot in wanted if first < knot < last), last})
    return knots if len(knots) < len(removed_ratios) else removed_ratios


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


def pace_of(problem: LayerProblem, before: float, after: float, typical: float) -> float:
    """How fast a layer's error falls beside typical layers, in logarithms, of 0 to 2.

    ``before`` and ``after`` are costs; ``typical`` is the fall of the squared error in typical layers, below 1.
    """
    if before <= 0 or after <= 0:
        return 1.0
    return min(max(problem.power * math.log(after / before) / math.log(typical), 0.0), 2.0)


def _smooth(ratios: np.ndarray, terms: int) -> np.ndarray:
    return np.stack([np.ones_like(ratios), np.log(ratios), ratios, ratios**2], axis=1)[:, :terms]

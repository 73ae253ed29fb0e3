"""W sparse, with no dictionary: values and a bit mask.

Finding a support costs some twenty matrix products, so it is done at a few sizes (`KNOTS`), with fewer iterations than
`build` makes (which is better by one to three per cent), and costs between them are interpolated.
"""

from __future__ import annotations

from torch import Tensor

from rocket.config.schema import ProfilingConfig
from rocket.factorization.problem import LayerProblem
from rocket.factorization.sparse import REPEATS, scale_problem
from rocket.forms.base import Option, as_state, keep_ratio_budget, padded_bits
from rocket.forms.knots import interpolate, knots_for
from rocket.kernels import bitmap

name = "sparse"

KNOTS = (0.05, 0.2, 0.4, 0.7)
PRICED = 2
"""Iterations with each of ADMM's penalties."""


def options(problem: LayerProblem, settings: ProfilingConfig) -> list[Option]:
    """One option a removed ratio, of as many non-zeros as fit."""
    bits = padded_bits(problem.out_features, problem.in_features)
    found = []
    for removed_ratio, cost in zip(settings.removed_ratios, costs(problem, settings.removed_ratios), strict=True):
        count = int(keep_ratio_budget(problem, removed_ratio))
        if count > 0:
            found.append(Option(name, count, mask_bits=bits, cost=cost, nnz=count))
    return found


def costs(problem: LayerProblem, removed_ratios: list[float]) -> list[float]:
    """Of as many non-zeros as each ratio leaves. Kept as long as the problem is, for the forms that go on from here."""
    key = (name, *removed_ratios)
    if key not in problem.prices:
        scaled = scale_problem(problem.tempered)
        knots = knots_for(removed_ratios, KNOTS)
        at_knots = []
        for knot in knots:
            approximation, _ = scaled.sparsify(int(keep_ratio_budget(problem, knot)), PRICED)
            at_knots.append(problem.evaluate(scaled.unscale(approximation)))
        problem.prices[key] = [interpolate(ratio, knots, at_knots) for ratio in removed_ratios]
    return problem.prices[key]


def build(problem: LayerProblem, option: Option, settings: ProfilingConfig, draft: bool = False) -> dict[str, Tensor]:
    scaled = scale_problem(problem.tempered)
    approximation, mask = scaled.sparsify(option.nnz, PRICED if draft else REPEATS)
    values, packed = bitmap.pack(scaled.unscale(approximation), mask)
    return {**as_state(weight=values), "mask": packed}

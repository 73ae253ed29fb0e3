"""W ≈ C D, D a dense dictionary, C sparse: the paper's form (arXiv 2602.11008).

For each removed ratio r the budget k·in + s·out = (1 - r)·in·out and the ratio ρ = k/s fix rank k and support s; the
ρ with the least error is the option. The error is smooth in ρ and its minimum moves little from one r to the next, so
each search starts where the last one ended and walks downhill.

What a size costs in one shot has a closed form. What refits gain is foretold, from what typical layers gain (`GAINS`)
and what the first refit gains at one size of this one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
from torch import Tensor

from rocket.config.schema import ProfilingConfig
from rocket.factorization.dictionary import factorize, importance, projection_cost, projection_error, threshold
from rocket.factorization.problem import LayerProblem
from rocket.forms.base import Option, as_state, keep_share, padded_bits
from rocket.forms.knots import pace_of
from rocket.kernels import bitmap

name = "dictionary"

COARSE_STEP = 5
LOOK_AHEAD = 4

RATIOS = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0)
GAINS = {
    0.1: (1.0, 0.86, 0.70, 0.60, 0.56, 0.56),
    0.2: (1.0, 0.91, 0.68, 0.65, 0.61, 0.60),
    0.3: (1.0, 0.93, 0.77, 0.65, 0.60, 0.60),
    0.4: (1.0, 0.95, 0.83, 0.73, 0.68, 0.64),
    0.5: (1.0, 0.96, 0.87, 0.80, 0.75, 0.70),
    0.7: (1.0, 0.98, 0.94, 0.90, 0.87, 0.83),
    1.0: (1.0, 1.0, 1.0, 1.0, 1.0, 1.0),
}
"""By removed ratio, for ρ as in `RATIOS`: the squared error after eight refits over that of one shot.

Means over ten layers of SmolLM2, on calibration data. Layers differ in pace: where the first refit lowers the error p
times as much as it does in these, in logarithms, all of them do, about, and at every size.
"""
REFITS, FIRST_REFIT = 8, 0.36
"""Of what refits gain, in logarithms, the first one's part, and each next one's of what is left."""
PACE_AT = (0.4, 2.5)


def options(problem: LayerProblem, settings: ProfilingConfig) -> list[Option]:
    """At most one option a removed ratio, that of the best ρ among ``settings.rank_support_ratios``."""
    tempered = problem.prepare()
    basis = tempered.basis
    scores = importance(tempered, settings.importance_exponent)

    def coefficients(rank: int, support: int) -> Tensor:
        return basis.rows[:rank] * threshold(scores[:rank], support, settings.thresholds)

    def squared_error(rank: int, support: int) -> float:
        return projection_error(tempered.cost_target, tempered.squared_norm, coefficients(rank, support))

    def cost(rank: int, support: int) -> float:
        return projection_cost(problem, coefficients(rank, support))

    found = []
    pace = _pace(problem, settings, cost)
    start: int | None = None
    for removed_ratio in settings.removed_ratios:
        sizes = [
            sizes_for(problem.out_features, problem.in_features, removed_ratio, ratio)
            for ratio in settings.rank_support_ratios
        ]
        valid = [_fits(problem, size) for size in sizes]
        if not any(valid):
            continue
        gains = [
            _gain(removed_ratio, ratio, settings.refits) ** pace if support < rank else 1.0
            for ratio, (rank, support) in zip(settings.rank_support_ratios, sizes, strict=True)
        ]
        start = search(_errors(squared_error, sizes, gains), valid, start)
        rank, support = sizes[start]
        found.append(
            Option(
                name,
                rank * problem.in_features + support * problem.out_features,
                mask_bits=padded_bits(problem.out_features, rank),
                cost=cost(rank, support) * gains[start] ** (1 / problem.power),
                rank=rank,
                nnz=support * problem.out_features,
            )
        )
    return found


def _errors(
    one_shot: Callable[[int, int], float], sizes: Sequence[tuple[int, int]], gains: Sequence[float]
) -> Callable[[int], float]:
    """Squared errors of the (rank, support) pairs after their refits, by index, each computed once."""
    return cache(lambda index: one_shot(*sizes[index]) * gains[index])


def _fits(problem: LayerProblem, size: tuple[int, int]) -> bool:
    rank, support = size
    return 0 < support <= rank <= problem.max_rank


def _gain(removed_ratio: float, rank_support_ratio: float, refits: int) -> float:
    """What the squared error of one shot is multiplied by, in typical layers."""
    by_size = [np.interp(rank_support_ratio, RATIOS, np.log(gains)) for gains in GAINS.values()]
    logarithm = np.interp(removed_ratio, list(GAINS), by_size)
    return math.exp(logarithm * _done(refits) / _done(REFITS))


def _done(refits: int) -> float:
    return 1.0 - (1.0 - FIRST_REFIT) ** refits


def _pace(problem: LayerProblem, settings: ProfilingConfig, cost: Callable[[int, int], float]) -> float:
    """`pace_of` the first refit, at the size nearest to `PACE_AT`; ``cost`` is that of one shot at a size."""
    known = {
        (removed, ratio): (rank, support)
        for removed in settings.removed_ratios
        for ratio in settings.rank_support_ratios
        for rank, support in [sizes_for(problem.out_features, problem.in_features, removed, ratio)]
        if support < rank and _fits(problem, (rank, support))
    }
    if not settings.refits or not known:
        return 1.0
    place = min(known, key=lambda place: math.dist(place, PACE_AT))
    dictionary, coefficients, _ = factors(problem, *known[place], settings, refits=1)
    after = problem.evaluate(coefficients @ dictionary)
    return pace_of(problem, cost(*known[place]), after, _gain(*place, refits=1))


def factors(
    problem: LayerProblem, rank: int, support: int, settings: ProfilingConfig, refits: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`factorize` as the settings say, with so many refits."""
    return factorize(
        problem.tempered,
        rank,
        support,
        exponent=settings.importance_exponent,
        thresholds=settings.thresholds,
        refits=refits,
    )


def build(problem: LayerProblem, option: Option, settings: ProfilingConfig, draft: bool = False) -> dict[str, Tensor]:
    support, rest = divmod(option.nnz, problem.out_features)
    if rest or not 0 < support <= option.rank:
        raise ValueError(
            f"nnz={option.nnz} is not the same number of coefficients, 1 to {option.rank}, for every output"
        )
    refits = 0 if draft else settings.refits
    dictionary, coefficients, mask = factors(problem, option.rank, support, settings, refits)
    values, packed = bitmap.pack(coefficients, mask)
    return {**as_state(dictionary=dictionary, weight=values), "mask": packed}


def sizes_for(out_features: int, in_features: int, removed_ratio: float, rank_support_ratio: float) -> tuple[int, int]:
    """(k, s) from k·in + s·out = (1 - r)·in·out and k = ρs, both rounded down."""
    support = keep_share(removed_ratio, out_features * in_features) / (rank_support_ratio * in_features + out_features)
    return int(rank_support_ratio * support), int(support)


def search(errors: Callable[[int], float], valid: Sequence[bool], start: int | None) -> int:
    """Index of a least error among the valid ones, found by walking downhill from ``start`` (None: from a coarse scan).

    The walk looks ahead, so that noise of the size of a step does not stop it.
    """
    indices = [index for index, is_valid in enumerate(valid) if is_valid]
    if start is None:
        best = min(indices[::COARSE_STEP] + indices[-1:], key=errors)
    else:
        best = min(indices, key=lambda index: abs(index - start))
    position = indices.index(best)
    while True:
        nearby = range(max(0, position - LOOK_AHEAD), min(len(indices), position + LOOK_AHEAD + 1))
        closer = min(nearby, key=lambda place: errors(indices[place]))
        if errors(indices[closer]) >= errors(indices[position]):
            return indices[position]
        position = closer

"""W ≈ C D, D a dense dictionary, C sparse: the paper's form (arXiv 2602.11008).

For each removed ratio r the budget k·in + s·out = (1 - r)·in·out and the ratio ρ = k/s fix rank k and support s; the
ρ with the least error is the option. The error is smooth in ρ and its minimum moves little from one r to the next, so
each search starts where the last one ended and walks downhill.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from rocket.config.schema import ProfilingConfig
from rocket.factorization.dictionary import factorize, importance, projection_cost, projection_error, threshold
from rocket.factorization.problem import LayerProblem
from rocket.forms.base import Option, as_state, keep_share, padded_bits
from rocket.kernels import bitmap

name = "dictionary"

COARSE_STEP = 5
LOOK_AHEAD = 4


def options(problem: LayerProblem, settings: ProfilingConfig) -> list[Option]:
    """At most one option a removed ratio, that of the best ρ among ``settings.rank_support_ratios``."""
    tempered = problem.prepare()
    basis = tempered.basis
    scores = importance(tempered, settings.importance_exponent)

    def coefficients(rank: int, support: int) -> Tensor:
        return basis.rows[:rank] * threshold(scores[:rank], support, settings.thresholds)

    def squared_error(rank: int, support: int) -> float:
        return projection_error(tempered.cost_target, tempered.squared_norm, coefficients(rank, support))

    found = []
    start: int | None = None
    for removed_ratio in settings.removed_ratios:
        sizes = [
            sizes_for(problem.out_features, problem.in_features, removed_ratio, ratio)
            for ratio in settings.rank_support_ratios
        ]
        valid = [0 < support <= rank <= problem.max_rank for rank, support in sizes]
        if not any(valid):
            continue
        errors = _Memo(sizes, squared_error)
        start = search(errors, valid, start)
        rank, support = sizes[start]
        found.append(
            Option(
                name,
                rank * problem.in_features + support * problem.out_features,
                mask_bits=padded_bits(problem.out_features, rank),
                cost=projection_cost(problem, coefficients(rank, support)),
                rank=rank,
                nnz=support * problem.out_features,
            )
        )
    return found


def build(problem: LayerProblem, option: Option, settings: ProfilingConfig) -> dict[str, Tensor]:
    support, rest = divmod(option.nnz, problem.out_features)
    if rest or not 0 < support <= option.rank:
        raise ValueError(
            f"nnz={option.nnz} is not the same number of coefficients, 1 to {option.rank}, for every output"
        )
    dictionary, coefficients, mask = factorize(
        problem.tempered,
        option.rank,
        support,
        exponent=settings.importance_exponent,
        thresholds=settings.thresholds,
        refits=settings.refits,
    )
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


class _Memo:
    """Errors of the (rank, support) pairs, by index, each computed once."""

    def __init__(self, sizes: Sequence[tuple[int, int]], compute: Callable[[int, int], float]) -> None:
        self._sizes, self._compute = sizes, compute
        self._known: dict[int, float] = {}

    def __call__(self, index: int) -> float:
        if index not in self._known:
            self._known[index] = self._compute(*self._sizes[index])
        return self._known[index]

"""W ≈ C D, both factors dense: truncated SVD in whitened space (SVD-LLM, arXiv 2403.07378)."""

from __future__ import annotations

from torch import Tensor

from rocket.config.schema import ProfilingConfig
from rocket.factorization.dictionary import factorize, projection_cost
from rocket.factorization.problem import LayerProblem
from rocket.forms.base import Option, as_state, keep_ratio_budget

name = "low_rank"


def options(problem: LayerProblem, settings: ProfilingConfig) -> list[Option]:
    """One rank a removed ratio, the largest that fits."""
    found = []
    basis = problem.prepare().basis
    features = problem.in_features + problem.out_features
    for removed_ratio in settings.removed_ratios:
        rank = int(keep_ratio_budget(problem, removed_ratio) / features)
        if not 0 < rank <= problem.max_rank:
            continue
        if problem.tempered is problem and problem.cost != "weight":
            cost = problem.to_cost(float(basis.scales[rank:].double().square().sum()))
        else:
            cost = projection_cost(problem, basis.rows[:rank])
        found.append(Option(name, rank * features, mask_bits=0, cost=cost, rank=rank))
    return found


def build(problem: LayerProblem, option: Option, settings: ProfilingConfig, draft: bool = False) -> dict[str, Tensor]:
    dictionary, coefficients, _ = factorize(problem.tempered, option.rank, support=option.rank)
    return as_state(dictionary=dictionary, weight=coefficients)

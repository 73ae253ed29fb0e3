"""W ≈ X + A B, X sparse and A B of low rank: a dictionary of learned atoms B beside one identity atom an input.

The learned atoms are used by every output, the others by few. What share of the values they take is a rule
(`sizes_for`), found on layers of SmolLM2; near it the error is flat.

A price takes a fit of its own. How it compares to that of a sparse layer changes little from size to size, and alike in
all layers: so it is found at a few sizes (`KNOTS`), and the ratio of the two is interpolated. It comes from an eighth
of the iterations that `build` makes; what the others gain is foretold from what the next ones do at one size (`FALLS`).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from rocket.config.schema import ProfilingConfig
from rocket.factorization.basis import positive
from rocket.factorization.problem import LayerProblem
from rocket.factorization.sparse import ScaledProblem, scale_problem
from rocket.factorization.sparse_low_rank import Deflated
from rocket.forms import sparse
from rocket.forms.base import Option, as_state, keep_share, padded_bits
from rocket.forms.knots import interpolate, knots_for, pace_of
from rocket.kernels import bitmap

name = "sparse_low_rank"

KNOTS = (0.1, 0.25, 0.7)
LEAST_REMOVED = 0.1
LARGEST_SHARE = 0.1
PRICED, BUILT = 2, 16
"""Iterations with each of ADMM's penalties."""

FALLS = {
    0.1: (0.76, 0.44),
    0.2: (0.75, 0.48),
    0.3: (0.79, 0.59),
    0.4: (0.84, 0.68),
    0.5: (0.87, 0.76),
    0.7: (0.93, 0.89),
    1.0: (0.98, 0.96),
}
"""By removed ratio: the squared error after twice `PRICED`, and after `BUILT`, over that after `PRICED`.

Means over 12 and 25 layers of SmolLM2, on calibration data. Layers differ in pace: where the error falls p times as
fast as here, in logarithms, over the first doubling, it does so all the way, about, and at every size."""


def options(problem: LayerProblem, settings: ProfilingConfig) -> list[Option]:
    """One option a removed ratio, from `LEAST_REMOVED` on, that leaves room for an atom, of all non-zeros that fit."""
    sizes = {}
    for ratio in settings.removed_ratios:
        if ratio >= LEAST_REMOVED and (size := sizes_for(problem.out_features, problem.in_features, ratio)):
            sizes[ratio] = size
    if not sizes:
        return []
    sparse_costs = dict(zip(settings.removed_ratios, sparse.costs(problem, settings.removed_ratios), strict=True))
    scaled = scale_problem(problem.tempered)
    knots = knots_for(list(sizes), [min(sizes, key=lambda ratio: abs(ratio - knot)) for knot in KNOTS])
    costs = {knot: _cost(problem, scaled, *sizes[knot], PRICED) for knot in knots}
    middle = knots[len(knots) // 2]
    further = _cost(problem, scaled, *sizes[middle], 2 * PRICED)
    pace = pace_of(problem, costs[middle], further, _falls(middle)[0])
    gains = [costs[knot] / sparse_costs[knot] if sparse_costs[knot] > 0 else 1.0 for knot in knots]
    found = []
    for removed_ratio, (rank, count) in sizes.items():
        nnz = problem.out_features * rank + count
        bits = padded_bits(problem.out_features, rank + problem.in_features)
        cost = sparse_costs[removed_ratio] * interpolate(removed_ratio, knots, gains)
        cost *= _falls(removed_ratio)[1] ** (pace / problem.power)
        found.append(Option(name, rank * problem.in_features + nnz, mask_bits=bits, cost=cost, rank=rank, nnz=nnz))
    return found


def _cost(problem: LayerProblem, scaled: ScaledProblem, rank: int, count: int, repeats: int) -> float:
    deflated = Deflated(scaled, rank)
    rest, _, coefficients = deflated.decompose(count, repeats)
    return problem.evaluate(scaled.unscale(rest.addmm_(coefficients, deflated.atoms)))


def _falls(removed_ratio: float) -> tuple[float, float]:
    ratios, (doubled, built) = list(FALLS), zip(*FALLS.values(), strict=True)
    return float(np.interp(removed_ratio, ratios, doubled)), float(np.interp(removed_ratio, ratios, built))


def sizes_for(out_features: int, in_features: int, removed_ratio: float) -> tuple[int, int] | None:
    """The rank k and the number of non-zeros of X that a removed ratio leaves; None if there is no room for both.

    The low-rank part takes a tenth of the layer's original values, k·(in + out) = in·out / 10, less where little is
    removed (half of that much) or little is kept (a quarter).
    """
    values, features = out_features * in_features, in_features + out_features
    budget = keep_share(removed_ratio, values)
    rank = int(min(LARGEST_SHARE * values, removed_ratio / 2 * values, budget / 4) / features)
    count = int(budget) - rank * features
    return (rank, count) if rank > 0 and count > 0 else None


def build(problem: LayerProblem, option: Option, settings: ProfilingConfig, draft: bool = False) -> dict[str, Tensor]:
    count = option.nnz - problem.out_features * option.rank
    if not 0 <= count <= problem.weight.numel():
        raise ValueError(f"nnz={option.nnz} with rank {option.rank} leaves {count} non-zeros beside the low-rank part")
    scaled = scale_problem(problem.tempered)
    deflated = Deflated(scaled, option.rank)
    rest, mask, coefficients = deflated.decompose(count, PRICED if draft else BUILT)
    rest, coefficients = scaled.unscale(rest), coefficients.double() / scaled.row_scale[:, None]
    lengths = _lengths(coefficients, rest)
    dictionary = deflated.atoms.double() / scaled.column_scale * lengths[:, None]
    mask = torch.cat([torch.ones_like(coefficients, dtype=torch.bool), mask], dim=1)
    values, packed = bitmap.pack(torch.cat([coefficients / lengths, rest], dim=1), mask)
    return {**as_state(dictionary=dictionary, weight=values), "mask": packed}


def _lengths(coefficients: Tensor, rest: Tensor) -> Tensor:
    """Of the atoms [k], such that no coefficient is larger than the largest entry of X in its row.

    int8 values of a row share a scale, which should not be coarser for what an atom's length can take up.
    """
    largest = rest.abs().amax(dim=1, keepdim=True)
    rows = largest.squeeze(1) > 0
    if not rows.any():
        return positive(coefficients.abs().amax(dim=0))
    # Rows without an entry of X count as if they had the largest.
    within = torch.where(largest > 0, largest, largest.max())
    return positive((coefficients.abs() / within).amax(dim=0))

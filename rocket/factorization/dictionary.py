"""The paper's one-shot factorization: eigen-dictionary, thresholded coefficients, closed-form dictionary update.

Coefficients are found in whitened space, on Z = S Wᵀ [in, out]; the dictionary follows from them and W, as the
whitening cancels (`projection_error`). The rows of the coefficient matrix are kept at unit norm: scaling a row and its
atom by inverse factors changes nothing, and it turns C Cᵀ from ill-conditioned into nearly the identity, so that single
precision is enough.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rocket.factorization.basis import Basis, positive
from rocket.factorization.problem import LayerProblem
from rocket.factorization.sparse import SupportSearch, keep_top

Thresholds = Literal["column", "matrix"]

RIDGES = (0.0, 1e-10, 1e-8, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
ATOM_SHRINKAGE = 1e-4
CANCELLATION = 1e-2


def importance(problem: LayerProblem, exponent: float = 0.5) -> Tensor:
    """Importance of each coefficient (the paper's sensitivity-guided one), [r, out].

    The weighted geometric mean |C₀|^(1-λ) · (|C₀| ‖S⁻¹q‖)^λ of a coefficient's weight in whitened and in weight space.
    """
    scales = problem.basis.scales
    if exponent:
        scales = scales ** (1.0 - exponent) * problem.weight_scales**exponent
    return problem.basis.rows.abs() * scales[:, None]


def keep_largest(scores: Tensor, count: int) -> Tensor:
    """Mask [k, out] of exactly ``count`` largest scores in each column; of equal scores the earlier row is kept.

    >>> keep_largest(torch.tensor([[3.0, 1.0], [2.0, 1.0], [1.0, 5.0]]), 2).int().tolist()
    [[1, 1], [1, 0], [0, 1]]
    """
    rank = scores.shape[0]
    if count >= rank:
        return torch.ones_like(scores, dtype=torch.bool)
    columns = scores.T.contiguous()
    threshold = columns.kthvalue(rank - count + 1, dim=1, keepdim=True).values
    mask = columns > threshold
    missing = count - mask.sum(dim=1, keepdim=True)
    tied = columns == threshold
    if int(tied.sum()) != len(columns):
        tied &= tied.cumsum(dim=1) <= missing
    result: Tensor = (mask | tied).T
    return result


def gram_factor(coefficients: Tensor) -> Tensor:
    """Cholesky factor L [k, k] of C Cᵀ + εI, with the smallest ε (relative to the mean diagonal) that succeeds.

    ε is absolute for C = 0, what is left of a layer of zeros.
    """
    product = coefficients @ coefficients.T
    scale = float(product.diagonal().mean()) or 1.0
    for ridge in RIDGES:
        damped = product.clone()
        damped.diagonal().add_(ridge * scale)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            result: Tensor = factor
            return result
    raise ValueError(f"C Cᵀ of shape {tuple(product.shape)} is not positive definite at ridge {RIDGES[-1]}")


def projection_error(cost_target: Tensor, squared_norm: float, coefficients: Tensor) -> float:
    """‖T - TΠ‖², Π = Cᵀ(C Cᵀ)⁻¹C: what a fitted dictionary leaves of T [m, out] with coefficients C [k, out].

    With the closed-form dictionary D = Z Cᵀ(C Cᵀ)⁻¹ the approximation is Ŵᵀ = S⁻¹DC = WᵀΠ: the whitening cancels. The
    squared error in any metric on the inputs, T being Wᵀ in that metric and ``squared_norm`` ‖T‖², is therefore
    ‖T‖² - ‖TΠ‖², two products and one Cholesky factorization, with no dictionary formed. Where that difference would
    drown in rounding, TΠ is formed, at the price of a third product.
    """
    factor = gram_factor(coefficients)
    projected = torch.linalg.solve_triangular(factor, coefficients @ cost_target.T, upper=False)
    error = squared_norm - float(projected.square().sum(dtype=torch.float64))
    if error < CANCELLATION * squared_norm:
        rows = torch.linalg.solve_triangular(factor, coefficients, upper=False)
        error = float((cost_target - projected.T @ rows).square().sum(dtype=torch.float64))
    return error


def projection_cost(problem: LayerProblem, coefficients: Tensor) -> float:
    """The problem's cost of the dictionary fitted to coefficients C [k, out] in ``problem.tempered``."""
    weights, fitted = problem.column_weights, problem.tempered.column_weights
    if weights is None or fitted is None:
        return problem.to_cost(projection_error(problem.cost_target, problem.squared_norm, coefficients))
    # Where the fit weighed outputs otherwise, nothing is orthogonal in the cost's metric: the residual is formed.
    ratio = (weights / fitted).float()
    target = problem.cost_target / ratio
    rows = torch.linalg.solve_triangular(gram_factor(coefficients), coefficients, upper=False)
    residual = (target - (target @ rows.T) @ rows) * ratio
    return problem.to_cost(float(residual.square().sum(dtype=torch.float64)))


def fit_dictionary(target: Tensor, coefficients: Tensor) -> Tensor:
    """D = Z Cᵀ(C Cᵀ + εI)⁻¹ [in, k] (the paper's closed-form update) for Z [in, out] and C [k, out].

    For Wᵀ in the place of Z = S Wᵀ it is S⁻¹D, the dictionary in weight space.
    """
    factor = gram_factor(coefficients)
    dictionary: Tensor = torch.cholesky_solve(coefficients @ target.T, factor).T
    return dictionary


def threshold(scores: Tensor, support: int, by: Thresholds) -> Tensor:
    """Mask [k, out] that keeps ``support`` coefficients a column, in every column (the paper) or on average."""
    return keep_largest(scores, support) if by == "column" else keep_top(scores, support * scores.shape[1])


def factorize(
    problem: LayerProblem,
    rank: int,
    support: int,
    *,
    exponent: float = 0.5,
    thresholds: Thresholds = "column",
    refits: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Factors of W with ``rank`` atoms and ``support`` coefficients a column (or on average, see `threshold`).

    Returns the dictionary [rank, in] and the coefficients [out, rank], in float64 with W ≈ coefficients @ dictionary,
    and the mask [out, rank] of the stored coefficients. ``support == rank`` is the whitened SVD (SVD-LLM).
    With ``refits`` = 0 this is the paper's one shot; each refit finds the coefficients anew for the dictionary, support
    included, then the dictionary for the coefficients.

    >>> problem = LayerProblem(torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.eye(2))
    >>> dictionary, coefficients, _ = factorize(problem, rank=2, support=1)
    >>> (coefficients @ dictionary).round(decimals=6).abs().tolist()
    [[2.0, 0.0], [0.0, 1.0]]
    """
    basis = problem.basis
    mask = threshold(importance(problem, exponent)[:rank], support, thresholds)
    coefficients = basis.rows[:rank].double() * mask
    if support < rank:
        for _ in range(refits):
            mask, coefficients = _refit(basis, coefficients, int(mask.sum()))
    dictionary = fit_dictionary(problem.weighted.T, coefficients).T
    if problem.column_weights is not None:
        coefficients = coefficients / problem.column_weights
    dictionary, coefficients = _balance(dictionary, coefficients)
    return dictionary.contiguous(), coefficients.T.contiguous(), mask.T.contiguous()


def _refit(basis: Basis, coefficients: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Mask and coefficients [k, out], ``count`` of them, that fit best the dictionary fitted to ``coefficients``.

    In the coordinates of the basis, where Z is diag(σ) V and the dictionary is [r, k]; rows come back at unit norm.
    """
    target = basis.rows * basis.scales[:, None]
    atoms = fit_dictionary(target.double(), coefficients).float()
    norms = positive(atoms.norm(dim=0))
    atoms = atoms / norms
    gram, linear = atoms.T @ atoms, target.T @ atoms
    gram.diagonal().add_(ATOM_SHRINKAGE)
    best = torch.cholesky_solve(linear.T.double(), torch.linalg.cholesky(gram.double())).T.float()
    start = (coefficients.float() * norms[:, None]).T.contiguous()
    solution, mask = SupportSearch(best, gram).solve(count, start)
    fitted = solution.T.double()
    return mask.T, fitted / positive(fitted.norm(dim=1, keepdim=True))


def _balance(dictionary: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
    """Give each atom [k, in], in place, and its coefficients [k, out] the same largest magnitude, as float16 needs."""
    atom_size = positive(torch.linalg.vector_norm(dictionary, ord=torch.inf, dim=1, keepdim=True))
    coefficient_size = positive(torch.linalg.vector_norm(coefficients, ord=torch.inf, dim=1, keepdim=True))
    scale = (coefficient_size / atom_size).sqrt()
    return dictionary.mul_(scale), coefficients / scale

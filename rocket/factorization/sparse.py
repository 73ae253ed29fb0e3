"""Best sparse approximation under a quadratic error: which entries to keep, and their values.

Everywhere the question is: minimise tr((T - X) N (T - X)ᵀ) over X [rows, n] with a given number of non-zeros, T
[rows, n], N [n, n] positive definite with unit diagonal. For a plain sparse layer T is the scaled weight and N the
scaled Gram matrix of its inputs; for a dictionary T are its best coefficients and N is the Gram matrix of the atoms.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from rocket.factorization.problem import LayerProblem

PENALTIES = (0.3, 0.36, 0.432, 0.5184, 0.62208)
REPEATS = 3
FIT_ITERATIONS = 5
FLAT = 1e-4
SAMPLE_STRIDES = (17, 19, 23, 29, 31, 37)
SMALL = 100_000
DAMPING = 1e-3
ROWS_AT_ONCE = 2048
KEPT_INVERSES = 8192
COARSE_FROM = 256
"""Columns from which on ADMM's products are worth rounding to bfloat16."""


def coarse_type(matrix: Tensor) -> torch.dtype:
    """bfloat16 where its device multiplies large matrices of that faster than of float32; else float32."""
    if matrix.is_cuda:
        is_faster = torch.cuda.get_device_capability(matrix.device)[0] >= 8
    else:
        is_cpu = matrix.device.type == "cpu" and torch.backends.mkldnn.is_available()
        is_faster = is_cpu and torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if is_faster and matrix.shape[1] >= COARSE_FROM else torch.float32


def size_exceeded(matrix: Tensor, count: int) -> float:
    """The size that about ``count`` entries of a matrix exceed, from a sample of them where it is large.

    Selecting exactly takes longer than the matrix product before it, and passing supports need not be exact.
    """
    stride = next(stride for stride in SAMPLE_STRIDES if matrix.shape[-1] % stride)  # else it keeps to some columns
    sample = matrix.flatten()[:: stride if matrix.numel() >= SMALL else 1].abs()
    rank = round(sample.numel() * (1 - count / matrix.numel()))
    return float(sample.kthvalue(rank).values) if rank > 0 else -math.inf


Inverses: TypeAlias = dict[tuple[float, torch.dtype], Tensor]


@dataclass(frozen=True, eq=False)
class ScaledProblem:
    """A layer scaled so that every weight counts by its square alone, up to correlations.

    ``weight`` is T = diag(r) W diag(c), [out, in], and ``gram`` is N, [in, in], the correlation matrix of the inputs
    (unit diagonal), with c_j = √G_jj and r_i the weight of output i, 1 unless the cost is ``loss``. The error to make
    small is tr((T - X) N (T - X)ᵀ); |T| is Wanda's importance (arXiv 2306.11695) with the output's sensitivity.
    """

    weight: Tensor
    gram: Tensor
    row_scale: Tensor
    column_scale: Tensor

    @cached_property
    def inverses(self) -> Inverses:
        """What searches with this Gram matrix share (`SupportSearch`)."""
        return {}

    def sparsify(self, count: int, repeats: int = REPEATS) -> tuple[Tensor, Tensor]:
        """X [out, in] with ``count`` non-zeros and a small error, and its mask; ``repeats`` as in `select_support`."""
        return SupportSearch(self.weight, self.gram, self.inverses).solve(count, self.weight, repeats)

    def unscale(self, scaled: Tensor) -> Tensor:
        return scaled.double() / self.row_scale[:, None] / self.column_scale


def scale_problem(problem: LayerProblem) -> ScaledProblem:
    """Scale a layer's weight and Gram matrix; see `ScaledProblem`.

    A thousandth of the mean diagonal is added to the Gram matrix, for inputs that calibration hardly saw.
    """
    diagonal = problem.gram.diagonal().double()
    columns = (diagonal + DAMPING * float(diagonal.mean()) + torch.finfo(torch.float32).tiny).sqrt()
    correlations = torch.empty_like(problem.gram, dtype=torch.float32, memory_format=torch.contiguous_format)
    for rows, scaled in zip(problem.gram.split(ROWS_AT_ONCE), correlations.split(ROWS_AT_ONCE), strict=True):
        start = scaled.storage_offset() // len(correlations)
        scaled.copy_(rows.double() / columns[start : start + len(rows), None] / columns)
    if problem.trust < 1.0:
        correlations.mul_(problem.trust)
    correlations.fill_diagonal_(1.0)
    outputs = torch.ones(problem.out_features, dtype=torch.float64, device=columns.device)
    if problem.column_weights is not None:
        outputs = problem.column_weights
    weight = problem.weight.double() * outputs[:, None] * columns
    return ScaledProblem(weight.float(), correlations, outputs, columns)


def keep_top(scores: Tensor, count: int) -> Tensor:
    """Mask of the ``count`` largest scores of a whole matrix; of equal scores the earlier one is kept.

    >>> keep_top(torch.tensor([[3.0, 1.0], [1.0, 2.0]]), 3).int().tolist()
    [[1, 1], [0, 1]]
    """
    flat = scores.flatten()
    if count >= flat.numel():
        return torch.ones_like(scores, dtype=torch.bool)
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = flat.kthvalue(flat.numel() - count + 1).values
    mask = flat > threshold
    tied = (flat == threshold).nonzero()[: count - int(mask.sum())]
    mask[tied] = True
    return mask.view_as(scores)


class SupportSearch:
    """Which entries of X [rows, n] to keep, and their values, where tr((T - X) N (T - X)ᵀ) is the error.

    ``target`` is T [rows, n], ``gram`` N [n, n]. ``inverses`` keeps what ADMM needs, (N + ρI)⁻¹ by ρ; it depends on
    neither the number of non-zeros nor the start, so searches with one N can share it. Of a matrix beyond
    `KEPT_INVERSES` only that of the last ρ is kept. ``penalties`` are those of ADMM, ρ.

    `sparse_low_rank.Deflated` has another error, and overrides what depends on it.
    """

    penalties: Sequence[float] = PENALTIES

    def __init__(self, target: Tensor, gram: Tensor, inverses: Inverses | None = None) -> None:
        self.target, self.gram = target, gram
        self._inverses: Inverses = {} if inverses is None else inverses

    def damped_inverse(self, penalty: float, dtype: torch.dtype) -> Tensor:
        """(N + ρI)⁻¹ [n, n]."""
        if (penalty, dtype) not in self._inverses:
            if len(self.gram) > KEPT_INVERSES and (penalty, torch.float32) not in self._inverses:
                self._inverses.clear()
            exact = self._inverses.get((penalty, torch.float32))
            self._inverses[penalty, dtype] = (self._invert(penalty) if exact is None else exact).to(dtype)
        return self._inverses[penalty, dtype]

    def _invert(self, penalty: float) -> Tensor:
        # In columns, as LAPACK wants it: inverted in place, as a wide layer's matrix takes gigabytes.
        damped = torch.empty_like(self.gram, memory_format=torch.contiguous_format).T
        damped.copy_(self.gram).diagonal().add_(penalty)
        torch.linalg.cholesky(damped, out=damped)
        return torch.cholesky_inverse(damped, out=damped)

    def times_gram(self, matrix: Tensor) -> Tensor:
        """X N for X [rows, n], with the N of the error."""
        return matrix @ self.gram

    def times_inverse(self, matrix: Tensor, penalty: float) -> Tensor:
        """X (N + ρI)⁻¹ for X [rows, n], with the N of the error.

        In the precision of `coarse_type`, but for the last ρ: `fit` starts from what comes of that.
        """
        dtype = torch.float32 if penalty == self.penalties[-1] else coarse_type(matrix)
        return (matrix.to(dtype) @ self.damped_inverse(penalty, dtype)).float()

    def relax(self, kept: Tensor, dual: Tensor, penalty: float) -> Tensor:
        """X that minimises the error, halved, plus ρ/2 ‖X - D + U‖², for D and U [rows, n].

        As T + ρ (D - T - U)(N + ρI)⁻¹: what products round is small beside T, and the same support comes of it.
        """
        change = (kept - self.target).sub_(dual)
        return torch.add(self.target, self.times_inverse(change, penalty), alpha=penalty)

    def adapt(self, kept: Tensor) -> None:
        """Called with D after each iteration of ADMM, for what follows the support."""

    def select_support(self, count: int, start: Tensor, repeats: int = REPEATS) -> tuple[Tensor, Tensor]:
        """The ``count`` entries to keep, by ADMM on the constraint (as ALPS, arXiv 2406.07831), in scaled form.

        X minimises the error, halved, plus ρ/2 ‖X - D + U‖², D is X + U thresholded over the whole matrix, U sums up
        X - D; ρ grows, after ``repeats`` iterations each, which settles the support. ``start`` is D before the first
        iteration. Returns the mask and D. Each iteration takes one product [rows, n]·[n, n].
        """
        kept, dual, last = start, torch.zeros_like(start), self.penalties[0]
        for penalty in self.penalties:
            dual.mul_(last / penalty)  # ρ U is what stays
            last = penalty
            for _ in range(repeats):
                shifted = self.relax(kept, dual, penalty).add_(dual)
                kept = F.hardshrink(shifted, size_exceeded(shifted, count))
                dual = shifted.sub_(kept)
                self.adapt(kept)
        shifted = kept + dual
        mask = keep_top(shifted.abs(), count)
        return mask, shifted.mul_(mask)

    def fit(self, mask: Tensor, start: Tensor, iterations: int = FIT_ITERATIONS) -> Tensor:
        """Least squares on a support, all rows at once, by projected conjugate gradients from ``start``.

        Solves (X N)_ij = (T N)_ij on the mask, X zero elsewhere. Each iteration takes one product [rows, n]·[n, n].
        """
        tiny = torch.finfo(torch.float32).tiny
        solution = start * mask
        residual = self.times_gram(self.target - solution).mul_(mask)
        direction = residual
        energy = residual.square().sum(dim=1, keepdim=True)
        for _ in range(iterations):
            image = self.times_gram(direction).mul_(mask)
            curvature = (direction * image).sum(dim=1, keepdim=True)
            # Where the error hardly bends, rounding decides the curvature, and there is nothing left to gain.
            bends = curvature > FLAT * direction.square().sum(dim=1, keepdim=True)
            step = torch.where(bends, energy / curvature.clamp(min=tiny), 0.0)
            solution.addcmul_(step, direction)
            residual = image.mul_(step).neg_().add_(residual)
            new_energy = residual.square().sum(dim=1, keepdim=True)
            direction = (new_energy / energy.clamp(min=tiny) * direction).add_(residual)
            energy = new_energy
        return solution

    def solve(self, count: int, start: Tensor, repeats: int = REPEATS) -> tuple[Tensor, Tensor]:
        """X [rows, n] with ``count`` non-zeros, and its mask: support by ADMM, then least squares on it."""
        mask, kept = self.select_support(count, start, repeats)
        return self.fit(mask, kept), mask

"""Sparse plus low-rank: W ≈ X + A B, found together.

Alternating the two parts settles at once: each fits what the other leaves, and neither moves. Here the sparse part is
found by the ADMM of `factorization.sparse` on the error that the *best* A leaves (`Deflated`), and the atoms B turn a
little in each of its iterations, while its support still moves.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rocket.factorization.basis import positive
from rocket.factorization.sparse import ScaledProblem, SupportSearch

PENALTIES = (0.15, 0.21, 0.29, 0.41, 0.57)
OVERSHOOT = 1.9
START_TURNS = 3
LAST_TURNS = 2
RIDGES = (1e-6, 1e-4, 1e-2, 1.0)


class Deflated(SupportSearch):
    """What X + A B leaves of a scaled weight T [out, in] at the best A [out, k], for atoms B [k, in] that adapt to X.

    With atoms orthonormal in N (B N Bᵀ = I) and U = N Bᵀ, the best A is (T - X) U, and the error that remains is
    tr((T - X) N' (T - X)ᵀ) with N' = N - U Uᵀ: the error of a sparse layer whose inputs have lost k directions.
    (N' + ρI)⁻¹ comes from (N + ρI)⁻¹ by the formula of Woodbury.
    """

    penalties = PENALTIES

    def __init__(self, scaled: ScaledProblem, rank: int) -> None:
        super().__init__(scaled.weight, scaled.gram, scaled.inverses)
        generator = torch.Generator().manual_seed(0)
        start = torch.randn(rank, len(scaled.gram), generator=generator, device="cpu")
        self._set_atoms(start.to(self.target))
        for _ in range(START_TURNS):
            self._turn(self.target)

    def _set_atoms(self, rows: Tensor) -> None:
        """Take the space of ``rows`` [k, in] for that of the atoms."""
        rows = rows / positive(torch.linalg.vector_norm(rows, ord=torch.inf, dim=1, keepdim=True))
        images = self.gram @ rows.T
        products = (rows @ images).double()
        lengths = positive(products.diagonal()).sqrt()
        products = products / lengths / lengths[:, None]
        for ridge in RIDGES:  # rows may depend on each other: a weight of lower rank than there are atoms
            factor, failed = torch.linalg.cholesky_ex(products + ridge * torch.eye(len(rows)).to(products))
            if not failed:
                break
        factor = (factor * lengths[:, None]).float()
        self.atoms = torch.linalg.solve_triangular(factor, rows, upper=False)
        self.images = torch.linalg.solve_triangular(factor, images.T, upper=False).T  # U = N Bᵀ [in, k]

    def _turn(self, rest: Tensor, overshoot: float = 1.0) -> None:
        """One step of subspace iteration towards the best atoms for ``rest`` [out, in], or further by ``overshoot``."""
        coefficients = rest @ self.images
        directions = torch.linalg.qr(coefficients).Q
        turned = directions.T @ rest
        if overshoot != 1.0:
            turned = turned.mul_(overshoot).addmm_(directions.T @ coefficients, self.atoms, alpha=1.0 - overshoot)
        self._set_atoms(turned)

    def adapt(self, kept: Tensor) -> None:
        self._turn(self.target - kept, OVERSHOOT)

    def times_gram(self, matrix: Tensor) -> Tensor:
        return torch.addmm(matrix @ self.gram, matrix @ self.images, self.images.T, alpha=-1.0)

    def times_inverse(self, matrix: Tensor, penalty: float) -> Tensor:
        spread = self.damped_inverse(penalty, torch.float32) @ self.images
        inner = torch.eye(spread.shape[1]).to(spread) - self.images.T @ spread
        thin = torch.linalg.solve(inner, matrix @ spread, left=False)
        return super().times_inverse(matrix, penalty).addmm_(thin, spread.T)

    def decompose(self, count: int, repeats: int) -> tuple[Tensor, Tensor, Tensor]:
        """X [out, in] with ``count`` non-zeros, its mask, and A [out, k]; only once, as the atoms have moved then.

        ``repeats`` are the iterations with each penalty: the error goes on falling with them, as support and atoms
        follow each other.
        """
        mask, kept = self.select_support(count, self.target, repeats)
        sparse = self.fit(mask, kept)
        for _ in range(LAST_TURNS):
            self._turn(self.target - sparse)
        sparse = self.fit(mask, sparse)
        return sparse, mask, (self.target - sparse) @ self.images

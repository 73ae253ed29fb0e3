"""The orthonormal basis in which a whitened layer is taken apart."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rocket.factorization.whitening import Whitening

ATOMS_AT_ONCE = 1024


@dataclass(frozen=True)
class Basis:
    """Z = Q diag(σ) V, singular values descending.

    ``atoms`` is Q [in, r], ``scales`` is σ [r], ``rows`` is V [r, out], r = min(in, out). ``weight_norms`` are the
    norms ‖S⁻¹ q_i‖ [r]: how strongly an atom shows in weight space.
    """

    atoms: Tensor
    scales: Tensor
    rows: Tensor
    weight_norms: Tensor


def eigenbasis(target: Tensor, whitening: Whitening) -> Basis:
    """Eigenvectors of ZZᵀ for Z [in, out], through the smaller of ZZᵀ and ZᵀZ, in float64."""
    if target.shape[0] <= target.shape[1]:
        values, atoms = torch.linalg.eigh(target @ target.T)
        atoms, scales = atoms.flip(1), values.flip(0).clamp(min=0).sqrt()
        rows = atoms.T @ target
        rows = rows / positive(rows.norm(dim=1, keepdim=True))
    else:
        values, vectors = torch.linalg.eigh(target.T @ target)
        rows, scales = vectors.flip(1).T.contiguous(), values.flip(0).clamp(min=0).sqrt()
        atoms = target @ rows.T
        atoms /= positive(atoms.norm(dim=0))
    weight_norms = torch.cat([whitening.unwhiten(some).norm(dim=0) for some in atoms.split(ATOMS_AT_ONCE, dim=1)])
    return Basis(atoms.float(), scales.float(), rows.float(), weight_norms.float())


def positive(tensor: Tensor) -> Tensor:
    """Safe to divide by."""
    return tensor.clamp(min=torch.finfo(torch.float32).tiny)

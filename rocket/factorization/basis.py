"""The orthonormal basis in which a whitened layer is taken apart."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Basis:
    """Z = Q diag(σ) V, singular values descending, without Q.

    ``scales`` is σ [r], ``rows`` is V [r, out], r = min(in, out).
    """

    scales: Tensor
    rows: Tensor


def basis_of_target(target: Tensor) -> Basis:
    """From Z [in, out] with in <= out, in float64, through the eigenvectors of ZZᵀ."""
    values, atoms = torch.linalg.eigh(target @ target.T)
    rows = atoms.flip(1).T @ target
    rows = rows / positive(rows.norm(dim=1, keepdim=True))
    return Basis(values.flip(0).clamp(min=0).sqrt().float(), rows.float())


def basis_of_gram(gram: Tensor) -> Basis:
    """From ZᵀZ [out, out] with out <= in, in float64."""
    values, vectors = torch.linalg.eigh(gram)
    return Basis(values.flip(0).clamp(min=0).sqrt().float(), vectors.flip(1).T.float().contiguous())


def positive(tensor: Tensor) -> Tensor:
    """Safe to divide by."""
    return tensor.clamp(min=torch.finfo(torch.float32).tiny)

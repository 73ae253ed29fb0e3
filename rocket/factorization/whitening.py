"""Whitening: a square root S of the Gram matrix, so that errors in S-space are output errors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

DAMPINGS = (0.0, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2)


@dataclass(frozen=True)
class Whitening:
    """G + damping · mean(diag G) · I = SᵀS.

    ``root`` is S, [in, in], in float64: upper triangular, or symmetric where the Cholesky factorization failed at every
    damping. ``damping`` is relative to the mean diagonal of G.
    """

    root: Tensor
    damping: float


def whiten(gram: Tensor) -> Whitening:
    """Square root of a Gram matrix [in, in], with the smallest damping that makes it positive definite.

    Of the matrix, which is symmetric, one triangle is read. Memory: in² float64.

    Dead input channels, constant activations and fewer tokens than features all give a singular G; damping then
    escalates over `DAMPINGS`. Raises ValueError if G is not square or holds non-finite values.

    >>> whitening = whiten(torch.tensor([[4.0, 2.0], [2.0, 5.0]]))
    >>> whitening.root.tolist(), whitening.damping
    ([[2.0, 1.0], [0.0, 2.0]], 0.0)
    """
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1]:
        raise ValueError(f"a Gram matrix is square, got shape {tuple(gram.shape)}")
    bad_rows = ~torch.stack([row.isfinite().all() for row in gram])
    if bad_rows.any():
        first = int(bad_rows.nonzero()[0])
        raise ValueError(f"Gram matrix has {int(bad_rows.sum())} non-finite rows (first: {first})")
    scale = float(gram.diagonal().double().mean())
    if scale <= 0.0:
        return Whitening(torch.eye(len(gram), dtype=torch.float64, device=gram.device), damping=0.0)
    # In columns, as LAPACK wants it: factored in place, as a wide layer's matrix takes gigabytes.
    root = torch.empty_like(gram, dtype=torch.float64, memory_format=torch.contiguous_format).T
    failed = torch.empty((), dtype=torch.int32, device=gram.device)
    for damping in DAMPINGS:
        root.copy_(gram)
        root.diagonal().add_(damping * scale)
        torch.linalg.cholesky_ex(root, upper=True, out=(root, failed))
        # Cholesky can succeed on a singular matrix by rounding luck; its inverse would then be noise.
        if not failed and float(root.diagonal().min()) ** 2 > 1e-14 * scale:
            return Whitening(root, damping=damping)
    values, vectors = torch.linalg.eigh(gram.double())
    values = values.clamp(min=DAMPINGS[-1] * scale)
    return Whitening((vectors * values.sqrt()) @ vectors.T, damping=DAMPINGS[-1])

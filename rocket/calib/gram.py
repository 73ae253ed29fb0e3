"""Gram matrices G = E[x xᵀ] of layer inputs, accumulated while data streams by."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

BLOCKS = 3
CALLS_IN_FLOAT32 = 8


class GramAccumulator:
    """Sum of x xᵀ over tokens: in float32 over a few calls of `add`, in float64 over all.

    >>> accumulator = GramAccumulator(2, torch.device("cpu"))
    >>> accumulator.add(torch.tensor([[1.0, 2.0], [3.0, 0.0]]))
    >>> accumulator.tokens, accumulator.gram().tolist()
    (2, [[5.0, 1.0], [1.0, 2.0]])
    """

    def __init__(self, features: int, device: torch.device) -> None:
        self._total = torch.zeros(features, features, dtype=torch.float64, device=device)
        self._recent = torch.zeros(features, features, device=device)
        self._calls = 0
        self.tokens = 0

    def add(self, inputs: Tensor) -> None:
        """Add tokens [n, features]. Raises ValueError, and adds nothing, if any is not finite.

        Only blocks on and above the diagonal are computed, two thirds of a full product.
        """
        exact_in_bfloat16 = inputs.dtype == torch.bfloat16
        inputs = inputs.float()
        if not torch.isfinite(inputs.sum()):
            raise ValueError("non-finite activations")
        features = inputs.shape[1]
        block = -(-features // BLOCKS)
        with _matmul_precision("medium" if exact_in_bfloat16 else "highest"):
            for start in range(0, features, block):
                self._recent[start : start + block, start:].addmm_(
                    inputs[:, start : start + block].T, inputs[:, start:]
                )
        self.tokens += len(inputs)
        self._calls += 1
        if self._calls % CALLS_IN_FLOAT32 == 0:
            self._total += self._recent
            self._recent.zero_()

    def gram(self) -> Tensor:
        """The mean of x xᵀ over the tokens so far, [features, features] in float32."""
        upper = (self._total + self._recent).triu()
        return ((upper + upper.triu(1).T) / max(self.tokens, 1)).float()


@contextmanager
def _matmul_precision(precision: str) -> Iterator[None]:
    """``medium`` lets float32 products round their factors to bfloat16, at twice the speed on a CPU that multiplies it.

    Sums and results stay in float32, so nothing is lost where the factors were bfloat16 to begin with.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def pack_triangle(symmetric: Tensor) -> Tensor:
    """The upper triangle of a symmetric [n, n] matrix, row by row, as one vector [n(n+1)/2].

    >>> pack_triangle(torch.tensor([[1.0, 2.0], [2.0, 3.0]])).tolist()
    [1.0, 2.0, 3.0]
    """
    rows, columns = torch.triu_indices(*symmetric.shape)
    return symmetric[rows, columns]


def unpack_triangle(triangle: Tensor) -> Tensor:
    """The symmetric matrix of a vector made by `pack_triangle`. Raises ValueError for anything else."""
    size = (math.isqrt(8 * triangle.numel() + 1) - 1) // 2
    if triangle.ndim != 1 or not triangle.is_floating_point() or size * (size + 1) // 2 != len(triangle):
        raise ValueError(f"{triangle.dtype} {list(triangle.shape)} is no triangle of a matrix")
    rows, columns = torch.triu_indices(size, size)
    symmetric = triangle.new_zeros(size, size)
    symmetric[rows, columns] = triangle
    symmetric[columns, rows] = triangle
    return symmetric

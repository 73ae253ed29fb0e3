"""Gram matrices G = E[x xᵀ] of layer inputs, accumulated while data streams by."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

PANELS = 3
PANEL_ROWS = 2048


class GramAccumulator:
    """Sum of x xᵀ over tokens: each call of `add` in float32, their sum in float64.

    So the order in which calls are summed, and over how many processes, all but never shows: a float64 sum of a few
    hundred float32 numbers is exact unless they lie 2²⁰ apart.

    >>> accumulator = GramAccumulator(2, torch.device("cpu"))
    >>> accumulator.add(torch.tensor([[1.0, 2.0], [3.0, 0.0]]))
    >>> accumulator.tokens, accumulator.gram().tolist()
    (2, [[5.0, 1.0], [1.0, 2.0]])
    """

    def __init__(self, features: int, device: torch.device) -> None:
        rows = min(PANEL_ROWS, -(-features // PANELS))
        self._features = features
        self._panels = {
            start: torch.zeros(min(rows, features - start), features - start, dtype=torch.float64, device=device)
            for start in range(0, features, rows)
        }
        self.tokens = 0

    def add(self, inputs: Tensor) -> None:
        """Add tokens [n, features]. Raises ValueError, and adds nothing, if any is not finite.

        Only panels of rows from the diagonal on are computed, two thirds of a full product or less.
        """
        exact_in_bfloat16 = inputs.dtype == torch.bfloat16
        inputs = inputs.float()
        if not torch.isfinite(inputs.sum()):
            raise ValueError("non-finite activations")
        with _matmul_precision("medium" if exact_in_bfloat16 else "highest"):
            for start, panel in self._panels.items():
                panel += inputs[:, start : start + len(panel)].T @ inputs[:, start:]
        self.tokens += len(inputs)

    @property
    def sums(self) -> list[Tensor]:
        """The sums so far, to be added to those of other processes in place."""
        return list(self._panels.values())

    def gram(self) -> Tensor:
        """The mean of x xᵀ over the tokens, [features, features] in float32. Takes the sums away."""
        gram: Tensor | None = None
        for start in list(self._panels):
            panel = self._panels.pop(start)
            if gram is None:
                gram = torch.empty(self._features, self._features, device=panel.device)
            end = start + len(panel)
            mean = (panel / max(self.tokens, 1)).float()
            square = mean[:, : len(panel)].triu()
            gram[start:end, start:end] = square + square.triu(1).T
            gram[start:end, end:] = mean[:, len(panel) :]
            gram[end:, start:end] = mean[:, len(panel) :].T
        assert gram is not None
        return gram


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
    return torch.cat([row[number:] for number, row in enumerate(symmetric)])


def unpack_triangle(triangle: Tensor) -> Tensor:
    """The symmetric matrix of a vector made by `pack_triangle`. Raises ValueError for anything else."""
    size = (math.isqrt(8 * triangle.numel() + 1) - 1) // 2
    if triangle.ndim != 1 or not triangle.is_floating_point() or size * (size + 1) // 2 != len(triangle):
        raise ValueError(f"{triangle.dtype} {list(triangle.shape)} is no triangle of a matrix")
    symmetric = triangle.new_empty(size, size)
    start = 0
    for number, row in enumerate(symmetric):
        row[number:] = triangle[start : start + size - number]
        start += size - number
    for start in range(0, size, PANEL_ROWS):
        end = min(start + PANEL_ROWS, size)
        symmetric[end:, start:end] = symmetric[start:end, end:].T
        square = symmetric[start:end, start:end]
        square.copy_(square.triu() + square.triu(1).T)
    return symmetric

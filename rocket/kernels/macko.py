"""MACKO's matrix-vector product as another backend: float16 on CUDA, one row of input.

`macko_spmv` is not on PyPI and compiles its kernels when it is first imported, so it is imported only where a user asks
for it by `optimize(backend="macko")`. Above a density of 0.23 its 4-bit distances take more bytes than a bitmap, and
they are stored beside it, since longer inputs still go through the bitmap.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

Packed = tuple[Tensor, Tensor, Tensor, int, int]
"""Values, 4-bit distances, where rows begin, rows, columns: as `macko_spmv.compress` gives them."""


def load() -> ModuleType:
    """The package. Raises ValueError where it is not installed."""
    try:
        import macko_spmv
    except ImportError as error:
        raise ValueError(
            f"backend='macko' needs the package macko_spmv ({error}): install it from its repository, vlejd/macko_spmv"
        ) from None
    found: ModuleType = macko_spmv
    return found


def fits(values: Tensor) -> bool:
    """Whether MACKO multiplies values like these: float16 on a CUDA device."""
    return values.dtype == torch.float16 and values.is_cuda


def compress(dense: Tensor) -> Packed:
    """A matrix [out, cols] in MACKO's format; zeros are left out."""
    packed: Packed = load().compress(dense.contiguous())
    return packed


def linear(packed: Packed, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Sᵀ + bias for one row of x, in any number of dimensions [..., cols]."""
    multiply: Any = torch.ops.macko_spmv.multiply.default
    y: Tensor = multiply(*packed, x.reshape(-1))
    return (y if bias is None else y + bias).view(*x.shape[:-1], -1)

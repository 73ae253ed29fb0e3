"""The int8 format in plain torch: the reference that every kernel is tested against, on any device.

A matrix whose values are int8 comes with `scale` [out], floating: what 127 stands for in each row, the largest
magnitude there. It is stored rather than the step, scale / 127, because it lies in the range of the weights, and so
survives float16 as well as they do.
"""

import math

import torch
from torch import Tensor

STEPS = 127
ROWS_AT_ONCE = 1024


def quantize(dense: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The nearest int8 matrix, row by row.

    Args:
        dense: [out, cols], finite.
        dtype: what the scale is stored in. Values are rounded to the steps of the scale as stored.

    Returns:
        `(values, scale)`: int8 [out, cols] and `dtype` [out].

    >>> values, scale = quantize(torch.tensor([[1.0, -0.5, 0.0]]), torch.float32)
    >>> values.tolist(), scale.tolist()
    ([[127, -64, 0]], [1.0])
    """
    largest = torch.linalg.vector_norm(dense, math.inf, dim=1) if dense.numel() else dense.new_zeros(len(dense))
    scale = largest.clamp(max=torch.finfo(dtype).max).to(dtype)
    step = scale.to(dense.dtype) / STEPS
    step = torch.where(step > 0, step, 1).unsqueeze(1)
    values = torch.empty(dense.shape, dtype=torch.int8, device=dense.device)
    for rounded, part, unit in zip(*(tensor.split(ROWS_AT_ONCE) for tensor in (values, dense, step)), strict=True):
        rounded.copy_((part / unit).round_().clamp_(-STEPS, STEPS))
    return values, scale


def dequantize(values: Tensor, scale: Tensor, out: Tensor | None = None) -> Tensor:
    """The matrix [out, cols] that int8 values and their scale stand for, in the scale's type, in ``out`` if given."""
    if out is None:
        out = torch.empty(values.shape, dtype=scale.dtype, device=values.device)
    return torch.mul(values, (scale.detach().float() / STEPS).unsqueeze(1), out=out)

"""What the products of `kernels.ops` ask of their arguments, on every device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn

from rocket.kernels import bitmap

Tensors: TypeAlias = Sequence[Tensor]
Optionals: TypeAlias = Sequence[Tensor | None]

PLAIN = frozenset((Tensor, nn.Parameter))
"""Classes of tensors that have memory: others (quantized, distributed) may have none."""


_is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", lambda: False)  # since torch 2.7


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is numbers in memory, one after the other: what a pointer can stand for.

    An exporter's stand-ins are of classes of their own; what they stand for counts as plain.
    """
    known = type(tensor) in PLAIN or _is_exporting()
    return known and tensor.layout is torch.strided and tensor.is_contiguous()


def why_not_plain(tensor: Tensor) -> str:
    """What a tensor is that is not plain, to follow "it is"."""
    if type(tensor) not in PLAIN:
        return f"of class {type(tensor).__name__}"
    return "not contiguous" if tensor.layout is torch.strided else f"of layout {tensor.layout}"


def check_sparse(mask: Tensor, offsets: Tensor, cols: int) -> None:
    if mask.shape[1] != bitmap.mask_bytes(cols) or offsets.shape[0] != mask.shape[0] + 1:
        raise ValueError(
            f"mask is {list(mask.shape)} and offsets {list(offsets.shape)}; "
            f"{cols} columns need [out, {bitmap.mask_bytes(cols)}] and [out + 1]"
        )


def check_dictionary(dictionary: Tensor | None, scale: Tensor | None, cols: int, in_features: int) -> None:
    """Of a sparse matrix with ``cols`` columns behind a dictionary [rank, in], or without one."""
    if dictionary is None:
        if cols != in_features:
            raise ValueError(f"a matrix of {cols} columns does not multiply x of {in_features}")
        if scale is not None:
            raise ValueError("there is a scale for a dictionary, and no dictionary")
        return
    shape = dictionary.shape
    if len(shape) != 2 or shape[1] != in_features or cols not in (shape[0], shape[0] + in_features):
        raise ValueError(f"dictionary is {list(shape)}; x has {in_features} columns, the matrix behind it {cols}")
    check_scale(dictionary, scale, len(dictionary))


def check_product(
    x: Tensor, weight: Tensor, cols: int, scale: Tensor | None, out: int, bias: Tensor | None = None
) -> None:
    dtype = value_type(weight, scale)
    check_input(x, dtype, cols)
    check_scale(weight, scale, out)
    check_bias(bias, dtype, out)


def check_bias(bias: Tensor | None, dtype: torch.dtype, out: int) -> None:
    if bias is not None and (bias.shape != (out,) or bias.dtype != dtype):
        raise ValueError(f"bias is {bias.dtype} {list(bias.shape)}; the product needs {dtype} [{out}]")


def check_input(x: Tensor, dtype: torch.dtype, cols: int) -> None:
    if x.shape[-1] != cols or x.dtype != dtype:
        raise ValueError(f"x is {x.dtype} {list(x.shape)}; the matrix needs {dtype} [..., {cols}]")


def check_scale(weight: Tensor, scale: Tensor | None, out: int) -> None:
    if scale is not None and (scale.shape != (out,) or weight.dtype != torch.int8):
        raise ValueError(f"values are {weight.dtype}, their scale {list(scale.shape)}: int8 needs a scale [{out}]")


def value_type(values: Tensor, scale: Tensor | None) -> torch.dtype:
    """What values are multiplied in."""
    return values.dtype if scale is None else scale.dtype


def rows_of(x: Tensor) -> int:
    return x.shape[:-1].numel()

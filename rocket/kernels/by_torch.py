"""The products of `kernels.ops` through torch's own, on any device.

A product made of others goes through the ops, each by the best there is for it on the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from rocket.kernels import bitmap, int8, operands
from rocket.kernels.operands import Optionals, Tensors


def sparse_linear(
    x: Tensor,
    values: Tensor,
    mask: Tensor,
    offsets: Tensor,
    cols: int,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    operands.check_product(x, values, cols, scale, mask.shape[0])
    return F.linear(x, expand(values, mask, offsets, cols, scale), bias)


def packed_linears(
    x: Tensor,
    values: Tensors,
    scales: Optionals,
    masks: Tensors,
    offsets: Tensors,
    biases: Optionals,
    dictionaries: Optionals,
    dictionary_scales: Optionals,
    columns: Sequence[int],
) -> list[Tensor]:
    outputs = []
    parts = zip(values, scales, masks, offsets, biases, dictionaries, dictionary_scales, columns, strict=True)
    for value, scale, mask, starts, bias, dictionary, dictionary_scale, cols in parts:
        operands.check_dictionary(dictionary, dictionary_scale, cols, x.shape[-1])
        if dictionary is None:
            output = torch.ops.rocket.sparse_linear(x, value, mask, starts, cols, bias, scale)
        else:
            factors = dictionary, value, mask, starts, bias, dictionary_scale, scale
            output = torch.ops.rocket.factor_linear(x, *factors, cols != len(dictionary))
        outputs.append(output)
    return outputs


def factor_linear(
    x: Tensor,
    dictionary: Tensor,
    values: Tensor,
    mask: Tensor,
    offsets: Tensor,
    bias: Tensor | None = None,
    dictionary_scale: Tensor | None = None,
    scale: Tensor | None = None,
    beside_input: bool = False,
) -> Tensor:
    hidden = torch.ops.rocket.dense_linear(x, dictionary, None, dictionary_scale)
    if beside_input:
        hidden = torch.cat([hidden, x], dim=-1)
    result: Tensor = torch.ops.rocket.sparse_linear(hidden, values, mask, offsets, hidden.shape[-1], bias, scale)
    return result


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
    operands.check_scale(weight, scale, weight.shape[0])
    return F.linear(x, weight if scale is None else int8.dequantize(weight, scale), bias)


def expand(values: Tensor, mask: Tensor, offsets: Tensor, cols: int, scale: Tensor | None = None) -> Tensor:
    operands.check_scale(values, scale, mask.shape[0])
    dense = bitmap.unpack(values, mask, cols)
    return dense if scale is None else int8.dequantize(dense, scale)


def pick(dense: Tensor, mask: Tensor, count: int) -> Tensor:
    return bitmap.pick(dense, mask)

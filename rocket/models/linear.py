"""The linear layers of transformers: ``nn.Linear``, and ``Conv1D``, GPT-2's, which stores its weight transposed."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

LinearLayer: TypeAlias = nn.Linear | Conv1D


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer that can be replaced.

    Subclasses of ``nn.Linear`` may do more than multiply, as packed ones of quantizers do: they are asked for a product
    (not on ``meta``, where nothing can be asked).

    >>> is_linear(nn.Linear(3, 2)), is_linear(nn.LayerNorm(3))
    (True, False)
    """
    if type(module) in (nn.Linear, Conv1D):
        return True
    if not isinstance(module, nn.Linear) or not module.weight.is_floating_point():
        return False
    return module.weight.is_meta or _only_multiplies(module)


@torch.no_grad()
def _only_multiplies(layer: nn.Linear) -> bool:
    inputs = torch.linspace(-1.0, 1.0, layer.in_features, device=layer.weight.device).to(layer.weight.dtype)[None]
    try:
        return torch.allclose(layer(inputs), F.linear(inputs, layer.weight, layer.bias), rtol=1e-2, atol=1e-3)
    except (RuntimeError, TypeError, ValueError):
        return False


def weight_of(layer: Any) -> Tensor:
    """W [out, in] of a linear layer, a view of its parameter.

    >>> tuple(weight_of(nn.Linear(3, 2)).shape), tuple(weight_of(Conv1D(2, 3)).shape)
    ((2, 3), (2, 3))
    """
    weight: Tensor = layer.weight
    return weight.T if isinstance(layer, Conv1D) else weight


def features_of(layer: Any) -> tuple[int, int]:
    """(out, in) of a linear layer."""
    out_features, in_features = weight_of(layer).shape
    return out_features, in_features


def make_linear(kind: type[nn.Module], weight: Tensor, bias: nn.Parameter | None) -> LinearLayer:
    """A linear layer of a class, ``nn.Linear`` or ``Conv1D``, with this weight [out, in] and bias."""
    out_features, in_features = weight.shape
    linear: Any
    with torch.device("meta"):
        if kind is Conv1D:
            linear, weight = Conv1D(out_features, in_features), weight.T.contiguous()
        else:
            linear = nn.Linear(in_features, out_features, bias=bias is not None)
    linear.weight = nn.Parameter(weight)
    linear.bias = bias
    result: LinearLayer = linear
    return result

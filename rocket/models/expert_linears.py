"""Experts as linear layers, where the family's own code takes one weight of a stack and multiplies by it.

That code keeps running: where it takes ``self.gate_up_proj[expert]`` it finds an element of `ExpertLinears` instead,
which stands for the weight and calls that expert's layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LAYOUTS = ("expert,out,in", "expert,in,out")
EAGER = "eager"
ONE_AT_A_TIME = "experts in layers of their own are taken one at a time; call model.set_experts_implementation('eager')"


class ExpertLinears(nn.Module):
    """The experts of one stacked parameter, each a linear layer without bias, named by its number.

    ``layout`` tells how the parameter lay: as ``expert,out,in`` its elements are multiplied by ``F.linear(x, w)``, as
    ``expert,in,out`` by ``x @ w``. The layers' weights are views of the parameter; nothing is copied.

    >>> experts = ExpertLinears(nn.Parameter(torch.ones(2, 4, 3)), "expert,out,in")
    >>> F.linear(torch.ones(5, 3), experts[1]).shape, [name for name, _ in experts.named_children()]
    (torch.Size([5, 4]), ['0', '1'])

    ``implementation`` is what transformers 5 ran the experts by (``config._experts_implementation``) until they were
    made layers, which only "eager" uses. The others take the whole parameter and get a RuntimeError.
    """

    def __init__(self, stacked: nn.Parameter, layout: str) -> None:
        super().__init__()
        self.layout = layout
        self.implementation: str | None = EAGER
        for number, weight in enumerate(stacked.detach()):
            weight = weight.T if self.transposed else weight
            with torch.device("meta"):
                layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            layer.weight = nn.Parameter(weight, requires_grad=stacked.requires_grad)
            self.add_module(str(number), layer)

    @property
    def transposed(self) -> bool:
        return self.layout == "expert,in,out"

    @property
    def shape(self) -> torch.Size:
        """That of the stacked parameter."""
        layer: Any = self._modules["0"]
        sizes = (layer.in_features, layer.out_features) if self.transposed else (layer.out_features, layer.in_features)
        return torch.Size((len(self), *sizes))

    def __len__(self) -> int:
        return len(self._modules)

    def __getitem__(self, index: int | Tensor) -> _ExpertWeight:
        """What stands for the weight of one expert. A tensor of one element keeps its dimension, as in a tensor."""
        if isinstance(index, Tensor) and index.numel() != 1:
            raise RuntimeError(ONE_AT_A_TIME)
        layer = self._modules[str(int(index))]
        assert layer is not None
        return _ExpertWeight(layer, self.transposed, leading=isinstance(index, Tensor) and index.ndim > 0)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if hasattr(Tensor, name):
                raise _NoTensor(f"{ONE_AT_A_TIME} (asked for {name})") from None
            raise

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Tensor:
        """Products of all experts at once, each with its own inputs [experts, n, in]."""
        return _call({torch.bmm: _all_products, **dict.fromkeys(_MATMULS, _all_products)}, function, args, kwargs)

    @torch.no_grad()
    def own_weights(self) -> None:
        """Give every plain layer a weight of its own, so that the stacked tensor can be freed."""
        for layer in self.children():
            if isinstance(layer, nn.Linear):
                layer.weight.data = layer.weight.detach().clone(memory_format=torch.contiguous_format)

    @torch.no_grad()
    def stacked(self) -> nn.Parameter:
        """The parameter again, of plain layers."""
        layers: list[Any] = list(self.children())
        weights = [layer.weight.T if self.transposed else layer.weight for layer in layers]
        return nn.Parameter(torch.stack(weights), requires_grad=layers[0].weight.requires_grad)


class _NoTensor(RuntimeError, AttributeError):
    """An attribute of tensors that experts in layers of their own lack; `hasattr` says so without raising."""


@dataclass(frozen=True)
class _ExpertWeight:
    """Stands for one expert's weight: a product with it calls the expert's layer, anything else is a RuntimeError."""

    layer: nn.Module
    transposed: bool
    leading: bool

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Tensor:
        return _call({F.linear: _linear, **dict.fromkeys(_MATMULS, _matmul)}, function, args, kwargs)

    def product(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.layer(inputs)
        return outputs[None] if self.leading and outputs.ndim < 3 else outputs


_MATMULS = (torch.matmul, Tensor.matmul, torch.mm, Tensor.mm)


def _call(
    known: Mapping[Any, Callable[..., Tensor]], function: Any, args: Sequence[Any], kwargs: Mapping[str, Any] | None
) -> Tensor:
    if function not in known:
        raise RuntimeError(f"{getattr(function, '__name__', function)} is no product with an expert's weight")
    return known[function](*args, **(kwargs or {}))


def _linear(input: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor:
    if not isinstance(weight, _ExpertWeight) or weight.transposed:
        raise RuntimeError("the experts are stored transposed")
    outputs = weight.product(input)
    return outputs if bias is None else outputs + bias


def _matmul(input: Tensor, other: Any) -> Tensor:
    if not isinstance(other, _ExpertWeight) or not other.transposed:
        raise RuntimeError("the experts are not stored transposed")
    return other.product(input)


def _all_products(input: Tensor, experts: Any) -> Tensor:
    """Zero inputs, by which some families tell an expert's tokens from others, are not shown to its layer."""
    if not isinstance(experts, ExpertLinears) or not experts.transposed or len(input) != len(experts):
        raise RuntimeError("the experts are not stored transposed")
    outputs = input.new_zeros(*input.shape[:-1], experts.shape[-1])
    for number, layer in enumerate(experts.children()):
        tokens = input[number].any(dim=-1)
        if tokens.any():
            outputs[number, tokens] = layer(input[number, tokens]).to(input.dtype)
    return outputs

"""One product for sparse layers that read the same input (q, k and v; gate and up)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rocket.kernels import bitmap, ops
from rocket.nn.layers import SparseLinear


@dataclass
class _Pending:
    """Outputs of the layers that have not asked for theirs yet; None where they have."""

    inputs: Tensor
    outputs: list[Tensor | None]


class SharedInput:
    """Sparse layers of one input: the first that is called multiplies for all, the others take what is theirs.

    Whether a layer is asked about the same input is seen by the identity of the tensor, so a model that calls them
    otherwise only loses time. Their rows are stacked; each layer's tensors become parts of the stacked ones, so nothing
    is stored twice. With more rows of input than the kernels multiply directly there is nothing to gain, and each layer
    multiplies by itself.
    """

    def __init__(self, layers: Iterable[SparseLinear]) -> None:
        self.layers = list(layers)
        self.out_features = [layer.out_features for layer in self.layers]
        self.values = torch.cat([layer.weight.detach() for layer in self.layers])
        self.mask = torch.cat([layer.mask for layer in self.layers])
        self.offsets = bitmap.row_offsets(self.mask)
        self.bias = _stack_biases(self.layers)
        self._pending: _Pending | None = None
        values = self.values.split([layer.weight.numel() for layer in self.layers])
        masks = self.mask.split(self.out_features)
        for index, (layer, part, mask) in enumerate(zip(self.layers, values, masks, strict=True)):
            layer.weight = nn.Parameter(part, requires_grad=layer.weight.requires_grad)
            layer.mask = mask
            layer.shared_input, layer.place = self, index

    def product(self, layer: SparseLinear, inputs: Tensor) -> Tensor:
        """x Wᵀ + bias of one of the layers, for up to `ops.MAX_KERNEL_BATCH` rows of x."""
        pending = self._pending
        if pending is None or pending.inputs is not inputs or pending.outputs[layer.place] is None:
            stacked = ops.sparse_linear(inputs, self.values, self.mask, self.offsets, layer.in_features, self.bias)
            parts: list[Tensor | None] = [part.contiguous() for part in stacked.split(self.out_features, dim=-1)]
            pending = _Pending(inputs, parts)
        output = pending.outputs[layer.place]
        assert output is not None
        pending.outputs[layer.place] = None
        self._pending = pending if any(part is not None for part in pending.outputs) else None
        return output

    def dissolve(self) -> None:
        """Let the layers go their own ways, each with a copy of its tensors."""
        for layer in self.layers:
            layer.shared_input = None
            layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=layer.weight.requires_grad)
            layer.mask = layer.mask.clone()

    def __deepcopy__(self, _: object) -> None:
        """A copied layer has tensors of its own, and shares nothing until its model is optimized again."""
        return


def share_inputs(model: nn.Module) -> None:
    """Make the sparse layers that read the same input, by their spec, one product. Does nothing to those that are."""
    groups: dict[tuple[object, ...], list[SparseLinear]] = {}
    for module in model.modules():
        if isinstance(module, SparseLinear) and module.offsets is not None and module.shared_input is None:
            key = (module.spec.input_group, module.in_features, module.weight.dtype, module.weight.device)
            groups.setdefault(key, []).append(module)
    for layers in groups.values():
        if len(layers) > 1:
            SharedInput(layers)


def _stack_biases(layers: list[SparseLinear]) -> Tensor | None:
    if all(layer.bias is None for layer in layers):
        return None
    return torch.cat(
        [layer.weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias.detach() for layer in layers]
    )

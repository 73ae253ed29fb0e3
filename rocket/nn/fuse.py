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
    version: int
    outputs: list[Tensor | None]


class SharedInput:
    """Sparse layers of one input: the first that is called multiplies for all, the others take what is theirs.

    Whether a layer is asked about the same input is seen by the identity of the tensor, so a model that calls them
    otherwise only loses time. Their rows are stacked; each layer's tensors become parts of the stacked ones, so nothing
    is stored twice, and a layer whose tensors were replaced since multiplies by itself. So does each where there are
    more rows of input than the kernels multiply directly: there is nothing to gain.
    """

    def __init__(self, layers: Iterable[SparseLinear]) -> None:
        self.layers = list(layers)
        self.out_features = [layer.out_features for layer in self.layers]
        self.values = torch.cat([layer.weight.detach() for layer in self.layers])
        self.mask = torch.cat([layer.mask for layer in self.layers])
        self.offsets = bitmap.row_offsets(self.mask)
        biases = [layer.bias.detach() for layer in self.layers if layer.bias is not None]
        self.bias = torch.cat(biases) if biases else None
        self._pending: _Pending | None = None
        values = self.values.split([layer.weight.numel() for layer in self.layers])
        masks = self.mask.split(self.out_features)
        for index, layer in enumerate(self.layers):
            layer.weight.data = values[index]
            layer.mask = masks[index]
            if self.bias is not None and layer.bias is not None:
                layer.bias.data = self.bias.split(self.out_features)[index]
            layer.shared_input, layer.place = self, index
        self._pointers = [_pointers(layer) for layer in self.layers]

    def holds(self, layer: SparseLinear) -> bool:
        """Whether the layer's tensors are still parts of the stacked ones."""
        return _pointers(layer) == self._pointers[layer.place]

    def takes(self, layer: SparseLinear, inputs: Tensor) -> bool:
        """Whether `product` is right for this layer, and worth it for these inputs."""
        if inputs.shape[:-1].numel() > ops.MAX_KERNEL_BATCH:
            return False
        return torch.compiler.is_compiling() or self.holds(layer)

    def product(self, layer: SparseLinear, inputs: Tensor) -> Tensor:
        """x Wᵀ + bias of one of the layers."""
        pending, version = self._pending, _version(inputs)
        fresh = pending is not None and pending.inputs is inputs and pending.version == version
        if pending is None or not fresh or pending.outputs[layer.place] is None:
            stacked = ops.sparse_linear(inputs, self.values, self.mask, self.offsets, layer.in_features, self.bias)
            parts: list[Tensor | None] = [part.contiguous() for part in stacked.split(self.out_features, dim=-1)]
            pending = _Pending(inputs, version, parts)
        output = pending.outputs[layer.place]
        assert output is not None
        pending.outputs[layer.place] = None
        self._pending = pending if any(part is not None for part in pending.outputs) else None
        return output

    def dissolve(self) -> None:
        """Let the layers go their own ways, each with a copy of its tensors."""
        for layer in self.layers:
            layer.shared_input = None
            layer.mask = layer.mask.clone()
            for parameter in layer.parameters(recurse=False):
                parameter.data = parameter.data.clone()

    def __deepcopy__(self, _: object) -> None:
        """A copied layer has tensors of its own, and shares nothing until its model is optimized again."""
        return

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """Nor does a pickled one."""
        return type(None), ()


def share_inputs(model: nn.Module) -> None:
    """Make the sparse layers that read the same input, by their spec, one product. Does nothing to those that are.

    Layers with a forward of somebody else's (accelerate's, which moves tensors about) are left alone.
    """
    groups: dict[tuple[object, ...], list[SparseLinear]] = {}
    for module in model.modules():
        if not isinstance(module, SparseLinear) or module.offsets is None or module.shared_input is not None:
            continue
        if "forward" in vars(module):
            continue
        features = (module.in_features, module.weight.dtype, module.weight.device, module.bias is None)
        groups.setdefault((module.spec.input_group, *features), []).append(module)
    for layers in groups.values():
        if len(layers) > 1:
            SharedInput(layers)


def _pointers(layer: SparseLinear) -> tuple[int, int, int]:
    bias = 0 if layer.bias is None else layer.bias.data_ptr()
    return layer.weight.data_ptr(), layer.mask.data_ptr(), bias


def _version(inputs: Tensor) -> int:
    """Grows when a tensor is changed in place; 0 where torch does not count."""
    if torch.compiler.is_compiling() or inputs.is_inference():
        return 0
    return inputs._version

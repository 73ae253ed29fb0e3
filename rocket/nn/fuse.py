"""One product for packed layers that read the same input (q, k and v; gate and up), prepared once."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import Tensor, nn

from rocket.kernels import cpu, operands, ops
from rocket.nn.layers import PackedLinear


@dataclass
class _Pending:
    """Outputs of the layers that have not asked for theirs yet; None where they have."""

    inputs: Tensor
    version: int
    outputs: list[Tensor | None]


class SharedInput:
    """Packed layers of one input: the first that is called multiplies for all, the others take what is theirs.

    Whether a layer is asked about the same input is seen by the identity of the tensor, so a model that calls them
    otherwise only loses time. Between the calls for one input the layers' tensors must not change, nor, in inference
    mode or a compiled graph, the input in place. On a CPU the product is kept with its arguments checked and laid out;
    at each call it is seen whether they are still the layers' tensors. A layer alone gains that too. Where there are
    more rows of input than the kernels multiply directly, each multiplies by itself: there is nothing to gain.
    """

    def __init__(self, layers: Sequence[PackedLinear]) -> None:
        self._layers = [weakref.ref(layer) for layer in layers]  # they hold this, and are freed with their model
        self._in_features = layers[0].in_features
        self._columns = [layer.spec.columns for layer in layers]
        self._factored = [layer.spec.rank > 0 for layer in layers]
        self._pending: _Pending | None = None
        self._products: cpu.PackedProducts | None = None
        self._places: tuple[object, ...] = ()
        self._slots = [slot for layer in layers for slot in layer.slots()]
        for index, layer in enumerate(layers):
            layer.shared_input, layer.place = self, index

    @property
    def layers(self) -> list[PackedLinear]:
        """Those that are still there."""
        return [layer for layer in (reference() for reference in self._layers) if layer is not None]

    def product(self, layer: PackedLinear, inputs: Tensor) -> Tensor | None:
        """x Wᵀ + bias of one of the layers; None where it is to multiply by itself."""
        pending, version = self._pending, _version(inputs)
        fresh = pending is not None and pending.inputs is inputs and pending.version == version
        if pending is None or not fresh or pending.outputs[layer.place] is None:
            outputs = self._multiply(inputs)
            if outputs is None:
                return None
            pending = _Pending(inputs, version, list(outputs))
        output = pending.outputs[layer.place]
        pending.outputs[layer.place] = None
        self._pending = pending if any(part is not None for part in pending.outputs) else None
        return output

    def _multiply(self, inputs: Tensor) -> Sequence[Tensor] | None:
        """All outputs; None if there are too many rows of input, or a layer that cannot take part in the product."""
        compiling = torch.compiler.is_compiling()
        if not compiling and operands.rows_of(inputs) > cpu.MAX_KERNEL_BATCH:
            return None  # a compiled graph is one for any number of rows, and the op looks at them itself
        tensors = [store.get(name) for store, name in self._slots]
        if ops.direct(inputs):
            if (places := cpu.places(tensors)) != self._places:
                parts = self._parts(tensors)
                self._products = None if parts is None else cpu.prepare(parts, self._columns, self._in_features)
                self._places = places
            return None if self._products is None else self._products(inputs)
        if len(self._layers) == 1:
            return None
        if not compiling and torch._C._is_tracing():  # TorchScript knows no list of optional tensors
            return None
        parts = self._parts(tensors)
        if parts is None or not all(_take_part(part, inputs) for part in parts):
            return None
        return ops.packed_linears(
            inputs,
            [part.values for part in parts],
            [part.scale for part in parts],
            [part.mask for part in parts],
            [part.offsets for part in parts],
            [part.bias for part in parts],
            [part.dictionary for part in parts],
            [part.dictionary_scale for part in parts],
            self._columns,
        )

    def _parts(self, tensors: Sequence[Tensor | None]) -> list[cpu.Part] | None:
        """The layers' tensors, layer by layer; None if one is not where it should be (a parametrized one is not)."""
        if not all(name in store for store, name in self._slots if name == "bias"):
            return None
        parts = []
        for layer, factored in enumerate(self._factored):
            first = layer * len(cpu.Part._fields)
            values, scale, mask, offsets, bias, *dictionary = tensors[first : first + len(cpu.Part._fields)]
            if mask is None or offsets is None or not _is_there(values) or (factored and not _is_there(dictionary[0])):
                return None
            parts.append(cpu.Part(values, scale, mask, offsets, bias, *dictionary))
        return parts

    def dissolve(self) -> None:
        """Let the layers go their own ways."""
        for layer in self.layers:
            layer.shared_input = None

    def __deepcopy__(self, _: object) -> None:
        """A copied layer shares nothing until its model is optimized again."""
        return

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """Nor does a pickled one."""
        return type(None), ()


def share_inputs(model: nn.Module) -> None:
    """Prepare the products of packed layers, one for those that read the same input, by their spec.

    Groups that there are already stay. Layers with a forward of somebody else's (accelerate's, which moves tensors
    about) are left alone.
    """
    groups: dict[tuple[object, ...], list[PackedLinear]] = {}
    for module in model.modules():
        if not isinstance(module, PackedLinear) or module.offsets is None or "forward" in vars(module):
            continue
        if module.shared_input is not None and len(module.shared_input.layers) > 1:
            continue
        features = (module.in_features, module.weight.dtype, module.dtype, module.weight.device)
        groups.setdefault((module.spec.input_group, *features), []).append(module)
    for layers in groups.values():
        if len(layers) > 1 or layers[0].weight.is_cpu:
            SharedInput(layers)


def _is_there(tensor: Tensor | None) -> TypeGuard[Tensor]:
    """Not so where it is held elsewhere while its layer does not run: DeepSpeed leaves an empty one."""
    return tensor is not None and tensor.numel() > 0


def _take_part(part: cpu.Part, inputs: Tensor) -> bool:
    """Whether the op for several matrices may have these: plain, where the input is, and with no gradient wanted."""
    for tensor in part:
        if tensor is None:
            continue
        if not operands.is_plain(tensor) or tensor.device != inputs.device:
            return False
        if tensor.requires_grad and torch.is_grad_enabled():
            return False
    return {dtype for _, dtype in part.types()} == {inputs.dtype}


def _version(inputs: Tensor) -> int:
    """Grows when a tensor is changed in place; 0 where torch does not count."""
    if torch.compiler.is_compiling() or inputs.is_inference():
        return 0
    return inputs._version

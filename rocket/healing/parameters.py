"""Which tensors of a compressed model healing changes, and how they come to be stored as before."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.utils import parametrize

from rocket.config.errors import RocketError
from rocket.config.schema import HealingConfig
from rocket.kernels import bitmap, int8
from rocket.nn import CompressedLinear
from rocket.nn.layers import VALUES

TRAINED = {"values": ("weight", "dictionary"), "dictionary": ("dictionary",), "lora": ("weight",)}
"""The matrices that are trained, or changed by what is, for each ``healing.train``."""


class MaskedLowRank(nn.Module):
    """The stored values of a matrix plus those of a low-rank change up · down at the same places.

    Only the places that are kept enter the product, so what is trained is what can be stored, and nothing is lost when
    the change is added for good (as MaskLoRA of Zimmer et al. 2023, arXiv 2312.15230).
    """

    down: nn.Parameter
    up: nn.Parameter
    mask: Tensor | None

    def __init__(self, layer: CompressedLinear, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        weight = layer.get_parameter("weight")
        packed = layer.is_sparse
        columns = layer.spec.columns
        rank = min(rank, columns, layer.out_features)
        down = torch.randn(rank, columns, generator=generator, device="cpu") / math.sqrt(columns)
        self.down = nn.Parameter(down.to(weight.device))
        self.up = nn.Parameter(torch.zeros(layer.out_features, rank, device=weight.device))
        self.register_buffer("mask", layer.get_buffer("mask") if packed else None, persistent=False)

    def forward(self, values: Tensor) -> Tensor:
        with torch.autocast(values.device.type, enabled=False):
            change = self.up @ self.down
            if self.mask is not None:
                change = bitmap.pick(change, self.mask)
            return (values.float() + change.view_as(values)).to(values.dtype)


def choose_parameters(model: nn.Module, config: HealingConfig) -> list[str]:
    """Freeze all of a model but what ``config.train`` names, which becomes float32; the names of that.

    bfloat16 has 8 bits: a value does not move by steps of less than 1/512 of it, and healing's are smaller. int8 values
    are trained as what they stand for. Raises RocketError if the model has nothing of the kind.
    """
    model.requires_grad_(False)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, CompressedLinear)}
    generator = torch.Generator().manual_seed(config.seed)
    chosen: list[nn.Parameter] = []
    for layer in layers.values():
        if layer.spec.precision == "int8":
            _widen(layer, TRAINED[config.train])
        if config.train == "lora":
            parametrize.register_parametrization(layer, "weight", MaskedLowRank(layer, config.lora_rank, generator))
            (change,) = layer.parametrizations["weight"]  # type: ignore[index]
            chosen += change.parameters()
        else:
            chosen += [parameter for name, parameter in layer.named_parameters() if name in TRAINED[config.train]]
    if not chosen:
        raise RocketError(f"healing.train={config.train}: no layer of this model has one; use values")
    for parameter in chosen:
        parameter.data = parameter.data.float()
        parameter.requires_grad_()
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def settle_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Make a healed model one like those that are opened: low-rank changes added, values in their type again."""
    for module in model.modules():
        if isinstance(module, CompressedLinear):
            if parametrize.is_parametrized(module, "weight"):
                parametrize.remove_parametrizations(module, "weight")
            if module.spec.precision == "int8":
                _narrow(module, dtype)
            for parameter in module.parameters():
                if parameter.is_floating_point():
                    parameter.data = parameter.data.to(dtype)
    for module in model.modules():
        if isinstance(module, CompressedLinear):
            module.take_gradients()
        else:
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_()


def _widen(layer: CompressedLinear, names: Iterable[str]) -> None:
    """Make int8 values those that they stand for, in float32."""
    for name in names:
        if hasattr(layer, name):
            _put(layer, name, layer.matrix(name).float(), None)


def _narrow(layer: CompressedLinear, dtype: torch.dtype) -> None:
    """Round what `_widen` has made to the nearest int8 values, with scales of type ``dtype``."""
    for name in VALUES:
        values = getattr(layer, name, None)
        if values is not None and values.is_floating_point():
            _put(layer, name, *int8.quantize(layer.matrix(name).detach(), dtype))


def _put(layer: CompressedLinear, name: str, matrix: Tensor, scale: Tensor | None) -> None:
    """Store a dense matrix and its scale as the layer stores what it has, without a gradient."""
    if name == "weight" and layer.is_sparse:
        matrix = bitmap.pick(matrix, layer.get_buffer("mask"))
    layer.register_parameter(name, nn.Parameter(matrix.view_as(getattr(layer, name)), requires_grad=False))
    layer.register_parameter(f"{name}_scale", None if scale is None else nn.Parameter(scale, requires_grad=False))


def check_unchanged(before: Path, after: Path) -> None:
    """Raise RocketError unless two checkpoints store as many values of each tensor, at the same places."""
    old, new = _shapes(before), _shapes(after)
    if old != new:
        name = next(iter(sorted(old.items() ^ new.items())))[0]
        raise RocketError(f"{after}: healing changed how {name} is stored; this is a defect, please report it")
    masks = dict(_masks(before))
    for name, mask in _masks(after):
        if not torch.equal(mask, masks[name]):
            raise RocketError(f"{after}: healing changed {name}; this is a defect, please report it")


def _shapes(directory: Path) -> Mapping[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="pt") as handle:
            shapes |= {key: tuple(handle.get_slice(key).get_shape()) for key in handle.keys()}  # noqa: SIM118
    return shapes


def _masks(directory: Path) -> Iterator[tuple[str, Tensor]]:
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="pt") as handle:
            for key in handle.keys():  # noqa: SIM118 (no mapping)
                if key.endswith(".mask"):
                    yield key, handle.get_tensor(key)

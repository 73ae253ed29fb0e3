"""Whether kernels can stand in for torch in a layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rocket.kernels import operands, ops


def kernels_apply(layer: nn.Module, inputs: Tensor) -> bool:
    """Whether kernels can stand in for torch in a layer.

    Not for gradients, under autocast or in a transform, nor where its tensors are not its own plain ones (`why_odd`).
    """
    if why_odd(layer) is not None:
        return False
    if torch.is_grad_enabled():
        parameters = [parameter for parameter in layer._parameters.values() if parameter is not None]
        if any(tensor.requires_grad for tensor in (inputs, *parameters)):
            return False
    if torch._C._is_any_autocast_enabled() and has_autocast(inputs.device.type):  # the first is much faster
        return False
    return torch.compiler.is_compiling() or not ops.is_transformed()


def why_odd(layer: nn.Module) -> str | None:
    """Why kernels cannot multiply by what a layer has, wherever it is; None if they can.

    What is no parameter of the layer (parametrized, pruned, in a replica of DataParallel) may have a gradient that is
    not seen here.
    """
    if "weight" not in layer._parameters or "parametrizations" in layer._modules:
        return "its weight is made of other tensors"
    for name, parameter in layer._parameters.items():
        if parameter is not None and not operands.is_plain(parameter):
            return f"its {name} is {operands.why_not_plain(parameter)}"
    return None


def has_autocast(device: str) -> bool:
    """Whether autocast is on for a type of device; on ``meta`` there is none."""
    return device != "meta" and torch.is_autocast_enabled(device)

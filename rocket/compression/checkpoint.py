"""Write a compressed model, prove that what was written opens again, and merge it into plain weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from rocket.config.errors import RocketError
from rocket.models import is_streamed, make_linear, refuse_offloaded, releasing, restack_experts
from rocket.nn import CompressedLinear, detach_quantizer, optimize, replace_module
from rocket.nn.layers import VALUES

SHARD, STREAMED_SHARD = "5GB", "1GB"


def save_checkpoint(model: PreTrainedModel, processor: Any, directory: Path) -> None:
    """Save as a Hugging Face directory, with the processor (None: without), reopen it and compare every tensor.

    Raises RocketError if what comes back differs: a checkpoint that would not survive its reader is no checkpoint.
    """
    with releasing(model):
        model.save_pretrained(directory, max_shard_size=STREAMED_SHARD if is_streamed(model) else SHARD)
    if processor is not None:
        processor.save_pretrained(directory)
    reopened = type(model).from_pretrained(directory, dtype=model.dtype)
    with releasing(model, reopened):
        _compare(model.state_dict(), reopened.state_dict(), directory)


def _compare(saved: Mapping[str, Tensor], reopened: Mapping[str, Tensor], directory: Path) -> None:
    if saved.keys() != reopened.keys():
        differing = sorted(saved.keys() ^ reopened.keys())
        raise RocketError(f"{directory}: reopened, the model has other tensors than before ({differing[0]}, ...)")
    for name, tensor in saved.items():
        if not torch.equal(tensor.cpu(), reopened[name].cpu()):
            raise RocketError(f"{directory}: {name} came back different from what was saved")


def merge(model: PreTrainedModel, *, inplace: bool = False) -> PreTrainedModel:
    """The same model with every compressed layer multiplied out into a plain linear layer, as the original's.

    Experts that the original stacks in one parameter are stacked again.

    For engines that know nothing of rocket. It takes the original's memory and disk again. Raises RocketError if a part
    of the model is not in memory.
    """
    refuse_offloaded(model)
    if not inplace:
        model = copy.deepcopy(model)
    optimize(model, backend="trivial")
    for name, module in list(model.named_modules()):
        if isinstance(module, CompressedLinear):
            replace_module(model, name, _merged(module))
    restack_experts(model)
    detach_quantizer(model)
    return model


def _merged(module: CompressedLinear) -> nn.Module:
    weight = copy.deepcopy(module).float().dense_weight().detach().to(module.dtype)
    linear = make_linear(module.replaces, weight, module.bias)
    linear.weight.requires_grad_(module.weight.requires_grad or module.spec.precision == "int8")
    return linear.train(module.training)


def stored_values(directory: Path, layers: Mapping[str, object]) -> int:
    """Stored values of the compressed ``layers``, recounted from the tensors on disk; biases, masks and scales do not
    count."""
    total = 0
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="pt") as handle:
            for key in handle.keys():  # noqa: SIM118 (no mapping)
                layer, _, tensor = key.rpartition(".")
                if layer in layers and tensor in VALUES:
                    total += int(torch.Size(handle.get_slice(key).get_shape()).numel())
    return total

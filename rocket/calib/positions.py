"""Which positions of a batch carry something: padding does not, and must not count in what calibration measures."""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from rocket.models.inputs import AUDIO_INPUTS, IGNORED, Batch, is_encoder_decoder


class Positions:
    """The positions of a batch that count, for the tensors of each side of a model.

    An encoder, or a model of one stack, follows ``attention_mask``; a decoder beside an encoder follows
    ``decoder_attention_mask``, or else the ``labels`` that are not ignored. The vision or audio tower of a model of
    text and media has no padding that either would tell. Masks that are absent or all ones count everything.
    """

    def __init__(self, model: nn.Module, batch: Batch) -> None:
        self._from_audio = any(name in batch for name in AUDIO_INPUTS)
        self._encoder = _mask(batch.get("attention_mask"))
        self._decoder = None
        if is_encoder_decoder(model):
            written = batch.get("labels")
            self._decoder = _mask(batch.get("decoder_attention_mask", None if written is None else written != IGNORED))

    def select(self, tensor: Tensor, decoder: bool) -> Tensor:
        """Rows [n, features] of a tensor [..., features] on one side, without those at positions that do not count.

        Where its shape does not tell which position a row belongs to, all count.
        """
        mask = self.mask(tensor.shape[:-1], decoder)
        return tensor.reshape(-1, tensor.shape[-1]) if mask is None else tensor[mask.to(tensor.device)]

    def mask(self, shape: torch.Size, decoder: bool) -> Tensor | None:
        """True where positions of a tensor of this shape count; None if all do."""
        mask = self._decoder if decoder else self._encoder
        if mask is None or mask.shape == shape:
            return mask
        if tuple(shape) == (mask.numel(),):
            return mask.flatten()
        if self._from_audio and not decoder and len(shape) == 2 and shape[0] == len(mask) and shape[1] < mask.shape[1]:
            # Convolutions made frames of audio: each takes the mask of where it starts.
            return mask[:, torch.arange(shape[1]) * mask.shape[1] // shape[1]]
        return None


def _mask(mask: Tensor | None) -> Tensor | None:
    return None if mask is None or bool(mask.all()) else mask.bool().cpu()


def decoder_name(model: nn.Module) -> str | None:
    """The name of the decoder in a model that has an encoder beside it."""
    if not is_encoder_decoder(model) or not hasattr(model, "get_decoder"):
        return None
    network: Any = model
    decoder = network.get_decoder()
    return next((name for name, module in model.named_modules() if module is decoder), None)


def layers_of_media(model: nn.Module, layers: Iterable[str]) -> frozenset[str]:
    """Those of the layers that lie in the vision or audio tower of a model that reads text beside it.

    A tower's modules carry their part of the model's config, of another class than the part for text.
    """
    config = getattr(model, "config", None)
    if config is None or is_encoder_decoder(model):
        return frozenset()
    parts = {type(getattr(config, name, None)) for name in getattr(config, "sub_configs", {})}
    others = parts - {type(config.get_text_config())}
    configs = {name: type(module.config) for name, module in model.named_modules() if hasattr(module, "config")}
    return frozenset(name for name in layers if configs.get(_nearest(name, configs)) in others)


def _nearest(name: str, owners: Container[str]) -> str:
    """The longest beginning of a layer's name, of whole components, that is among the owners."""
    while name and name not in owners:
        name = name.rpartition(".")[0]
    return name

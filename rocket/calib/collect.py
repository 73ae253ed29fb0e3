"""Run calibration data through a model once and keep what each layer saw."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from rocket.calib.experts import fill_experts
from rocket.calib.gram import GramAccumulator
from rocket.calib.positions import Positions, decoder_name, layers_of_media
from rocket.config.errors import RocketError
from rocket.config.schema import ProfilingConfig
from rocket.factorization.problem import LayerProblem
from rocket.models import Batch, LinearLayer, block_of, find_blocks, remedy_of_nan, run_forward

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Calibration:
    """What calibration knows of the target layers that it reached.

    ``inputs`` maps each layer to the first layer that reads the same tensor (itself, if it is the first); ``grams``
    and ``tokens`` are kept once for each of those. ``sensitivities`` maps layers to φ [out]; empty if not measured.
    """

    inputs: Mapping[str, str]
    grams: Mapping[str, Tensor]
    tokens: Mapping[str, int]
    sensitivities: Mapping[str, Tensor] = field(default_factory=dict)

    def gram(self, layer: str) -> Tensor:
        """G [in, in] of a layer's input."""
        return self.grams[self.inputs[layer]]

    def seen(self) -> dict[str, int]:
        """How many tokens each layer saw."""
        return {name: self.tokens[leader] for name, leader in self.inputs.items()}

    def known(self, layers: Mapping[str, LinearLayer]) -> dict[str, LinearLayer]:
        """Those of the layers that calibration reached."""
        return {name: layer for name, layer in layers.items() if name in self.inputs}

    def with_sensitivities(self, sensitivities: Mapping[str, Tensor]) -> Calibration:
        """The same for those of the layers whose sensitivities are known."""
        inputs = {name: leader for name, leader in self.inputs.items() if name in sensitivities}
        return replace(self, inputs=inputs, sensitivities=sensitivities)

    def problem(self, layer: str, weight: Tensor, settings: ProfilingConfig) -> LayerProblem:
        """The layer's weight [out, in] with what calibration knows of it, on the weight's device.

        Of the settings, ``cost`` and ``correlation_shrinkage`` count. Raises RocketError naming the layer where they do
        not fit together or are not finite.
        """
        sensitivity = self.sensitivities.get(layer)
        try:
            return LayerProblem(
                weight.detach().float(),
                self.gram(layer).to(weight.device),
                None if sensitivity is None else sensitivity.to(weight.device),
                settings.cost,
                settings.correlation_shrinkage,
            )
        except ValueError as error:
            raise RocketError(f"{layer}: {error}") from None


def collect_grams(model: nn.Module, layers: Mapping[str, LinearLayer], batches: Iterable[Batch]) -> Calibration:
    """Gram matrices of all target layers from one pass over ``batches`` (keyword arguments of the model's forward).

    Padded positions (`Positions`) are left out. Layers that read the same tensor share one Gram;
    this is seen at run time, by identity. What few tokens do not tell of an expert, its siblings do (`fill_experts`).
    Layers that no batch reaches (weights that their model uses without calling the layer, experts none of which saw a
    token) are left out with a warning: nothing is known of them, so they stay as they are.

    Memory: in² float64 and in² float32 for each distinct input, on the device of the layer; in² float32 of it stay.
    Raises RocketError naming layer and batch when activations are not finite, and when no layer is reached at all.
    """
    collector = _Collector(model, layers)
    with collector, torch.inference_mode():
        for number, batch in enumerate(batches):
            collector.start_batch(number, batch)
            run_forward(model, batch)
    accumulators = collector.accumulators
    inputs = collector.reached()
    tokens = {name: accumulator.tokens for name, accumulator in accumulators.items()}
    grams = {name: accumulators.pop(name).gram() for name in tokens}
    fill_experts(layers, list(find_blocks(model)), inputs, grams, tokens)
    missing = [name for name in layers if name not in inputs]
    if missing:
        logger.warning(
            "%s and %d other layers saw no calibration token and stay as they are; more calibration data may help",
            missing[0],
            len(missing) - 1,
        )
    return Calibration({name: inputs[name] for name in layers if name in inputs}, grams, tokens)


class _Collector:
    """Hooks on layers (to see inputs) and on blocks (to forget which tensors were seen)."""

    def __init__(self, model: Any, layers: Mapping[str, LinearLayer]) -> None:
        blocks = find_blocks(model)
        self.model = model
        self.layers = layers
        self.blocks = {name: blocks[name] for name in {block_of(layer, list(blocks)) for layer in layers}}
        self.leaders: dict[str, str] = {}
        self.accumulators: dict[str, GramAccumulator] = {}
        self._seen: dict[int, tuple[Tensor, str]] = {}
        self._decoder = decoder_name(model)
        self._of_media = layers_of_media(model, layers)
        self._positions: Positions | None = None
        self._encoded: Tensor | None = None
        self._batch = 0
        self._handles: list[Any] = []

    def __enter__(self) -> _Collector:
        if self._decoder is not None and hasattr(self.model, "get_encoder"):
            encoder = self.model.get_encoder()
            self._handles.append(encoder.register_forward_hook(lambda _, __, output: self._note_encoded(output[0])))
        for block in self.blocks.values():
            self._handles.append(block.register_forward_pre_hook(lambda *_: self._seen.clear()))
        for name, layer in self.layers.items():
            self._handles.append(layer.register_forward_pre_hook(lambda _, args, name=name: self._see(name, args[0])))
        return self

    def __exit__(self, *_: object) -> None:
        self._seen.clear()
        self._encoded = None
        for handle in self._handles:
            handle.remove()

    def start_batch(self, number: int, batch: Batch) -> None:
        self._batch = number
        self._positions = Positions(self.model, batch)

    def _note_encoded(self, encoded: Tensor) -> None:
        self._encoded = encoded

    def reached(self) -> dict[str, str]:
        """The leader of each layer that saw a token."""
        if not self.leaders:
            raise RocketError(f"{next(iter(self.layers))}: no calibration token reached this layer, nor any other")
        return dict(self.leaders)

    def _see(self, name: str, inputs: Tensor) -> None:
        if not inputs.numel():
            return
        leader = self._seen.setdefault(id(inputs), (inputs, name))[1]
        if self.leaders.setdefault(name, leader) != leader:
            raise RocketError(
                f"{name} shared its input with {self.leaders[name]} in an earlier batch and with {leader} in batch "
                f"{self._batch}; add it to model.ignore"
            )
        if leader != name:
            return
        tokens = self._select(name, inputs)
        if name not in self.accumulators:
            self.accumulators[name] = GramAccumulator(tokens.shape[1], tokens.device)
        try:
            self.accumulators[name].add(tokens)
        except ValueError:
            bad = int((~torch.isfinite(tokens)).any(dim=0).sum())
            raise RocketError(
                f"{name}: calibration batch {self._batch} produced non-finite activations in {bad} of "
                f"{tokens.shape[1]} input features; {remedy_of_nan(self.model)}"
            ) from None

    def _select(self, name: str, inputs: Tensor) -> Tensor:
        """Tokens [n, in] of an input [..., in] at positions that count.

        A decoder's layers follow its own positions, but those that read the encoder's output the encoder's.
        """
        if self._positions is None or name in self._of_media:
            return inputs.reshape(-1, inputs.shape[-1])
        in_decoder = self._decoder is not None and name.startswith(f"{self._decoder}.")
        return self._positions.select(inputs, in_decoder and inputs is not self._encoded)

"""Run calibration data through a model once and keep what each layer saw."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rocket.calib.experts import unpadded, warn_of
from rocket.calib.positions import Positions, decoder_name, layers_of_media
from rocket.calib.sums import GramSums
from rocket.calib.waypoints import Waypoint, Waypoints, can_go_on, returned, stand_in
from rocket.config.errors import RocketError
from rocket.config.schema import ProfilingConfig
from rocket.factorization.problem import LayerProblem
from rocket.models import (
    Batch,
    Call,
    LinearLayer,
    remedy_of_nan,
    run_forward,
    sweep,
)
from rocket.ranks import ranks
from rocket.usage import track

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


def collect_grams(
    model: nn.Module,
    layers: Mapping[str, LinearLayer],
    batches: Iterable[Batch],
    grams: MutableMapping[str, Tensor] | None = None,
    waypoints: Waypoints | None = None,
) -> Calibration:
    """Gram matrices of all target layers from one pass over ``batches`` (keyword arguments of the model's forward).

    Padded positions (`Positions`) are left out; texts of several lengths go through models with experts one by one for
    that (`unpadded`). Layers that read the same tensor share one Gram; this is seen at run time, by identity. What few
    tokens do not tell of an expert, its siblings do (`fill_experts`).
    Layers that no batch reaches (weights that their model uses without calling the layer, experts none of which saw a
    token) are left out with a warning: nothing is known of them, so they stay as they are.

    Each of several processes (`ranks`) takes its share of the batches, and one of them keeps the matrices of a block.
    All batches go through the model in step, block by block, and each block's matrices are put into ``grams`` (None: a
    dict) when it is left. A pass that was killed goes on from the last of its ``waypoints``, to the same bits. Memory:
    in² float64 for each distinct input of one block, on the device of its layers, the hidden states of all batches, and
    what ``grams`` keeps, in² float32 for each.
    Raises RocketError naming layer and batch when activations are not finite, and when no layer is reached at all.
    """
    batches = unpadded(model, layers, batches)[ranks.rank :: ranks.count]
    collector = _Collector(model, layers, batches, {} if grams is None else grams, waypoints)
    tasks = [partial(collector.run, number, batch) for number, batch in enumerate(batches)]
    with collector, torch.inference_mode():
        collector.go_on(tasks)
        sweep(model, tasks, collector.visit, collector.skip)
    calibration = collector.finish()
    missing = [name for name in layers if name not in calibration.inputs]
    if missing:
        logger.warning(
            "%s and %d other layers saw no calibration token and stay as they are; more calibration data may help",
            missing[0],
            len(missing) - 1,
        )
    return calibration


class _Collector:
    """Hooks on layers, to see their inputs while `sweep` visits their blocks."""

    def __init__(
        self,
        model: Any,
        layers: Mapping[str, LinearLayer],
        batches: Sequence[Batch],
        grams: MutableMapping[str, Tensor],
        waypoints: Waypoints | None,
    ) -> None:
        self.model = model
        self.layers = layers
        self._sums = GramSums(model, layers, grams)
        self._seen: dict[int, tuple[Tensor, str]] = {}
        self._decoder = decoder_name(model)
        self._of_media = layers_of_media(model, layers)
        self._positions = [Positions(model, batch) for batch in batches]
        self._encoded: dict[int, Tensor] = {}
        self._waypoints = waypoints
        self._from: Waypoint | None = None
        self._passed: dict[str, int | None] = {}
        self._batch = 0
        self._progress = track(range(len(batches) * len(self._sums.blocks)), "calibrate")
        self._handles: list[Any] = []

    def __enter__(self) -> _Collector:
        if self._decoder is not None and hasattr(self.model, "get_encoder"):
            encoder = self.model.get_encoder()
            self._handles.append(encoder.register_forward_hook(lambda _, __, output: self._note_encoded(output[0])))
        for name, layer in self.layers.items():
            self._handles.append(layer.register_forward_pre_hook(lambda _, args, name=name: self._see(name, args[0])))
        return self

    def __exit__(self, *_: object) -> None:
        self._seen.clear()
        self._encoded.clear()
        self._progress.close()
        for handle in self._handles:
            handle.remove()

    def _note_encoded(self, encoded: Tensor) -> None:
        self._encoded[id(encoded)] = encoded

    def run(self, number: int, batch: Batch) -> None:
        self._batch = number
        self._seen.clear()
        run_forward(self.model, batch, scores=False)

    def go_on(self, tasks: Sequence[Callable[[], None]]) -> None:
        """Take over what an earlier pass had come to, if there was one and all processes can go on from there."""
        if self._waypoints is None:
            return
        waypoint = self._waypoints.last()
        if waypoint and all(ranks.all_gather(self._can_go_on(waypoint, tasks))):
            self._from = waypoint
            self._passed.update(waypoint.passed)
            self._sums.take_over(waypoint.inputs, waypoint.tokens, waypoint.short)
            logger.info("going on from block %d of %d", len(waypoint.passed) + 1, len(self._sums.blocks))
        else:
            self._waypoints.clear()

    def _can_go_on(self, waypoint: Waypoint, tasks: Sequence[Callable[[], None]]) -> bool:
        if waypoint.batches != len(tasks) or not all(name in self._sums.grams for name in waypoint.tokens):
            return False
        try:
            # Layers that run although no block does are in none that is called as such: what they saw is not kept.
            return can_go_on(self.model, tasks[0], waypoint.passed) and not self._sums.are_open
        finally:
            self._sums.forget()

    def skip(self, call: Call) -> Any:
        """What blocks return in a pass that goes on behind them."""
        if self._from is None or call.block not in self._from.passed:
            return None
        next(self._progress, None)
        return stand_in(call, self._from.passed[call.block], seed=0)

    def visit(self, block: str, calls: list[Call]) -> Iterator[Any]:
        """Run a block on all batches, then work out its matrices."""
        start, self._from = self._from, None
        if start is None:
            self._save(calls)
        while calls:
            call = calls.pop(0)
            if start is not None and self._waypoints is not None:
                call = call.entered_by(self._waypoints.state(start, call))
            self._batch = call.task
            output = call.run()
            self._note_returned(call, output)
            yield output
            del call, output
            self._seen.clear()
            next(self._progress, None)
        self._sums.close(block)

    def _note_returned(self, call: Call, output: Any) -> None:
        what = returned(call, output)
        if self._passed.setdefault(call.block, what) != what:
            self._passed[call.block] = None

    def _save(self, calls: Sequence[Call]) -> None:
        """Write a waypoint before a block, if it is time for one and all batches have come to that block."""
        if self._waypoints is None:
            return
        passed = {block: what for block, what in self._passed.items() if what is not None}
        is_possible = (
            0 < len(passed) == len(self._passed)
            and len(calls) == len(self._positions)
            and not self._sums.are_open
            and all(map(_has_whole_state, calls))
        )
        if all(ranks.all_gather(is_possible and self._waypoints.due)):
            self._waypoints.save(Waypoint(passed, len(calls), *self._sums.known()), map(_state_of, calls))

    def finish(self) -> Calibration:
        """What is known of the layers that saw a token; those too whose blocks were never called as such."""
        self._sums.close_rest()
        inputs, tokens, short = self._sums.known()
        warn_of(short)
        if not inputs:
            raise RocketError(f"{next(iter(self.layers))}: no calibration token reached this layer, nor any other")
        return Calibration({name: inputs[name] for name in self.layers if name in inputs}, self._sums.grams, tokens)

    def _see(self, name: str, inputs: Tensor) -> None:
        if not inputs.numel():
            return
        leader = self._seen.setdefault(id(inputs), (inputs, name))[1]
        known = self._sums.reads(name, leader)
        if known != leader:
            raise RocketError(
                f"{name} shared its input with {known} in an earlier call and with {leader} in one of batch "
                f"{self._batch}; add {name.rpartition('.')[2]} to model.ignore"
            )
        if leader != name:
            return
        tokens = self._select(name, inputs)
        try:
            self._sums.add(name, tokens)
        except ValueError:
            bad = int((~torch.isfinite(tokens)).any(dim=0).sum())
            batch = ranks.rank + ranks.count * self._batch
            raise RocketError(
                f"{name}: calibration batch {batch} produced non-finite activations in {bad} of "
                f"{tokens.shape[1]} input features; {remedy_of_nan(self.model)}"
            ) from None

    def _select(self, name: str, inputs: Tensor) -> Tensor:
        """Tokens [n, in] of an input [..., in] at positions that count.

        A decoder's layers follow its own positions, but those that read the encoder's output the encoder's.
        """
        if name in self._of_media:
            return inputs.reshape(-1, inputs.shape[-1])
        in_decoder = self._decoder is not None and name.startswith(f"{self._decoder}.")
        return self._positions[self._batch].select(inputs, in_decoder and id(inputs) not in self._encoded)


def _has_whole_state(call: Call) -> bool:
    """Whether a copy of the hidden state lies in memory as it does."""
    return call.state is not None and call.state.is_contiguous() and call.state.storage_offset() == 0


def _state_of(call: Call) -> Tensor:
    """A copy of the hidden state that enters a block."""
    assert call.state is not None
    return call.state.clone() if call.hidden is None else call.hidden.read()

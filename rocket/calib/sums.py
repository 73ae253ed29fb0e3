"""The sums that become Gram matrices, block by block, over all processes."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping

from torch import Tensor, nn

from rocket.calib.experts import fill_experts
from rocket.calib.gram import GramAccumulator
from rocket.config.errors import RocketError
from rocket.models import LinearLayer, block_of, features_of, find_blocks
from rocket.ranks import ranks


class GramSums:
    """What was seen of each layer's input, until its block is closed and the matrix is in ``grams``.

    Layers that read the same tensor share the matrix of the first of them.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, LinearLayer], grams: MutableMapping[str, Tensor]) -> None:
        self.grams = grams
        self.blocks = list(find_blocks(model))
        self._model, self._layers = model, layers
        self._of_block: dict[str, dict[str, LinearLayer]] = {name: {} for name in self.blocks}
        for name, layer in layers.items():
            self._of_block[block_of(name, self.blocks)][name] = layer
        self._open: dict[str, GramAccumulator] = {}
        self._inputs: dict[str, str] = {}
        self._tokens: dict[str, int] = {}
        self._short: dict[str, int] = {}
        self._device = next(model.parameters()).device

    @property
    def are_open(self) -> bool:
        """Whether anything was seen that is in no matrix yet."""
        return bool(self._open)

    def known(self) -> tuple[dict[str, str], dict[str, int], dict[str, int]]:
        """``inputs`` and ``tokens`` as in `Calibration`, and what `fill_experts` tells of experts."""
        return dict(self._inputs), dict(self._tokens), dict(self._short)

    def take_over(self, inputs: Mapping[str, str], tokens: Mapping[str, int], short: Mapping[str, int]) -> None:
        """Go on from what was `known` when the matrices were made that ``grams`` holds."""
        self._inputs.update(inputs)
        self._tokens.update(tokens)
        self._short.update(short)

    def forget(self) -> None:
        """Drop what was seen, but for the matrices."""
        self._open.clear()
        self._inputs.clear()

    def reads(self, layer: str, leader: str) -> str:
        """The layer whose input this one reads: ``leader``, unless another one was told before."""
        return self._inputs.setdefault(layer, leader)

    def add(self, layer: str, tokens: Tensor) -> None:
        """Add what a layer read, [n, in]. Raises ValueError, and adds nothing, if any of it is not finite."""
        self._device = tokens.device
        if layer not in self._open:
            self._open[layer] = GramAccumulator(tokens.shape[1], tokens.device)
        self._open[layer].add(tokens)

    def close(self, block: str) -> None:
        """Make the matrices of a block's layers. A block that is called again adds to them."""
        self._close(self._of_block[block])

    def close_rest(self) -> None:
        """Make those of layers whose blocks were never called as such."""
        self._close({name: layer for name, layer in self._layers.items() if self._inputs.get(name) in self._open})

    def _close(self, layers: Mapping[str, LinearLayer]) -> None:
        """Turn the sums of these layers, of all processes, into matrices, which one process keeps."""
        owner = self._add_up(layers)
        found: dict[str, str] = {}
        tokens: dict[str, int] = {}
        short: dict[str, int] = {}
        if owner == ranks.rank:
            leaders = [name for name in layers if name in self._open]
            found = {name: self._inputs[name] for name in layers if self._inputs.get(name) in self._open}
            tokens = {name: self._open[name].tokens for name in leaders}
            grams = {name: self._open.pop(name).gram() for name in leaders}
            short = fill_experts(layers, self.blocks, found, grams, tokens) if grams else {}
            for name in list(grams):
                gram, known = grams.pop(name), self._tokens.get(name, 0)
                if known:
                    gram = (known * self.grams[name] + tokens[name] * gram) / (known + tokens[name])
                self.grams[name] = gram
        found, tokens, short = ranks.broadcast((found, tokens, short), owner)
        self._inputs.update(found)
        self._short.update(short)
        for name, number in tokens.items():
            self._open.pop(name, None)
            self._tokens[name] = self._tokens.get(name, 0) + number

    def _add_up(self, layers: Mapping[str, LinearLayer]) -> int:
        """Bring the sums of these layers together at one process, whose rank is returned."""
        mine = {name: self._open[name].tokens for name in layers if name in self._open}
        first = next(iter(layers), "")
        everyones = ranks.all_gather(
            (first, mine, {name: self._inputs[name] for name in layers if name in self._inputs})
        )
        owner = self.blocks.index(block_of(first, self.blocks)) % ranks.count if first else 0
        if len(everyones) == 1:
            return owner
        if len({other for other, _, _ in everyones}) > 1:
            raise RocketError(
                f"the batches of different processes go different ways through {type(self._model).__name__}; "
                "run it in one process"
            )
        for name in dict.fromkeys(name for _, tokens, _ in everyones for name in tokens):
            if name not in self._open:
                self._open[name] = GramAccumulator(features_of(self._layers[name])[1], self._device)
            for total in self._open[name].sums:
                ranks.reduce(total, to=owner)
            self._open[name].tokens = sum(tokens.get(name, 0) for _, tokens, _ in everyones)
        for _, _, inputs in everyones:
            self._inputs.update(inputs)
        return owner

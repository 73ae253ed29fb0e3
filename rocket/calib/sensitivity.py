"""How much the loss reacts to each output of each layer: φ_j, a mean of squared gradients, from one backward pass."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from rocket.calib.experts import expert_lists, fill_up_sums, unpadded
from rocket.calib.objective import objective
from rocket.calib.waypoints import Waypoints
from rocket.config.errors import RocketError
from rocket.models import Batch, Call, LinearLayer, features_of, find_blocks, hold, is_streamed, remedy_of_nan, sweep
from rocket.ranks import ranks
from rocket.usage import track

logger = logging.getLogger(__name__)

EXPERT_TOKENS = 64

GROUP_SECONDS = 60.0
"""What a group of batches may take without a thought, while the weights that it reads are not kept."""
WORTH_READING = 0.75
"""What a larger group must bring a batch's time down to if it takes longer."""


def measure_sensitivities(
    model: nn.Module,
    layers: Mapping[str, LinearLayer],
    batches: Iterable[Batch],
    seed: int = 0,
    seen: Mapping[str, int] | None = None,
    waypoints: Waypoints | None = None,
) -> dict[str, Tensor]:
    """φ [out] of each layer: φ_j = Σ (∂ objective / ∂y_j)² / terms, the sum over all positions of its output.

    ``batches`` are keyword arguments of the model's forward; the objective and the number of its terms are those of
    `objective`, for a language model the loss and the tokens that it is summed over. Only gradients of activations are
    computed and blocks are recomputed, so memory is one block's activations plus one hidden state a block; of one
    batch, or of a group of them that pass in step where weights of a block are only in memory for a while (`_groups`).
    Where blocks leave something else for later ones (keys and values) nothing is recomputed: memory is the activations
    of all blocks, of one batch.

    Together with the Gram matrices, ½ Σ_j φ_j E[(δ_j x)²] predicts the increase of the loss per term when row j of a
    weight changes by δ_j: the second-order term of the loss with the empirical Fisher information (the labels are the
    data's) for the Hessian, its terms between outputs and between positions left out, inputs and gradients taken as
    independent and layers as additive. As the sum runs over a layer's own positions while the terms are the loss's, it
    is right for layers that see more positions than there are labels (the encoder of an encoder-decoder) or fewer
    (an expert).

    Each of several processes (`ranks`) takes its share of the batches; all return the same. A pass that was killed goes
    on from the last of its ``waypoints``, to the same bits.

    An expert that gradients reached at fewer than `EXPERT_TOKENS` tokens, where a mean of squares is known to about
    √(2/64) = 18 %, is filled up to so many by the mean of its siblings; how many tokens it gets follows from ``seen``,
    those that each layer saw in a longer pass (`Calibration.seen`; None: in this one).

    Layers that no gradient reaches are left out with a warning. Raises RocketError when it reaches none, or is not
    finite. ``seed`` is of the random signs and labels of models without labels.
    """
    batches = unpadded(model, layers, batches)
    blocks = find_blocks(model)
    sums = {name: torch.zeros(features_of(layer)[0], dtype=torch.float64) for name, layer in layers.items()}
    tokens = dict.fromkeys(layers, 0)
    terms = _go_on(waypoints, sums, tokens)
    mine = range(ranks.rank, len(batches), ranks.count)
    progress = track(range(2 * (len(mine) - len(terms)) * len(blocks)), "sensitivities")
    run: Callable[[Sequence[Callable[[], float]]], list[float]] = _Chain(model, progress).run
    with _gradients_of_outputs(model, layers, sums, tokens), torch.enable_grad():
        for group in _groups(mine[len(terms) :], is_streamed(model)):
            scores = [partial(_score, model, batches[n], seed + n) for n in group]
            try:
                terms += run(scores)
            except _TellsMoreError:
                run = partial(_in_one_graph, model)
                terms += run(scores)
            if waypoints is not None and waypoints.due and len(terms) < len(mine):
                waypoints.save_sums({**sums, **_counts(tokens, terms)})
    progress.close()
    everyones = ranks.all_gather((terms, tokens))
    total_terms = math.fsum(term for terms, _ in everyones for term in terms)
    tokens = {name: sum(tokens[name] for _, tokens in everyones) for name in tokens}
    for total in sums.values():
        ranks.reduce(total)
    for experts in expert_lists(layers, tokens, list(blocks)):
        sums.update(fill_up_sums(sums, tokens, experts, EXPERT_TOKENS, tokens if seen is None else seen))
    sensitivities = {name: (total / max(total_terms, 1e-30)).float() for name, total in sums.items()}
    reached = {name: values for name, values in sensitivities.items() if values.any()}
    _check(model, reached, sums)
    return reached


def _in_one_graph(model: nn.Module, scores: Sequence[Callable[[], float]]) -> list[float]:
    """The terms of batches whose gradient goes back through the whole model at once."""
    if is_streamed(model):
        raise RocketError(
            f"blocks of {type(model).__name__} tell each other more than their outputs, so sensitivities need all of "
            "it in memory; raise memory_budget, or use profiling.cost: activation"
        )
    return [score() for score in scores]


def _groups(batches: Sequence[int], streams: bool) -> Iterator[Sequence[int]]:
    """Batches to take at once: one, or with ``streams`` each time twice as many as long as that is quick, or worth it.

    A group of batches reads all weights twice; when it is done its sums can be saved, and a kill loses no more than it.
    """
    size, before = 1, math.inf
    while batches:
        group, batches = batches[:size], batches[size:]
        began = time.monotonic()
        yield group
        seconds = time.monotonic() - began
        if streams and (seconds < GROUP_SECONDS or seconds / size < WORTH_READING * before):
            size *= 2
        before = seconds / len(group)


def _go_on(waypoints: Waypoints | None, sums: Mapping[str, Tensor], tokens: dict[str, int]) -> list[float]:
    """Take over the sums and tokens that an earlier pass had come to; the terms of the batches that it had scored."""
    found = {} if waypoints is None else waypoints.sums()
    wanted = {**sums, **_counts(tokens, [])}
    if found.keys() != wanted.keys() or any(
        found[name].shape != total.shape or found[name].dtype != total.dtype
        for name, total in wanted.items()
        if name != "terms"
    ):
        return []
    for name, total in sums.items():
        total.copy_(found[name])
    tokens.update(zip(tokens, found["tokens"].tolist(), strict=True))
    return found["terms"].tolist()


def _counts(tokens: Mapping[str, int], terms: Sequence[float]) -> dict[str, Tensor]:
    return {"tokens": torch.tensor(list(tokens.values())), "terms": torch.tensor(terms, dtype=torch.float64)}


def _check(model: nn.Module, reached: Mapping[str, Tensor], layers: Iterable[str]) -> None:
    missing = [name for name in layers if name not in reached]
    if not reached:
        raise RocketError(
            f"{missing[0]}: no gradient reached this layer, nor any other; raise calib.sensitivity_samples, or use "
            "profiling.cost: activation"
        )
    if missing:
        logger.warning(
            "no gradient reached %s and %d other layers, so their worth is not known and they stay as they are",
            missing[0],
            len(missing) - 1,
        )
    for name, values in reached.items():
        if not torch.isfinite(values).all():
            raise RocketError(f"{name}: the backward pass gave non-finite gradients; {remedy_of_nan(model)}")


def _score(model: nn.Module, batch: Batch, seed: int) -> float:
    """The number of terms of a batch's objective, whose gradient goes back to the last blocks' outputs."""
    value, terms = objective(model, batch, torch.Generator().manual_seed(seed))
    if value.requires_grad:
        value.backward(retain_graph=True)
    return terms


class _Cut(torch.autograd.Function):
    """What a block returned, as the beginning of a new graph, which gives its gradient to ``gather``."""

    @staticmethod
    def forward(ctx: Any, start: Tensor, output: list[Tensor], gather: Callable[[Tensor], None]) -> Tensor:
        ctx.gather = gather
        return output[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, None]:
        ctx.gather(gradients[0])
        return None, None, None


class _TellsMoreError(Exception):
    """Blocks tell each other more than their outputs, so that the graph cannot be cut between them."""


class _Handle(torch.autograd.Function):
    """A number in a tensor's place, whose backward pass gives the tensor the gradient that waits in ``box``."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, box: list[Tensor]) -> Tensor:
        ctx.box = box
        return tensor.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, None]:
        return ctx.box.pop(), None


class _Step:
    """One call of a block, whose output is cut off from what was before it.

    Of a hidden state that waited on disk only the file is kept, and a handle: the model may keep the tensor itself.
    """

    def __init__(self, call: Call) -> None:
        self._call = call
        self._gradients: list[Tensor | None] = []
        self._waiting: list[Tensor] = []
        self._handle: Tensor | None = None

    def run(self) -> Any:
        notes = self._call.notes()
        with torch.no_grad():
            output = self._call.run()
        if self._call.notes() != notes:
            raise _TellsMoreError
        cut = tree_map_only(Tensor, self._cut, output)
        state = self._call.state
        if self._call.hidden is not None and state is not None:
            if state.requires_grad:
                self._handle = _Handle.apply(state, self._waiting)  # type: ignore[no-untyped-call]
            self._call = replace(self._call.entered_by(state.new_empty(0)), hidden=self._call.hidden)
        return cut

    def _again(self) -> Call:
        """The call as it was, with its hidden state in memory."""
        if self._call.hidden is None:
            return self._call
        return self._call.entered_by(self._call.hidden.read().requires_grad_(self._handle is not None))

    def _cut(self, output: Tensor) -> Tensor:
        gradients, number = self._gradients, len(self._gradients)  # and not the step: what it holds may hold the graph
        gradients.append(None)

        def gather(gradient: Tensor) -> None:
            before = gradients[number]
            gradients[number] = gradient if before is None else before + gradient

        if not output.is_floating_point():
            return output
        result: Tensor = _Cut.apply(torch.zeros((), requires_grad=True), [output], gather)  # type: ignore[no-untyped-call]
        return result

    def run_back(self) -> None:
        """Run the block again, with a graph, and pass its outputs' gradients on to what its inputs come from."""
        pairs: list[tuple[Tensor, Tensor]] = []

        def copy(tensor: Tensor) -> Tensor:
            detached = tensor.detach().requires_grad_(tensor.requires_grad)
            if tensor.requires_grad:
                pairs.append((tensor, detached))
            return detached

        if all(gradient is None for gradient in self._gradients):
            return
        call = self._again()
        args, kwargs = tree_map_only(Tensor, copy, (call.args, dict(call.kwargs)))
        # What enters a first block starts the graph, as no weight does.
        given = (*args[:1], kwargs.get("hidden_states"), *kwargs.values())
        next(value for value in given if isinstance(value, Tensor) and value.is_floating_point()).requires_grad_()
        outputs = [leaf for leaf in tree_leaves(call.forward(*args, **kwargs)) if isinstance(leaf, Tensor)]
        reached = [
            (output, gradient)
            for output, gradient in zip(outputs, self._gradients, strict=True)
            if gradient is not None and output.requires_grad
        ]
        torch.autograd.backward([output for output, _ in reached], [gradient for _, gradient in reached])
        for origin, tensor in pairs:
            if tensor.grad is not None:
                torch.autograd.backward(origin, tensor.grad, retain_graph=True)
        if self._handle is not None and call.state is not None and call.state.grad is not None:
            self._waiting.append(call.state.grad)
            torch.autograd.backward(self._handle, retain_graph=True)


class _Chain:
    """The blocks of a sweep in the order of their visits, to be gone through again from the last one on."""

    def __init__(self, model: nn.Module, progress: Iterator[int]) -> None:
        self._model, self._progress = model, progress
        self._visits: list[tuple[str, list[_Step]]] = []

    def run(self, scores: Sequence[Callable[[], float]]) -> list[float]:
        """What `_score` gives for each batch, with the gradients of all layers."""
        terms = sweep(self._model, scores, self._visit)
        self.run_back()
        return terms

    def run_back(self) -> None:
        while self._visits:
            block, steps = self._visits.pop()
            with hold(self._model, block):
                for step in steps:
                    step.run_back()
                    next(self._progress, None)

    def _visit(self, block: str, calls: list[Call]) -> Iterator[Any]:
        steps: list[_Step] = []
        self._visits.append((block, steps))
        while calls:
            steps.append(_Step(calls.pop(0)))
            next(self._progress, None)
            yield steps[-1].run()


@contextmanager
def _gradients_of_outputs(
    model: nn.Module, layers: Mapping[str, LinearLayer], sums: dict[str, Tensor], tokens: dict[str, int]
) -> Iterator[None]:
    """Hooks that add each output's squared gradient to ``sums`` and its positions to ``tokens``; weights are frozen."""
    required = {parameter: parameter.requires_grad for parameter in model.parameters()}
    handles: list[Any] = []

    def add(name: str, gradient: Tensor) -> None:
        gradient = gradient.reshape(-1, gradient.shape[-1])
        sums[name] += gradient.float().square().sum(dim=0).double().cpu()
        tokens[name] += len(gradient)

    def watch(name: str, output: Tensor) -> Tensor | None:
        if output.requires_grad:
            output.register_hook(partial(add, name))
            return None
        if not torch.is_grad_enabled():
            return None
        # What it reads has no gradient, as something else than the first block's hidden state: the graph starts here.
        start = output.detach().requires_grad_().clone()  # as some models change outputs in place
        start.register_hook(partial(add, name))
        return start

    try:
        model.requires_grad_(False)
        for name, layer in layers.items():
            handles.append(layer.register_forward_hook(lambda _, __, output, name=name: watch(name, output)))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter, value in required.items():
            parameter.requires_grad_(value)

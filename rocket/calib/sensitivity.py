"""How much the loss reacts to each output of each layer: φ_j, a mean of squared gradients, from one backward pass."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rocket.calib.experts import expert_lists, fill_up_sums
from rocket.calib.objective import objective
from rocket.config.errors import RocketError
from rocket.models import Batch, LinearLayer, features_of, find_blocks, remedy_of_nan, without_cache

logger = logging.getLogger(__name__)

EXPERT_TOKENS = 64


def measure_sensitivities(
    model: nn.Module,
    layers: Mapping[str, LinearLayer],
    batches: Iterable[Batch],
    seed: int = 0,
    seen: Mapping[str, int] | None = None,
) -> dict[str, Tensor]:
    """φ [out] of each layer: φ_j = Σ (∂ objective / ∂y_j)² / terms, the sum over all positions of its output.

    ``batches`` are keyword arguments of the model's forward; the objective and the number of its terms are those of
    `objective`, for a language model the loss and the tokens that it is summed over. Only gradients of activations are
    computed and blocks are recomputed, so memory is one block's activations plus one hidden state a block.

    Together with the Gram matrices, ½ Σ_j φ_j E[(δ_j x)²] predicts the increase of the loss per term when row j of a
    weight changes by δ_j: the second-order term of the loss with the empirical Fisher information (the labels are the
    data's) for the Hessian, its terms between outputs and between positions left out, inputs and gradients taken as
    independent and layers as additive. As the sum runs over a layer's own positions while the terms are the loss's, it
    is right for layers that see more positions than there are labels (the encoder of an encoder-decoder) or fewer
    (an expert).

    An expert that gradients reached at fewer than `EXPERT_TOKENS` tokens, where a mean of squares is known to about
    √(2/64) = 18 %, is filled up to so many by the mean of its siblings; how many tokens it gets follows from ``seen``,
    those that each layer saw in a longer pass (`Calibration.seen`; None: in this one).

    Layers that no gradient reaches are left out with a warning. Raises RocketError when it reaches none, or is not
    finite. ``seed`` is of the random signs and labels of models without labels.
    """
    sums = {name: torch.zeros(features_of(layer)[0], dtype=torch.float64) for name, layer in layers.items()}
    tokens = dict.fromkeys(layers, 0)
    terms = 0.0
    generator = torch.Generator().manual_seed(seed)
    with _gradients_of_outputs(model, layers, sums, tokens), without_cache(model), torch.enable_grad():
        for batch in batches:
            value, count = objective(model, batch, generator)
            if value.requires_grad:
                value.backward()
            terms += count
    for experts in expert_lists(layers, tokens, list(find_blocks(model))):
        sums.update(fill_up_sums(sums, tokens, experts, EXPERT_TOKENS, tokens if seen is None else seen))
    sensitivities = {name: (total / max(terms, 1e-30)).float() for name, total in sums.items()}
    reached = {name: values for name, values in sensitivities.items() if values.any()}
    _check(model, reached, sums)
    return reached


def _check(model: nn.Module, reached: Mapping[str, Tensor], layers: Iterable[str]) -> None:
    missing = [name for name in layers if name not in reached]
    if not reached:
        raise RocketError(
            f"{missing[0]}: no gradient reached this layer, nor any other; raise calib.sensitivity_samples, or use "
            "cost: activation"
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


@contextmanager
def _gradients_of_outputs(
    model: nn.Module, layers: Mapping[str, LinearLayer], sums: dict[str, Tensor], tokens: dict[str, int]
) -> Iterator[None]:
    """Hooks that add each output's squared gradient to ``sums`` and its positions to ``tokens``.

    Weights are frozen, and blocks recomputed in the backward pass.
    """
    required = {parameter: parameter.requires_grad for parameter in model.parameters()}
    blocks = find_blocks(model)
    handles: list[Any] = []
    forwards: list[Any] = []

    def add(name: str, gradient: Tensor) -> None:
        gradient = gradient.reshape(-1, gradient.shape[-1])
        sums[name] += gradient.float().square().sum(dim=0).double().cpu()
        tokens[name] += len(gradient)

    def watch(name: str, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(partial(add, name))

    try:
        model.requires_grad_(False)
        for block in blocks.values():
            handles.append(block.register_forward_pre_hook(_require_gradient, with_kwargs=True))
            forwards.append(vars(block).get("forward"))
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        for name, layer in layers.items():
            handles.append(layer.register_forward_hook(lambda _, __, output, name=name: watch(name, output)))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for block, forward in zip(blocks.values(), forwards, strict=False):
            del block.forward
            if forward is not None:  # accelerate and others put theirs on the instance
                block.forward = forward
        for parameter, value in required.items():
            parameter.requires_grad_(value)


def _require_gradient(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """The hidden state that enters the first block starts the graph, as no weight does."""
    given = (*args[:1], kwargs.get("hidden_states"), *kwargs.values())
    hidden = next((value for value in given if isinstance(value, Tensor) and value.is_floating_point()), None)
    if hidden is not None and not hidden.requires_grad:
        hidden.requires_grad_()

"""How much the loss reacts to each output of each layer: φ_j = E[g_j²], from one backward pass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from rocket.calib.experts import expert_lists, fill_up
from rocket.config.errors import RocketError
from rocket.models import LinearLayer, features_of, find_blocks

EXPERT_TOKENS = 64


def measure_sensitivities(
    model: nn.Module, layers: Mapping[str, LinearLayer], batches: Iterable[Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """φ [out] of each layer, with φ_j the mean over tokens of (∂(summed token loss)/∂y_j)².

    ``batches`` hold ``input_ids`` [batch, seq], all of them real tokens. Only gradients of activations are computed
    and blocks are recomputed, so memory is one block's activations plus one hidden state a block. Together with the
    Gram matrices, ½ Σ_j φ_j E[(δ_j x)²] predicts the increase of the loss per token when row j of a weight changes by
    δ_j: the second-order term of the loss with the empirical Fisher information (the labels are the data's) for the
    Hessian, its terms between outputs and between tokens left out, inputs and gradients taken as independent and layers
    as additive. An expert that gradients reached at fewer than `EXPERT_TOKENS` tokens, where a mean of squares is known
    to about √(2/64) = 18 %, is filled up to so many by the mean of its siblings.
    """
    sums = {name: torch.zeros(features_of(layer)[0], dtype=torch.float64) for name, layer in layers.items()}
    reached = dict.fromkeys(layers, 0)
    tokens = 0
    device = next(model.parameters()).device
    with _gradients_of_outputs(model, layers, sums, reached), torch.enable_grad():
        for batch in batches:
            ids = batch["input_ids"].to(device)
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
            loss = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum")
            loss.backward()
            tokens += ids.numel()
    sensitivities = {name: (total / max(tokens, 1)).float() for name, total in sums.items()}
    for experts in expert_lists(layers, reached, list(find_blocks(model))):
        sensitivities.update(fill_up(sensitivities, reached, experts, EXPERT_TOKENS))
    for name, values in sensitivities.items():
        if not values.any():
            raise RocketError(
                f"{name}: no gradient reached this layer; raise calib.sensitivity_samples, or use cost: activation"
            )
        if not torch.isfinite(values).all():
            raise RocketError(f"{name}: the backward pass gave non-finite gradients; use model.dtype=float32")
    return sensitivities


@contextmanager
def _gradients_of_outputs(
    model: nn.Module, layers: Mapping[str, LinearLayer], sums: dict[str, Tensor], reached: dict[str, int]
) -> Iterator[None]:
    """Hooks that add each output's squared gradient to ``sums`` and its tokens to ``reached``.

    Weights are frozen, and blocks recomputed in the backward pass.
    """
    required = {parameter: parameter.requires_grad for parameter in model.parameters()}
    blocks = find_blocks(model)
    handles: list[Any] = []
    forwards: list[Any] = []

    def add(name: str, gradient: Tensor) -> None:
        gradient = gradient.reshape(-1, gradient.shape[-1])
        sums[name] += gradient.float().square().sum(dim=0).double().cpu()
        reached[name] += len(gradient)

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
    hidden = args[0] if args else kwargs.get("hidden_states")
    if isinstance(hidden, Tensor) and hidden.is_floating_point() and not hidden.requires_grad:
        hidden.requires_grad_()

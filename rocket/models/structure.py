"""Find the repeated blocks of a transformer and the linear layers in them, from the module tree alone."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from rocket.config.errors import RocketError
from rocket.models.expert_linears import ExpertLinears
from rocket.models.linear import LinearLayer, features_of, is_linear


def find_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The repeated blocks, by name, in the order of the module tree.

    A block is an element of an outermost ``nn.ModuleList`` and holds at least one linear layer below itself; lists
    inside a block (experts) belong to the block.
    """
    return dict(_blocks(model, ""))


def _blocks(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if isinstance(child, nn.ModuleList) and _is_block_list(child):
            yield from ((f"{path}.{index}", block) for index, block in child.named_children())
        else:
            yield from _blocks(child, f"{path}.")


def _is_block_list(modules: nn.ModuleList) -> bool:
    return any(
        isinstance(descendant, LinearLayer)
        for block in modules
        for descendant in block.modules()
        if descendant is not block
    )


def target_layers(model: nn.Module, targets: Sequence[str] = (), ignore: Sequence[str] = ()) -> dict[str, LinearLayer]:
    """The linear layers to compress, by name, in the order of the module tree.

    They are those (`linear.is_linear`) inside the repeated blocks whose weight no other module shares, but for the
    routers of experts and for what torch's own encoder layer reads without calling it. ``targets`` keeps only those
    whose name ends with one of its entries (at a dot; the number of an expert at the end of a name may be left out), or
    matches one written ``re:REGEX`` from the start; ``ignore`` drops layers in the same way. Raises RocketError when an
    entry matches nothing, when no layer is left, and for a model that changes its weights as it runs.
    """
    _refuse_rescaled(model)
    blocks = find_blocks(model)
    candidates = {
        f"{block}.{name}": module
        for block, parent in blocks.items()
        for name, module in parent.named_modules()
        if is_linear(module)
    }
    shared = shared_parameters(model)
    left = {id(module) for block in blocks.values() for module in (*_routers(block), *_read_by_torch(block))}
    candidates = {
        name: module
        for name, module in candidates.items()
        if id(module.weight) not in shared and id(module) not in left
    }
    if not candidates:
        kinds = sorted({type(module).__name__ for block in blocks.values() for module in block.modules()})
        found = f"blocks hold {', '.join(kinds[:8])}" if blocks else "it has no repeated blocks"
        raise RocketError(f"{type(model).__name__} has no linear layer inside repeated blocks to compress; {found}")
    selected = _matching(candidates, targets, "model.targets") if targets else set(candidates)
    selected -= _matching(candidates, ignore, "model.ignore")
    if not selected:
        raise RocketError("model.ignore leaves no layer to compress")
    return {name: module for name, module in candidates.items() if name in selected}


def _refuse_rescaled(model: nn.Module) -> None:
    """RWKV divides weights when it is first evaluated: what is saved after that would be divided twice."""
    config: Any = getattr(model, "config", None)
    if getattr(config, "rescale_every", 0) and any(
        hasattr(module, "layers_are_rescaled") for module in model.modules()
    ):
        raise RocketError(
            f"{type(model).__name__} divides its weights as it runs; set rescale_every to 0 in its config"
        )


def _read_by_torch(block: nn.Module) -> Iterator[nn.Module]:
    """Linear layers whose weights torch's fast path for evaluation takes, but does so only where no hook looks on."""
    for module in block.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            yield from module.modules()


def _routers(block: nn.Module) -> Iterator[nn.Module]:
    """Linear layers beside experts that choose among them (one output each) or weigh a shared one (one output).

    Experts whose number the modules do not tell (all in one matrix, as DBRX's) have routers that are called so.
    """
    for mixture in block.modules():
        if type(mixture).__name__.endswith("Router"):
            yield from (module for module in mixture.modules() if isinstance(module, LinearLayer))
        for experts in mixture.children():
            count = _count_experts(experts)
            inside = set(experts.modules())
            for module in mixture.modules() if count > 1 else ():
                if isinstance(module, LinearLayer) and module not in inside and features_of(module)[0] in (1, count):
                    yield module


def _count_experts(module: nn.Module) -> int:
    """How many experts a module is a list of, or holds the stacks of; 0 if it does neither."""
    if isinstance(module, nn.ModuleList):
        return len(module)
    return max((len(stack) for stack in module.children() if isinstance(stack, ExpertLinears)), default=0)


def shared_parameters(model: nn.Module) -> set[int]:
    """The ids of parameters at two places or more of a model: of several modules, or of one that is there twice."""
    places = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    return {identity for identity, count in places.items() if count > 1}


def _matching(candidates: Mapping[str, nn.Module], patterns: Sequence[str], key: str) -> set[str]:
    selected: set[str] = set()
    for pattern in patterns:
        matches = {name for name in candidates if _matches(name, pattern, key)}
        if not matches:
            endings = sorted({_without_number(name).rpartition(".")[2] for name in candidates})
            raise RocketError(f"{key}: {pattern!r} matches no layer; layers end in {', '.join(endings)}")
        selected |= matches
    return selected


def _matches(name: str, pattern: str, key: str) -> bool:
    if pattern.startswith("re:"):
        try:
            return re.match(pattern[3:], name) is not None
        except re.error as error:
            raise RocketError(f"{key}: {pattern!r} is no regular expression: {error}") from None
    return any(f".{ending}".endswith(f".{pattern}") for ending in (name, _without_number(name)))


def _without_number(name: str) -> str:
    return re.sub(r"\.\d+$", "", name)


def remedy_of_nan(model: nn.Module) -> str:
    """What to do about activations or gradients that are not finite: told by whether a weight of the model is not."""
    for name, values in model.named_parameters():
        if not values.is_meta and not torch.isfinite(values).all():
            return f"{name} holds NaN or infinity: the checkpoint is damaged, get it again"
    return "use model.dtype=float32"


def block_of(name: str, blocks: Sequence[str]) -> str:
    """The block that a layer belongs to; the empty string if none."""
    return next((block for block in blocks if name.startswith(f"{block}.")), "")

"""Experts whose weights are stacked in one parameter [experts, ., .]: made linear layers, and stacked again."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_map_only

from rocket.config.errors import RocketError, first_line
from rocket.models.expert_linears import EAGER, LAYOUTS, ExpertLinears
from rocket.models.mode import evaluation_mode
from rocket.models.residence import hold
from rocket.models.structure import block_of, find_blocks, shared_parameters

TOLERANCE = 1e-2

logger = logging.getLogger(__name__)


def unstack_experts(model: nn.Module, layers: Collection[str] | None = None) -> None:
    """Make stacked experts linear layers, in place: ``...experts.gate_up_proj.0``, ``.1`` ...; their weights are views.

    Experts are parameters [experts, ., .] of a module inside a repeated block. Whether that module takes them one by
    one, and which way round, is tried out: on what it gets when the model runs its ``dummy_inputs``, it must return
    with the layers what it returns with the parameters. Those that do not are left as they are, and a warning says why.
    ``layers`` restricts this to parameters that hold one of these layers.
    """
    candidates = _candidates(model)
    if layers is not None:
        candidates = {
            name: module
            for name, module in candidates.items()
            if any(layer.startswith(f"{name}.{stack}.") for stack in _stacks(module) for layer in layers)
        }
    if not candidates:
        return
    implementations = _implementations(candidates.values())
    for config, _ in implementations:
        config._experts_implementation = EAGER
    failures: dict[str, str] = {}
    calls = _record_calls(model, candidates)
    for name, module in candidates.items():
        if isinstance(calls, str):
            reason: str | None = calls
        else:
            with hold(model, block_of(name, list(find_blocks(model)))):
                reason = _try_layouts(module, calls.get(name))
        if reason is not None:
            failures[name] = reason
    unstacked = {id(_config(module)) for name, module in candidates.items() if name not in failures}
    before = {id(config): implementation for config, implementation in implementations}
    for module in candidates.values():
        for experts in _unstacked(module):
            experts.implementation = before.get(id(_config(module)), EAGER)
    for config, implementation in implementations:
        if id(config) not in unstacked:
            config._experts_implementation = implementation
    for reason in dict.fromkeys(failures.values()):
        names = [name for name, other in failures.items() if other == reason]
        logger.warning(
            "%s (%s) and %d others like it keep their 3-D parameters dense: %s",
            names[0],
            type(candidates[names[0]]).__name__,
            len(names) - 1,
            reason,
        )


@contextmanager
def unstacked_experts(model: nn.Module) -> Iterator[None]:
    """`unstack_experts` for a while; afterwards the model is as it was, with the very same parameters."""
    candidates = _candidates(model)
    parameters = {name: dict(module._parameters) for name, module in candidates.items()}
    implementations = _implementations(candidates.values())
    try:
        unstack_experts(model)
        yield
    finally:
        for name, module in candidates.items():
            _put_back(module, parameters[name])
        for config, implementation in implementations:
            config._experts_implementation = implementation


def unstack_as(model: nn.Module, layouts: Mapping[str, str]) -> None:
    """Unstack the parameters of these names, in place, on any device. Raises RocketError for one that is no stack."""
    for name, layout in layouts.items():
        if layout not in LAYOUTS:
            raise RocketError(f"config.json: the experts of {name} lie as {layout!r}; there are {', '.join(LAYOUTS)}")
        parent, _, attribute = name.rpartition(".")
        module = model.get_submodule(parent)
        parameter = module._parameters.get(attribute)
        if parameter is None or parameter.ndim != 3:
            raise RocketError(f"config.json: {name} holds stacked experts, in this model it is something else")
        experts = _replace(module, attribute, layout)
        config = _config(module)
        if config is not None:
            experts.implementation = config._experts_implementation
            config._experts_implementation = EAGER


def restack_experts(model: nn.Module) -> None:
    """Stack the experts of every `ExpertLinears` again, in place, and run them as before. Its layers must be plain."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, ExpertLinears):
                del module._modules[name]
                module.register_parameter(name, child.stacked())
                if child.implementation != EAGER:  # else others of this config were unstacked first, and know better
                    _config(module)._experts_implementation = child.implementation


def expert_layouts(model: nn.Module) -> dict[str, str]:
    """The layout of each stacked parameter that is unstacked in a model, by its name."""
    return {name: module.layout for name, module in model.named_modules() if isinstance(module, ExpertLinears)}


def stacked_experts(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that may hold stacked experts, by name; on any device."""
    return {
        f"{name}.{attribute}": parameter
        for name, module in _candidates(model).items()
        for attribute, parameter in _stacks(module).items()
    }


def _candidates(model: nn.Module) -> dict[str, nn.Module]:
    """Modules inside blocks that hold 3-D parameters of their own, all of as many elements, shared with no other."""
    shared = shared_parameters(model)
    found = {}
    for block, parent in find_blocks(model).items():
        for name, module in parent.named_modules(prefix=block):
            stacks = _stacks(module)
            counts = {len(parameter) for parameter in stacks.values()}
            if len(counts) == 1 and counts != {1} and shared.isdisjoint(map(id, stacks.values())):
                found[name] = module
    return found


def _stacks(module: nn.Module) -> dict[str, nn.Parameter]:
    if isinstance(module, _ConvNd):
        return {}
    return {
        name: parameter
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.ndim == 3 and parameter.is_floating_point()
    }


def _config(module: nn.Module) -> Any:
    """The config by which transformers 5 chooses another implementation than the module's own code; None if none."""
    config = getattr(module, "config", None)
    return config if hasattr(config, "_experts_implementation") else None


def _implementations(modules: Iterable[nn.Module]) -> list[tuple[Any, str | None]]:
    return [(config, config._experts_implementation) for config in map(_config, modules) if config is not None]


@dataclass(frozen=True)
class _Call:
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


@torch.no_grad()
def _record_calls(model: nn.Module, modules: Mapping[str, nn.Module]) -> dict[str, _Call] | str:
    """What each module is given and returns when the model runs its ``dummy_inputs``; why not, if it does not run."""
    calls: dict[str, _Call] = {}

    def record(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            calls[name] = _Call(*tree_map_only(Tensor, Tensor.clone, (args, kwargs, output)))

        return hook

    handles = [module.register_forward_hook(record(name), with_kwargs=True) for name, module in modules.items()]
    try:
        device = next(model.parameters()).device
        inputs = {key: value.to(device) for key, value in model.dummy_inputs.items()}  # type: ignore[operator, union-attr]
        with evaluation_mode(model):
            model(**inputs)
    except Exception as error:
        return f"the model does not run on its dummy_inputs ({first_line(error)})"
    finally:
        for handle in handles:
            handle.remove()
    return calls


@torch.no_grad()
def _try_layouts(module: nn.Module, call: _Call | None) -> str | None:
    """Unstack a module's parameters in the layout in which it returns what it did before; why not, if in none."""
    if call is None:
        return "the model's dummy_inputs do not reach it"
    if not isinstance(call.output, Tensor) or not call.output.any():
        return "it returns nothing to compare"
    parameters = dict(module._parameters)
    reasons = []
    for layout in LAYOUTS:
        for name in _stacks(module):
            _replace(module, name, layout)
        try:
            with evaluation_mode(module):
                output = module(*call.args, **call.kwargs)
            error = float((output - call.output).double().norm() / call.output.double().norm())
            if error <= TOLERANCE:
                return None
            reasons.append("with layers of their own it returns something else")
        except Exception as error:
            reasons.append(first_line(error))
        _put_back(module, parameters)
    return "; ".join(dict.fromkeys(reasons))


def _unstacked(module: nn.Module) -> list[ExpertLinears]:
    return [child for child in module.children() if isinstance(child, ExpertLinears)]


def _replace(module: nn.Module, name: str, layout: str) -> ExpertLinears:
    stacked = module._parameters.pop(name)
    assert stacked is not None
    experts = ExpertLinears(stacked, layout)
    module.add_module(name, experts)
    return experts


def _put_back(module: nn.Module, parameters: Mapping[str, nn.Parameter | None]) -> None:
    for name in parameters:
        module._modules.pop(name, None)
    module._parameters.clear()
    module._parameters.update(parameters)

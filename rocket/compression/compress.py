"""Plan + model -> compressed model: each chosen option is built in closed form and takes the layer's place."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from rocket.allocation import Plan
from rocket.calib import Calibration
from rocket.config.errors import RocketError, first_line
from rocket.factorization.problem import LayerProblem
from rocket.forms import Option, build
from rocket.models import ExpertLinears, LinearLayer, features_of, is_streamed, unstack_experts, weight_of
from rocket.nn import CompressedLinear, LayerSpec, attach_quantizer, replace_module
from rocket.nn.layers import empty_layer
from rocket.usage import track

Model = TypeVar("Model", bound=nn.Module)


def compress(
    model: Model,
    plan: Plan,
    calibration: Calibration | None = None,
    *,
    inplace: bool = False,
    built: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> Model:
    """The compressed model: every layer as the plan says, ready for ``save_pretrained``.

    ``calibration`` is needed where the plan does not carry it (a plan read from a file). The model given stays as it
    is unless ``inplace``. Stacked experts that the plan names become layers of their own. ``built`` has the tensors of
    layers that were built before (`build_tensors`). Raises RocketError when plan and model do not belong together.
    """
    if not isinstance(plan, Plan):
        raise RocketError(f"the plan is a {type(plan).__name__}; give rocket.plan(...).at(removed_ratio=0.3) or alike")
    calibration = calibration or plan.calibration
    if calibration is None and built is None:
        raise RocketError("this plan was read from a file; pass the calibration it was made with")
    if not inplace:
        model = copy.deepcopy(model)
    unstack_experts(model, plan.choices)
    specs: dict[str, LayerSpec] = {}
    for name, option in track(compressed_layers(plan).items(), "compress layers"):
        linear = linear_layer(model, name)
        if built is not None:
            tensors = built[name]
        else:
            assert calibration is not None
            problem = calibration.problem(name, weight_of(linear), plan.profiling)
            tensors = build_tensors(name, linear, problem, option, plan)
        try:
            layer = make_layer(linear, tensors, option, plan.input_groups[name])
        except RuntimeError as error:
            raise RocketError(f"{name}: its tensors are not those of the plan ({first_line(error)})") from error
        specs[name] = layer.spec
        replace_module(model, name, layer)
    if not is_streamed(model):
        for module in model.modules():
            if isinstance(module, ExpertLinears):
                module.own_weights()
    attach_quantizer(model, specs)
    return model


def compressed_layers(plan: Plan) -> dict[str, Option]:
    """The layers that do not stay dense. Raises RocketError if all do."""
    chosen = {name: option for name, option in plan.choices.items() if not option.is_original}
    if not chosen:
        raise RocketError("the plan leaves every layer dense; there is nothing to compress")
    return chosen


def build_tensors(
    name: str, linear: LinearLayer, problem: LayerProblem, option: Option, plan: Plan
) -> dict[str, Tensor]:
    """What the layer that stores ``linear`` as ``option`` says holds, its bias left out, in the type of ``linear``.

    Raises RocketError for an option that the layer cannot take.
    """
    try:
        with torch.device("meta"):
            layer = empty_layer(option.spec(problem.in_features, problem.out_features, ""), bias=False)
        if layer.stored_values() != option.parameters:
            raise ValueError(
                f"the plan counts {option.parameters} values where its rank and nnz make {layer.stored_values()}"
            )
        scales = sum(tensor.numel() for name, tensor in layer.named_parameters() if name.endswith("_scale"))
        if scales != option.scales:
            raise ValueError(f"the plan counts {option.scales} scales where its form and rank make {scales}")
        state = build(problem, option, plan.profiling, linear.weight.dtype)
    except ValueError as error:
        raise RocketError(f"{name}: {error}") from error
    return {
        key: tensor.to(linear.weight.dtype) if tensor.is_floating_point() else tensor for key, tensor in state.items()
    }


def make_layer(
    linear: LinearLayer, tensors: Mapping[str, Tensor], option: Option, input_group: str
) -> CompressedLinear:
    """The layer of tensors that `build_tensors` made, on the device of ``linear``, with its bias."""
    out_features, in_features = features_of(linear)
    with torch.device("meta"):
        layer = empty_layer(option.spec(in_features, out_features, input_group), linear.bias is not None)
    layer.replaces = type(linear)
    state = dict(tensors)
    if linear.bias is not None:
        state["bias"] = linear.bias.detach()
    layer.load_state_dict(state, assign=True)
    for name, parameter in layer.named_parameters():
        like = linear.bias if name == "bias" else linear.weight
        parameter.requires_grad_(parameter.requires_grad and like.requires_grad)
    return layer.to(linear.weight.device).train(linear.training)


def linear_layer(model: nn.Module, name: str) -> LinearLayer:
    """The layer of a plan in a model. Raises RocketError if it is none there."""
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise RocketError(f"the plan names {name}, which this model does not have") from None
    if not isinstance(module, LinearLayer):
        raise RocketError(f"the plan names {name}, which is a {type(module).__name__} here, not a linear layer")
    return module

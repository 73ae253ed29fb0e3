"""Plan + model -> compressed model: each chosen option is built in closed form and takes the layer's place."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import nn

from rocket.allocation import Plan
from rocket.calib import Calibration
from rocket.config.errors import RocketError
from rocket.factorization.problem import LayerProblem
from rocket.forms import FORMS, Option
from rocket.models import ExpertLinears, LinearLayer, unstack_experts, weight_of
from rocket.nn import CompressedLinear, LayerSpec, attach_quantizer, replace_module
from rocket.nn.layers import empty_layer
from rocket.run import track

Model = TypeVar("Model", bound=nn.Module)


def compress(model: Model, plan: Plan, calibration: Calibration | None = None, *, inplace: bool = False) -> Model:
    """The compressed model: every layer as the plan says, ready for ``save_pretrained``.

    ``calibration`` is needed where the plan does not carry it (a plan read from a file). The model given stays as it
    is unless ``inplace``. Stacked experts that the plan names become layers of their own. Raises RocketError when plan
    and model do not belong together.
    """
    calibration = calibration or plan.calibration
    if calibration is None:
        raise RocketError("this plan was read from a file; pass the calibration it was made with")
    if not inplace:
        model = copy.deepcopy(model)
    unstack_experts(model, plan.choices)
    for module in model.modules():
        if isinstance(module, ExpertLinears):
            module.own_weights()
    specs: dict[str, LayerSpec] = {}
    for name, option in track(plan.choices.items(), "compress layers"):
        linear = _linear(model, name)
        if option.form == "dense":
            continue
        problem = calibration.problem(name, weight_of(linear), plan.profiling)
        try:
            layer = build_layer(linear, problem, option, plan.input_groups[name], plan)
        except ValueError as error:
            raise RocketError(f"{name}: {error}") from error
        specs[name] = layer.spec
        replace_module(model, name, layer)
    if not specs:
        raise RocketError("the plan leaves every layer dense; there is nothing to compress")
    attach_quantizer(model, specs)
    return model


def build_layer(
    linear: LinearLayer, problem: LayerProblem, option: Option, input_group: str, plan: Plan
) -> CompressedLinear:
    """The layer that stores ``linear`` as ``option`` says, in the type and on the device of ``linear``.

    Raises ValueError for an option that the layer cannot take.
    """
    with torch.device("meta"):
        spec = option.spec(problem.in_features, problem.out_features, input_group)
        layer = empty_layer(spec, linear.bias is not None)
    if layer.stored_values() != option.parameters:
        raise ValueError(
            f"the plan counts {option.parameters} values where its rank and nnz make {layer.stored_values()}"
        )
    layer.replaces = type(linear)
    state = FORMS[option.form].build(problem, option, plan.profiling)
    state = {
        name: tensor.to(linear.weight.dtype) if tensor.is_floating_point() else tensor for name, tensor in state.items()
    }
    if linear.bias is not None:
        state["bias"] = linear.bias.detach()
    layer.load_state_dict(state, assign=True)
    return layer.to(linear.weight.device).train(linear.training)


def _linear(model: nn.Module, name: str) -> LinearLayer:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise RocketError(f"the plan names {name}, which this model does not have") from None
    if not isinstance(module, LinearLayer):
        raise RocketError(f"the plan names {name}, which is a {type(module).__name__} here, not a linear layer")
    return module

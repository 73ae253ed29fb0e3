"""The plug-in by which transformers opens our checkpoints: a quantizer that swaps layers before weights are loaded."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from rocket.config.errors import RocketError
from rocket.kernels import bitmap
from rocket.nn.layers import VALUES, CompressedLinear, LayerSpec, empty_layer
from rocket.nn.optimize import attach_optimize

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rocket.models import StoredTensor

FORMAT_VERSION = 1
MAX_NAME = 512
_NAME = re.compile(r"[\w-]+(\.[\w-]+)*")


@register_quantization_config("rocket")
class RocketConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """``quantization_config`` of a compressed checkpoint: the spec of each compressed layer, by module name.

    ``experts`` maps stacked parameters of the architecture, whose experts are layers of their own here, to their layout
    (`models.experts`).
    """

    def __init__(self, modules: Any = None, version: Any = None, experts: Any = None, **unknown: Any) -> None:
        self.quant_method = "rocket"
        unknown.pop("quant_method", None)
        if not isinstance(modules, Mapping) or not all(isinstance(spec, Mapping) for spec in modules.values()):
            raise RocketError("quantization_config.modules must map layer names to their specs")
        experts = {} if experts is None else experts
        if not isinstance(experts, Mapping) or not all(isinstance(layout, str) for layout in experts.values()):
            raise RocketError("quantization_config.experts must map parameter names to their layouts")
        if unknown:
            raise RocketError(f"quantization_config has unknown fields: {', '.join(sorted(unknown))[:200]}")
        if type(version) is not int or version != FORMAT_VERSION:
            raise RocketError(f"checkpoint has format version {version!r:.200}; this rocket reads {FORMAT_VERSION}")
        for name in (*modules, *experts):
            if not isinstance(name, str) or len(name) > MAX_NAME or not _NAME.fullmatch(name):
                raise RocketError(f"config.json: {name!r:.200} is no name of a layer")
        self.version = version
        self.modules = {name: dict(spec) for name, spec in modules.items()}
        self.experts = dict(experts)

    def to_dict(self) -> dict[str, Any]:
        values: dict[str, Any] = super().to_dict()
        if not self.experts:
            del values["experts"]
        return values

    def rename(self, found: Mapping[str, str], groups: Mapping[str, str], experts: Mapping[str, str]) -> None:
        """Take the names that a model has for its layers, by those that are here, and no layers that it has not."""
        renamed = {name: dict(self.modules[old]) for old, name in found.items()}
        for spec in renamed.values():
            if spec.get("input_group") in groups:
                spec["input_group"] = groups[spec["input_group"]]
        self.modules, self.experts = renamed, dict(experts)

    def specs(self) -> dict[str, LayerSpec]:
        """The layer specs. Raises RocketError naming the layer whose entry is malformed."""
        specs = {}
        for name, values in self.modules.items():
            try:
                specs[name] = LayerSpec.from_dict(values)
            except (ValueError, TypeError) as error:
                raise RocketError(f"config.json: {name}: {error}") from None
        return specs


@register_quantizer("rocket")
class RocketQuantizer(HfQuantizer):  # type: ignore[misc]
    """Swaps the layers named in the config for empty compressed ones; transformers then loads their tensors.

    A model holds its quantizer, which keeps the model's class to give it ``optimize`` wherever the model is unpickled.
    """

    model_class: type[nn.Module] | None = None
    requires_calibration = True
    requires_parameters_quantization = False

    def __init__(self, quantization_config: RocketConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.quantization_config = quantization_config

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **_: Any
    ) -> nn.Module:
        from rocket.models import check_places, expert_layouts, read_headers  # here, as it imports the model classes

        stored = None
        if checkpoint_files:
            config: Any = model.config
            check_places(config.name_or_path, checkpoint_files)
            stored = read_headers(checkpoint_files)
        refuse_parallel(model)
        is_whole = _saved_as(model)
        layers: dict[str, nn.Module] = _unstack(model, self.quantization_config.experts, stored, is_whole)
        specs = self.quantization_config.specs()
        names = [name for name, _ in model.named_modules()]
        found = match_modules(specs, names, is_whole)
        groups = match_modules({spec.input_group for spec in specs.values()}, names, is_whole=False)
        for name, module_name in found.items():
            layer = _empty_replacement(name, model.get_submodule(module_name), specs[name])
            replace_module(model, module_name, layer)
            layers.pop(module_name, None)
            layers[name] = layer
        if stored is not None:
            _check_tensors(model, layers, stored, is_whole)
        self.quantization_config.rename(found, groups, expert_layouts(model))
        return model

    def update_attn_implementation(self, config: Any) -> Any:
        """Called by transformers 5 before it makes the model: one of a billion layers would take forever."""
        from rocket.models import check_counts  # here, as it imports the model classes

        check_counts(config.to_dict())
        return config

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        for name, module in model.named_modules():
            if isinstance(module, CompressedLinear):
                _check_values(name, module)
                module.take_gradients()  # transformers gives all that it loads one
        self.adopt(model)
        return model

    def adopt(self, model: nn.Module) -> None:
        """Give a model what compressed ones have beside their layers."""
        _keep_names(model)
        self.model_class = type(model)
        attach_optimize(self.model_class)

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update(state)
        if self.model_class is not None:
            attach_optimize(self.model_class)

    def update_missing_keys(self, model: nn.Module, missing_keys: list[str], prefix: str) -> list[str]:
        """Called by transformers 4.57 only, which does not tell the checkpoint's files beforehand."""
        from rocket.models import expert_layouts  # here, as it imports the model classes

        experts = tuple(f"{name}." for name in expert_layouts(model))
        for name, module in model.named_modules():
            if isinstance(module, CompressedLinear) or name.startswith(experts):
                for key in missing_keys:
                    if key.startswith(f"{name}."):
                        raise RocketError(f"the checkpoint lacks the tensor {key}; a file is missing or was replaced")
        return missing_keys

    def update_weight_conversions(self, conversions: list[Any], model: nn.Module) -> list[Any]:
        """None: tensors are stored under the model's own names (`_keep_names`), which some conversions take for theirs.

        Called by transformers 5 only.
        """
        return []

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        """Asked by transformers before it compiles for a static cache; experts in a loop depend on the data."""
        return not self.quantization_config.experts


def refuse_parallel(model: nn.Module) -> None:
    """Raise RocketError if transformers is to cut the weights of a model into parts, which packed ones do not take."""
    config: Any = model.config
    parallel = getattr(config, "distributed_config", None)
    if getattr(parallel, "tp_plan", None) or (getattr(parallel, "tp_size", None) or 1) > 1:
        raise RocketError("compressed layers do not run tensor-parallel; leave out tp_plan, or `rocket export` it")


def _saved_as(model: nn.Module) -> bool:
    """Whether a checkpoint is of this class of models, not of one that has other parts."""
    config: Any = model.config
    return type(model).__name__ in (config.architectures or ())


def match_modules(specs: Iterable[str], module_names: Iterable[str], is_whole: bool = True) -> dict[str, str]:
    """For each layer name of the config, the module of this model that it means.

    ``AutoModel`` drops the prefix under which ``AutoModelForCausalLM`` holds the same layer, so names are matched by
    their longest common ending of whole components. Raises RocketError for a layer that this model does not have, if it
    is the whole of what was saved and not a part (T5's encoder), and for two that are the same in it.
    """
    from rocket.models import Endings  # here, as it imports the model classes

    present = Endings(module_names)
    found: dict[str, str] = {}
    owners: dict[str, str] = {}
    for name in specs:
        match = present.find(name)
        if match is None and not is_whole:
            continue
        if match is None:
            raise RocketError(f"config.json: {name} is compressed, but this model has no such layer")
        if match in owners:
            raise RocketError(f"config.json: {owners[match]} and {name} are both {match} in this model")
        found[name], owners[match] = match, name
    return found


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` in the place of the one called ``name``."""
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, module)


def attach_quantizer(model: PreTrainedModel, specs: Mapping[str, LayerSpec]) -> None:
    """Make an in-memory model one like those reloaded: with ``save_pretrained`` in our format, and ``optimize``."""
    from rocket.models import expert_layouts  # here, as it imports the model classes

    modules = {name: spec.to_dict() for name, spec in specs.items()}
    config = RocketConfig(modules, FORMAT_VERSION, expert_layouts(model))
    model.config.quantization_config = config
    quantizer = RocketQuantizer(config, pre_quantized=True)
    model.hf_quantizer = quantizer
    model.quantization_method = "rocket"
    model.is_quantized = True
    for part in _configs(model):
        part._is_quantized = True  # asked by the attention of transformers 5, which else looks for an nn.Linear
    quantizer.adopt(model)


def detach_quantizer(model: PreTrainedModel) -> None:
    """Take back what `attach_quantizer`, or transformers, noted of a model whose layers are plain again."""
    noted = ("hf_quantizer", "quantization_method", "_weight_conversions", "_checkpoint_conversion_mapping")
    for holder, attributes in (
        (model, noted),
        (model.config, ("quantization_config", "_pre_quantization_dtype")),
        *((part, ("_is_quantized",)) for part in _configs(model)),
    ):
        for attribute in attributes:
            vars(holder).pop(attribute, None)
    model.is_quantized = False


def _configs(model: nn.Module) -> list[Any]:
    from transformers import PreTrainedModel

    return [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]


def _keep_names(model: nn.Module) -> None:
    """Make transformers save tensors under the model's own names, which config.json uses.

    It would give them those of the original checkpoint, and split what it takes for stacked experts.
    """
    loosely_typed: Any = model
    loosely_typed._weight_conversions = []
    loosely_typed._checkpoint_conversion_mapping = {}  # the same in transformers 4


def _unstack(
    model: nn.Module, experts: Mapping[str, str], stored: Mapping[str, StoredTensor] | None, is_whole: bool
) -> dict[str, nn.Module]:
    """Make experts layers of their own as config.json says; these, by name."""
    from rocket.models import unstack_as  # here, as it imports the model classes

    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.ndim == 3}
    layouts = {name: experts[stack] for stack, name in match_modules(experts, parameters, is_whole).items()}
    for name in layouts:
        if stored is not None and len(parameters[name]) > len(stored):
            raise RocketError(f"config.json: {name} has {len(parameters[name])} experts, the checkpoint fewer tensors")
    unstack_as(model, layouts)
    stacks = {name: model.get_submodule(name) for name in layouts}
    return {f"{name}.{number}": layer for name, stack in stacks.items() for number, layer in stack.named_children()}


def _empty_replacement(name: str, linear: nn.Module, spec: LayerSpec) -> CompressedLinear:
    from rocket.models import features_of, is_linear  # here, as it imports the model classes

    if not is_linear(linear):
        raise RocketError(f"config.json: {name} is a {type(linear).__name__} in this model, not a linear layer")
    out_features, in_features = features_of(linear)
    if (in_features, out_features) != (spec.in_features, spec.out_features):
        raise RocketError(
            f"config.json: {name} is {spec.out_features}x{spec.in_features}, in this model it is "
            f"{out_features}x{in_features}"
        )
    with torch.device("meta"):
        try:
            layer = empty_layer(spec, linear.bias is not None)
        except ValueError as error:
            raise RocketError(f"config.json: {name}: {error}") from None
    layer.replaces = type(linear)
    return layer.to(next(linear.parameters()).dtype)


def _check_tensors(
    model: nn.Module, layers: Mapping[str, nn.Module], stored: Mapping[str, StoredTensor], is_whole: bool
) -> None:
    """Compare what config.json makes of the model, on meta, with what the files hold.

    transformers fills tensors that a checkpoint lacks with random numbers and a warning. Here that is an error; but for
    another class than was saved, whose head may be new, only in compressed layers and repeated blocks. Outside of these
    a tensor of another shape is left to transformers, which refuses it unless it is asked to make it anew.
    """
    from rocket.models import Endings, check_size, find_blocks  # here, as it imports the model classes

    present = Endings(stored)
    rebuilt = getattr(model, "_keys_to_ignore_on_save", None) or ()  # by transformers, whenever it makes the model
    ours = {id(tensor): f"{name}.{key}" for name, layer in layers.items() for key, tensor in _tensors_of(layer)}
    blocks = tuple(f"{name}." for name in find_blocks(model))
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    persistent = model.state_dict().keys()
    made = 0
    for name, tensor in _tensors_of(model):
        own_name = ours.get(id(tensor), name)
        inside = id(tensor) in ours or name.startswith(blocks)
        stored_name = present.find(own_name) if name in persistent else None
        if stored_name is not None and _fits(stored_name, stored[stored_name], tensor, inside):
            continue
        if name in tied:
            continue
        if stored_name is None and name in persistent and (inside or is_whole) and name not in rebuilt:
            raise RocketError(f"the checkpoint lacks the tensor {own_name}; a file is missing or was replaced")
        made += tensor.numel()
    check_size(made)


def _tensors_of(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]


def _fits(name: str, stored: StoredTensor, tensor: torch.Tensor, must_fit: bool) -> bool:
    """Whether a stored tensor has the shape that the model asks for; an error where it must, or is of another type."""
    if stored.shape != tuple(tensor.shape) and must_fit:
        raise RocketError(f"{name} is {list(stored.shape)} in the checkpoint, config.json says {list(tensor.shape)}")
    wanted = {torch.uint8: "U8", torch.int8: "I8"}.get(tensor.dtype, stored.dtype)
    if stored.dtype != wanted:
        raise RocketError(f"{name} holds {stored.dtype} values in the checkpoint; they must be {wanted}")
    if tensor.is_floating_point() and not stored.is_floating_point:
        raise RocketError(f"{name} holds {stored.dtype} values in the checkpoint; they must be floating-point")
    return stored.shape == tuple(tensor.shape)


def _check_values(name: str, layer: CompressedLinear) -> None:
    """Whether a layer that was loaded is what config.json says. transformers 4 tells no headers beforehand."""
    for key in VALUES:
        values = getattr(layer, key, None)
        if values is not None and (values.dtype == torch.int8) != (layer.spec.precision == "int8"):
            raise RocketError(
                f"{name}.{key} holds {values.dtype} values, but config.json has the precision {layer.spec.precision}"
            )
    if layer.is_sparse and layer.get_buffer("mask").device.type != "meta":
        _check_mask(name, layer, layer.get_buffer("mask"))


def _check_mask(name: str, layer: CompressedLinear, mask: torch.Tensor) -> None:
    inside = bitmap.pack_mask(torch.ones(1, layer.mask_columns, dtype=torch.bool, device=mask.device))
    kept, total = bitmap.count(mask & inside), bitmap.count(mask)
    if not kept == total == layer.spec.nnz:
        raise RocketError(
            f"{name}: the mask keeps {kept} values and {total - kept} in its padding, config.json says "
            f"{layer.spec.nnz}; the checkpoint is damaged"
        )

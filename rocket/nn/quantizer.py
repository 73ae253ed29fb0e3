"""The plug-in by which transformers opens our checkpoints: a quantizer that swaps layers before weights are loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import nn
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from rocket.config.errors import RocketError
from rocket.kernels import bitmap
from rocket.nn.layers import CompressedLinear, LayerSpec, empty_layer
from rocket.nn.optimize import attach_optimize

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORMAT_VERSION = 1


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
        if not isinstance(experts or {}, Mapping):
            raise RocketError("quantization_config.experts must map parameter names to their layouts")
        if unknown:
            raise RocketError(f"quantization_config has unknown fields: {', '.join(sorted(unknown))}")
        if version != FORMAT_VERSION:
            raise RocketError(f"checkpoint has format version {version!r}; this rocket reads {FORMAT_VERSION}")
        self.version = version
        self.modules = {name: dict(spec) for name, spec in modules.items()}
        self.experts = dict(experts or {})

    def to_dict(self) -> dict[str, Any]:
        values: dict[str, Any] = super().to_dict()
        if not self.experts:
            del values["experts"]
        return values

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
    """Swaps the layers named in the config for empty compressed ones; transformers then loads their tensors."""

    requires_calibration = True
    requires_parameters_quantization = False

    def __init__(self, quantization_config: RocketConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.quantization_config = quantization_config

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **_: Any
    ) -> nn.Module:
        layers: dict[str, nn.Module] = _unstack(model, self.quantization_config.experts)
        specs = self.quantization_config.specs()
        for name, module_name in match_modules(specs, [name for name, _ in model.named_modules()]).items():
            layer = _empty_replacement(name, model.get_submodule(module_name), specs[name])
            replace_module(model, module_name, layer)
            layers.pop(module_name, None)
            layers[name] = layer
        _check_tensors(layers, checkpoint_files)
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        for name, module in model.named_modules():
            if isinstance(module, CompressedLinear) and "mask" in module.tensors:
                _check_mask(name, module)
        _keep_names(model)
        attach_optimize(model)
        return model

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
        return True


def match_modules(specs: Iterable[str], module_names: Iterable[str]) -> dict[str, str]:
    """For each layer name of the config, the module of this model that it means.

    ``AutoModel`` drops the prefix under which ``AutoModelForCausalLM`` holds the same layer, so names are matched by
    their longest common ending of whole components. Raises RocketError for a layer that this model does not have.
    """
    present = set(module_names)
    found = {}
    for name in specs:
        parts = name.split(".")
        endings = (".".join(parts[start:]) for start in range(len(parts) - 1))
        match = next((ending for ending in endings if ending in present), None)
        if match is None:
            match = next((candidate for candidate in present if candidate.endswith(f".{name}")), None)
        if match is None:
            raise RocketError(f"config.json: {name} is compressed, but this model has no such layer")
        found[name] = match
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
    model.hf_quantizer = RocketQuantizer(config, pre_quantized=True)
    model.quantization_method = "rocket"
    model.is_quantized = True
    _keep_names(model)
    attach_optimize(model)


def _keep_names(model: nn.Module) -> None:
    """Make transformers save tensors under the model's own names, which config.json uses.

    It would give them those of the original checkpoint, and split what it takes for stacked experts.
    """
    loosely_typed: Any = model
    loosely_typed._weight_conversions = []
    loosely_typed._checkpoint_conversion_mapping = {}  # the same in transformers 4


def _unstack(model: nn.Module, experts: Mapping[str, str]) -> dict[str, nn.Module]:
    """Make experts layers of their own as config.json says; these, by name."""
    from rocket.models import unstack_as  # here, as it imports the model classes

    parameters = [name for name, parameter in model.named_parameters() if parameter.ndim == 3]
    layouts = {name: experts[stored] for stored, name in match_modules(experts, parameters).items()}
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


def _check_tensors(layers: Mapping[str, nn.Module], checkpoint_files: list[str] | None) -> None:
    """transformers fills tensors that a checkpoint lacks with random numbers and a warning; here it is an error."""
    files = [file for file in checkpoint_files or [] if str(file).endswith(".safetensors")]
    if not files:
        return
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        with safe_open(file, framework="pt") as handle:
            shapes.update({key: tuple(handle.get_slice(key).get_shape()) for key in handle.keys()})  # noqa: SIM118
    for name, layer in layers.items():
        for suffix, expected in layer.state_dict().items():
            tensor = f"{name}.{suffix}"
            found = shapes.get(tensor) or next((shapes[key] for key in shapes if key.endswith(f".{tensor}")), None)
            if found is None:
                raise RocketError(f"the checkpoint lacks the tensor {tensor}; a file is missing or was replaced")
            if found != tuple(expected.shape):
                raise RocketError(
                    f"{tensor} is {list(found)} in the checkpoint, config.json says {list(expected.shape)}"
                )


def _check_mask(name: str, layer: CompressedLinear) -> None:
    mask = layer.get_buffer("mask")
    if mask.device.type == "meta":
        return
    kept = int(bitmap.unpack_mask(mask, layer.mask_columns).sum())
    if not kept == bitmap.count(mask) == layer.spec.nnz:
        raise RocketError(
            f"{name}: the mask keeps {kept} values and {bitmap.count(mask) - kept} in its padding, config.json says "
            f"{layer.spec.nnz}; the checkpoint is damaged"
        )

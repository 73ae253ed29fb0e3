"""All that knows transformers: load a model, find its blocks and the layers to compress."""

from rocket.models.expert_linears import ExpertLinears
from rocket.models.experts import (
    expert_layouts,
    restack_experts,
    unstack_as,
    unstack_experts,
    unstacked_experts,
)
from rocket.models.linear import LinearLayer, features_of, is_linear, make_linear, weight_of
from rocket.models.load import identify_model, load_model, locate, refuse_quantized, resolve_device
from rocket.models.mode import evaluation_mode
from rocket.models.structure import block_of, find_blocks, target_layers

__all__ = [
    "ExpertLinears",
    "LinearLayer",
    "block_of",
    "evaluation_mode",
    "expert_layouts",
    "features_of",
    "find_blocks",
    "identify_model",
    "is_linear",
    "load_model",
    "locate",
    "make_linear",
    "refuse_quantized",
    "resolve_device",
    "restack_experts",
    "target_layers",
    "unstack_as",
    "unstack_experts",
    "unstacked_experts",
    "weight_of",
]

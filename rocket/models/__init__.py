"""All that knows transformers: load a model, make its inputs, find its blocks and the layers to compress."""

from rocket.models.auto import auto_class, open_model, open_processor
from rocket.models.inputs import (
    Batch,
    first_batches,
    forward_arguments,
    is_causal_lm,
    is_encoder_decoder,
    labels_of,
    run_forward,
    sample_batches,
    takes_media,
    takes_text_alone,
    token_batches,
    without_cache,
)
from rocket.models.linear import LinearLayer, features_of, is_linear, make_linear, weight_of
from rocket.models.load import identify_model, load_model, open_checkpoint, refuse_quantized, resolve_device
from rocket.models.mode import evaluation_mode
from rocket.models.structure import block_of, find_blocks, target_layers

__all__ = [
    "Batch",
    "LinearLayer",
    "auto_class",
    "block_of",
    "evaluation_mode",
    "features_of",
    "find_blocks",
    "first_batches",
    "forward_arguments",
    "identify_model",
    "is_causal_lm",
    "is_encoder_decoder",
    "is_linear",
    "labels_of",
    "load_model",
    "make_linear",
    "open_checkpoint",
    "open_model",
    "open_processor",
    "refuse_quantized",
    "resolve_device",
    "run_forward",
    "sample_batches",
    "takes_media",
    "takes_text_alone",
    "target_layers",
    "token_batches",
    "weight_of",
    "without_cache",
]

"""All that knows transformers: load a model, make its inputs, find its blocks and the layers to compress."""

from rocket.models.auto import auto_class, empty_model, open_model, open_processor
from rocket.models.expert_linears import ExpertLinears
from rocket.models.experts import (
    expert_layouts,
    restack_experts,
    stacked_experts,
    unstack_as,
    unstack_experts,
    unstacked_experts,
)
from rocket.models.inputs import (
    Batch,
    first_batches,
    forward_arguments,
    is_causal_lm,
    is_encoder_decoder,
    label_scores,
    labels_of,
    most_positions,
    run_forward,
    takes_media,
    takes_text_alone,
    token_batches,
    without_cache,
)
from rocket.models.linear import LinearLayer, features_of, is_linear, make_linear, weight_of
from rocket.models.load import (
    identify_model,
    load_model,
    open_checkpoint,
    refuse_offloaded,
    refuse_quantized,
    resolve_device,
)
from rocket.models.mode import evaluation_mode
from rocket.models.processor import sample_batches
from rocket.models.residence import hold, is_streamed, release_pages, releasing, stream
from rocket.models.rewriting import rewrite, unlike_model
from rocket.models.stored import Endings, StoredTensor, check_counts, check_places, check_size, read_headers
from rocket.models.structure import block_of, find_blocks, remedy_of_nan, target_layers
from rocket.models.sweep import Call, sweep

__all__ = [
    "Batch",
    "Call",
    "Endings",
    "ExpertLinears",
    "LinearLayer",
    "StoredTensor",
    "auto_class",
    "block_of",
    "check_counts",
    "check_places",
    "check_size",
    "empty_model",
    "evaluation_mode",
    "expert_layouts",
    "features_of",
    "find_blocks",
    "first_batches",
    "forward_arguments",
    "hold",
    "identify_model",
    "is_causal_lm",
    "is_encoder_decoder",
    "is_linear",
    "is_streamed",
    "label_scores",
    "labels_of",
    "load_model",
    "make_linear",
    "most_positions",
    "open_checkpoint",
    "open_model",
    "open_processor",
    "read_headers",
    "refuse_offloaded",
    "refuse_quantized",
    "release_pages",
    "releasing",
    "remedy_of_nan",
    "resolve_device",
    "restack_experts",
    "rewrite",
    "run_forward",
    "sample_batches",
    "stacked_experts",
    "stream",
    "sweep",
    "takes_media",
    "takes_text_alone",
    "target_layers",
    "token_batches",
    "unlike_model",
    "unstack_as",
    "unstack_experts",
    "unstacked_experts",
    "weight_of",
    "without_cache",
]

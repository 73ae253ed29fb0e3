"""Models that are no text decoders, tiny and random, through everything: plan, compress, save, reopen, recount.

Which Auto class opens a model, what its loss is, and where its layers lie are found by rocket; the grid tells only how
to build a family and a batch of its inputs.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig

import rocket
from rocket.compression import save_checkpoint, stored_values
from rocket.config.schema import CalibConfig, ProfilingConfig
from rocket.forms import FORMS
from rocket.models import auto_class, forward_arguments, run_forward, target_layers, unstacked_experts

VOCABULARY, WIDTH, LENGTH = 97, 32, 16
CALIB = CalibConfig(num_samples=16, batch_size=4, sensitivity_samples=8)
PROFILING = ProfilingConfig(
    forms=list(FORMS),
    removed_ratios=[0.1, 0.3, 0.5, 0.7],
    rank_support_ratios=[1.0, 2.0],
)
IMAGE_TOKEN = 5

TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 72,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
VISION = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 72,
    "image_size": 32,
    "patch_size": 8,
}
LLAMA = {"model_type": "llama", **TEXT, "num_key_value_heads": 2}


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tokens(seed: int, length: int = LENGTH) -> torch.Tensor:
    return torch.randint(10, VOCABULARY, (4, length), generator=torch.Generator().manual_seed(seed))


def padded(seed: int) -> dict[str, torch.Tensor]:
    ids = tokens(seed)
    mask = torch.ones_like(ids)
    mask[1, 10:] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 1), "attention_mask": mask}


def written(seed: int) -> dict[str, torch.Tensor]:
    labels = tokens(seed + 100, 9)
    labels[2, 5:] = -100
    return {**padded(seed), "labels": labels}


def images(seed: int) -> dict[str, torch.Tensor]:
    return {"pixel_values": normal(4, 3, 32, 32, seed=seed)}


def pairs(seed: int) -> dict[str, torch.Tensor]:
    return {**padded(seed), **images(seed)}


def heard(seed: int) -> dict[str, torch.Tensor]:
    return {"input_features": normal(4, 8, 64, seed=seed), "labels": written(seed)["labels"]}


def waves(seed: int) -> dict[str, torch.Tensor]:
    mask = torch.ones(4, 1200, dtype=torch.int64)
    mask[1, 700:] = 0
    return {"input_values": normal(4, 1200, seed=seed), "attention_mask": mask}


def placed(seed: int, count: int) -> dict[str, torch.Tensor]:
    """Token ids with the placeholders of one image each."""
    batch = padded(seed)
    batch["input_ids"][:, 1 : 1 + count] = IMAGE_TOKEN
    return batch


def llava(seed: int) -> dict[str, torch.Tensor]:
    ids = torch.cat([torch.full((4, 16), IMAGE_TOKEN), tokens(seed)], dim=1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **images(seed)}


def idefics(seed: int) -> dict[str, torch.Tensor]:
    return {**placed(seed, 4), "pixel_values": normal(4, 1, 3, 32, 32, seed=seed)}


def qwen_vl(seed: int) -> dict[str, torch.Tensor]:
    batch = placed(seed, 6)
    batch["input_ids"][:, 1], batch["input_ids"][:, 6] = 6, 7
    grid = torch.tensor([[1, 4, 4]]).expand(4, 3)
    patches = normal(4 * 16, 3 * 2 * 8 * 8, seed=seed)
    kinds = (batch["input_ids"] == IMAGE_TOKEN).int()
    return {**batch, "pixel_values": patches, "image_grid_thw": grid, "mm_token_type_ids": kinds}


@dataclass(frozen=True)
class Family:
    """A class of transformers, its config, and a batch of what it reads."""

    architecture: str
    batch: Callable[[int], dict[str, torch.Tensor]]
    config: dict[str, Any] = field(default_factory=dict)
    auto: str = "AutoModel"


QWEN_VISION = {
    "depth": 2,
    "embed_dim": WIDTH,
    "hidden_size": WIDTH,
    "num_heads": 4,
    "patch_size": 8,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
QWEN_TEXT = {**LLAMA, "rope_scaling": {"type": "mrope", "rope_type": "default", "mrope_section": [1, 1, 2]}}
QWEN_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8}
QWEN_IDS = {"image_token_id": IMAGE_TOKEN, "vision_start_token_id": 6, "vision_end_token_id": 7, "video_token_id": 8}
BART = {
    "vocab_size": VOCABULARY,
    "d_model": WIDTH,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 72,
    "decoder_ffn_dim": 72,
}
T5 = {
    "vocab_size": VOCABULARY,
    "d_model": WIDTH,
    "d_kv": 8,
    "d_ff": 72,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
WHISPER = {
    **BART,
    "num_mel_bins": 8,
    "max_source_positions": 32,
    "max_target_positions": 32,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 3,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}
WAV2VEC2 = {
    "vocab_size": 20,
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 72,
    "conv_dim": (16, 16, 16),
    "conv_kernel": (10, 3, 3),
    "conv_stride": (5, 2, 2),
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
    "num_feat_extract_layers": 3,
}
TOWERS = {"text_config": TEXT, "vision_config": VISION}
IDEFICS = {
    "text_config": LLAMA,
    "vision_config": VISION,
    "scale_factor": 2,
    "image_token_id": IMAGE_TOKEN,
    "pad_token_id": 1,
}
QWEN25 = {
    "depth": 2,
    "out_hidden_size": WIDTH,
    "intermediate_size": 72,
    "fullatt_block_indexes": [1],
    "window_size": 32,
}
QWEN25_VISION = {**{key: value for key, value in QWEN_VISION.items() if key != "embed_dim"}, **QWEN25}
QWEN3_VISION = {
    **{key: value for key, value in QWEN_VISION.items() if key != "embed_dim"},
    "out_hidden_size": WIDTH,
    "intermediate_size": 72,
    "num_position_embeddings": 64,
    "deepstack_visual_indexes": [0],
}
FAMILIES = {
    "bert": Family("BertForMaskedLM", padded, TEXT, "AutoModelForMaskedLM"),
    "bert bare": Family("BertModel", padded, TEXT),
    "bert classifier": Family(
        "BertForSequenceClassification", padded, {**TEXT, "num_labels": 3}, "AutoModelForSequenceClassification"
    ),
    "roberta": Family("RobertaForMaskedLM", padded, TEXT, "AutoModelForMaskedLM"),
    "distilbert": Family(
        "DistilBertForMaskedLM",
        padded,
        {"vocab_size": VOCABULARY, "dim": WIDTH, "n_layers": 2, "n_heads": 4, "hidden_dim": 72},
        "AutoModelForMaskedLM",
    ),
    "electra": Family("ElectraForMaskedLM", padded, {**TEXT, "embedding_size": 16}, "AutoModelForMaskedLM"),
    "deberta-v2": Family("DebertaV2ForMaskedLM", padded, {**TEXT, "relative_attention": True}, "AutoModelForMaskedLM"),
    "t5": Family("T5ForConditionalGeneration", written, T5, "AutoModelForSeq2SeqLM"),
    "t5 gated": Family(
        "T5ForConditionalGeneration", written, {**T5, "feed_forward_proj": "gated-gelu"}, "AutoModelForSeq2SeqLM"
    ),
    "t5 encoder": Family("T5EncoderModel", padded, T5, "AutoModelForTextEncoding"),
    "bart": Family("BartForConditionalGeneration", written, BART, "AutoModelForSeq2SeqLM"),
    "whisper": Family("WhisperForConditionalGeneration", heard, WHISPER, "AutoModelForSpeechSeq2Seq"),
    "wav2vec2": Family("Wav2Vec2ForCTC", waves, WAV2VEC2, "AutoModelForCTC"),
    "wav2vec2 layer norm": Family(
        "Wav2Vec2ForCTC",
        waves,
        {**WAV2VEC2, "feat_extract_norm": "layer", "do_stable_layer_norm": True},
        "AutoModelForCTC",
    ),
    "vit": Family("ViTForImageClassification", images, {**VISION, "num_labels": 5}, "AutoModelForImageClassification"),
    "dinov2": Family("Dinov2Model", images, VISION),
    "clip": Family("CLIPModel", pairs, {**TOWERS, "projection_dim": 16}),
    "siglip": Family("SiglipModel", pairs, TOWERS),
    "llava": Family(
        "LlavaForConditionalGeneration",
        llava,
        {
            "text_config": LLAMA,
            "vision_config": {"model_type": "clip_vision_model", **VISION},
            "image_token_index": IMAGE_TOKEN,
        },
        "AutoModelForImageTextToText",
    ),
    "qwen2-vl": Family(
        "Qwen2VLForConditionalGeneration",
        qwen_vl,
        {"text_config": QWEN_TEXT, "vision_config": {**QWEN_VISION, "mlp_ratio": 2}, **QWEN_IDS},
        "AutoModelForImageTextToText",
    ),
    "qwen2.5-vl": Family(
        "Qwen2_5_VLForConditionalGeneration",
        qwen_vl,
        {"text_config": QWEN_TEXT, "vision_config": QWEN25_VISION, **QWEN_IDS},
        "AutoModelForImageTextToText",
    ),
    "qwen3-vl-moe": Family(
        "Qwen3VLMoeForConditionalGeneration",
        qwen_vl,
        {"text_config": {**QWEN_TEXT, **QWEN_EXPERTS}, "vision_config": QWEN3_VISION, **QWEN_IDS},
        "AutoModelForImageTextToText",
    ),
    "idefics3": Family("Idefics3ForConditionalGeneration", idefics, IDEFICS, "AutoModelForImageTextToText"),
    "smolvlm": Family("SmolVLMForConditionalGeneration", idefics, IDEFICS, "AutoModelForImageTextToText"),
}


def build(family: Family) -> Any:
    architecture = getattr(transformers, family.architecture, None)
    if architecture is None:
        pytest.skip(f"transformers {transformers.__version__} has no {family.architecture}")
    torch.manual_seed(0)
    config = dict(family.config)
    if "text_config" in config and architecture.config_class.__name__.startswith("Qwen"):
        config["text_config"] = {key: value for key, value in config["text_config"].items() if key != "model_type"}
    return architecture(architecture.config_class(**config)).eval()


def outputs(model: Any, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    with torch.no_grad():
        output = run_forward(model, batch)
    return [value for value in output.to_tuple() if isinstance(value, torch.Tensor)]


@pytest.mark.parametrize("name", FAMILIES)
def test_family(aligned, name, tmp_path):
    family = FAMILIES[name]
    model = build(family)
    batches = [family.batch(seed) for seed in range(4)]
    plan = rocket.plan(model, batches, calib=CALIB, profiling=PROFILING).at(removed_ratio=0.3)
    assert plan.kept_target_parameters <= 0.7 * plan.size.target_parameters
    # every layer inside blocks is reached, by tokens and by gradients; LLaVA reads the last hidden states but one
    unread = ".encoder.layers.1." if name == "llava" else "none"
    with unstacked_experts(model):
        assert list(plan.choices) == [layer for layer in target_layers(model) if unread not in layer]
    small = rocket.compress(model, plan)
    save_checkpoint(small, None, tmp_path)
    assert stored_values(tmp_path, plan.choices) == plan.kept_target_parameters

    auto = auto_class(AutoConfig.from_pretrained(tmp_path))
    assert auto.__name__ == family.auto
    again = aligned(auto.from_pretrained(tmp_path))
    assert type(again) is type(model)
    batch = family.batch(10)
    expected = outputs(small, batch)
    assert all(torch.equal(*both) for both in zip(outputs(again, batch), expected, strict=True))
    assert not all(torch.equal(*both) for both in zip(outputs(model, batch), expected, strict=True))
    if model.can_generate():
        taken = forward_arguments(model) - {"labels", "pixel_values"}
        asked = {key: value[:1] for key, value in batch.items() if key in taken}
        if "pixel_values" in batch:
            asked["pixel_values"] = batch["pixel_values"][: len(batch["pixel_values"]) // 4]
        options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
        generated = again.generate(**asked, **options)
        assert torch.equal(small.generate(**asked, **options), generated)
    again.optimize()
    for value, wanted in zip(outputs(again, batch), expected, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-3, atol=1e-4)

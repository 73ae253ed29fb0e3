"""`embedded:whisper-tiny.en`: OpenAI's Whisper tiny.en, which a package ships in half precision for CTranslate2."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizerFast,
)

from rocket.config.errors import RocketError
from rocket.models.ctranslate2 import read_tensors


def load(file: Path, dtype: torch.dtype) -> tuple[WhisperForConditionalGeneration, WhisperProcessor]:
    """The model of a CTranslate2 ``model.bin``, in evaluation mode and of this type, and its processor.

    Any English Whisper model will do; its config.json and tokenizer.json lie beside it. Raises RocketError if damaged.
    """
    folder = file.parent
    tensors = read_tensors(file)
    settings = json.loads((folder / "config.json").read_text())
    tokenizer = WhisperTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    try:
        config = _config(tensors, _special_tokens(tokenizer))
        weights = dict(_weights(tensors, config))
    except KeyError as error:
        raise RocketError(f"{file}: no Whisper model, it has no tensor {error}") from None
    with torch.device("meta"):
        model = WhisperForConditionalGeneration(config)
    # Copied, because weights that share memory, as parts of one matrix do, are not saved.
    model.load_state_dict({name: weight.to(dtype, copy=True) for name, weight in weights.items()}, assign=True)
    model.tie_weights()
    model.generation_config = _generation_config(config, tokenizer, settings)
    features = WhisperFeatureExtractor(feature_size=config.num_mel_bins)
    return model.eval(), WhisperProcessor(features, tokenizer)


def _special_tokens(tokenizer: Any) -> dict[str, int]:
    """As in OpenAI's own configuration of the English models."""
    start, end = tokenizer.convert_tokens_to_ids(["<|startoftranscript|>", "<|endoftext|>"])
    return {"bos_token_id": start, "decoder_start_token_id": start, "eos_token_id": end, "pad_token_id": end}


def _config(tensors: Mapping[str, Tensor], special_tokens: Mapping[str, int]) -> WhisperConfig:
    """The architecture, read off the shapes of the tensors."""
    vocabulary, width = tensors["decoder/embeddings/weight"].shape
    return WhisperConfig(
        vocab_size=vocabulary,
        d_model=width,
        num_mel_bins=tensors["encoder/conv1/weight"].shape[1],
        **{
            f"{part}_{key}": value
            for part in ("encoder", "decoder")
            for key, value in {
                "layers": _layers(tensors, part),
                "attention_heads": int(tensors[f"{part}/num_heads"]),
                "ffn_dim": len(tensors[f"{part}/layer_0/ffn/linear_0/weight"]),
            }.items()
        },
        max_source_positions=len(tensors["encoder/position_encodings/encodings"]),
        max_target_positions=len(tensors["decoder/position_encodings/encodings"]),
        **special_tokens,
    )


def _layers(tensors: Mapping[str, Tensor], part: str) -> int:
    return len({name.split("/")[1] for name in tensors if name.startswith(f"{part}/layer_") and name.count("/") > 2})


def _generation_config(config: WhisperConfig, tokenizer: Any, settings: Mapping[str, Any]) -> GenerationConfig:
    """Transcripts without time stamps; the tokens that OpenAI's decoder suppresses."""
    without_timestamps, previous_start = tokenizer.convert_tokens_to_ids(["<|notimestamps|>", "<|startofprev|>"])
    return GenerationConfig(
        **{name: getattr(config, name) for name in _special_tokens(tokenizer)},
        max_length=config.max_target_positions,
        is_multilingual=False,
        return_timestamps=False,
        no_timestamps_token_id=without_timestamps,
        prev_sot_token_id=previous_start,
        suppress_tokens=settings["suppress_ids"],
        begin_suppress_tokens=settings["suppress_ids_begin"],
        alignment_heads=settings["alignment_heads"],
    )


def _weights(tensors: Mapping[str, Tensor], config: WhisperConfig) -> Iterator[tuple[str, Tensor]]:
    """Every parameter by its name in transformers."""
    for part, layers in (("encoder", config.encoder_layers), ("decoder", config.decoder_layers)):
        yield f"model.{part}.embed_positions.weight", tensors[f"{part}/position_encodings/encodings"]
        yield from _norm(tensors, f"model.{part}.layer_norm", f"{part}/layer_norm")
        for index in range(layers):
            yield from _layer(tensors, f"model.{part}.layers.{index}", f"{part}/layer_{index}", part == "decoder")
    for convolution in ("conv1", "conv2"):
        yield from _affine(tensors, f"model.encoder.{convolution}", f"encoder/{convolution}")
    embedding = tensors["decoder/embeddings/weight"]
    yield "model.decoder.embed_tokens.weight", embedding
    yield "proj_out.weight", embedding


def _layer(
    tensors: Mapping[str, Tensor], target: str, source: str, cross_attention: bool
) -> Iterator[tuple[str, Tensor]]:
    yield from _norm(tensors, f"{target}.self_attn_layer_norm", f"{source}/self_attention/layer_norm")
    yield from _stacked(tensors, f"{target}.self_attn", f"{source}/self_attention/linear_0", "qkv")
    yield from _affine(tensors, f"{target}.self_attn.out_proj", f"{source}/self_attention/linear_1")
    if cross_attention:
        yield from _norm(tensors, f"{target}.encoder_attn_layer_norm", f"{source}/attention/layer_norm")
        yield from _stacked(tensors, f"{target}.encoder_attn", f"{source}/attention/linear_0", "q")
        yield from _stacked(tensors, f"{target}.encoder_attn", f"{source}/attention/linear_1", "kv")
        yield from _affine(tensors, f"{target}.encoder_attn.out_proj", f"{source}/attention/linear_2")
    yield from _norm(tensors, f"{target}.final_layer_norm", f"{source}/ffn/layer_norm")
    yield from _affine(tensors, f"{target}.fc1", f"{source}/ffn/linear_0")
    yield from _affine(tensors, f"{target}.fc2", f"{source}/ffn/linear_1")


def _affine(tensors: Mapping[str, Tensor], target: str, source: str) -> Iterator[tuple[str, Tensor]]:
    yield f"{target}.weight", tensors[f"{source}/weight"]
    yield f"{target}.bias", tensors[f"{source}/bias"]


def _norm(tensors: Mapping[str, Tensor], target: str, source: str) -> Iterator[tuple[str, Tensor]]:
    yield f"{target}.weight", tensors[f"{source}/gamma"]
    yield f"{target}.bias", tensors[f"{source}/beta"]


def _stacked(tensors: Mapping[str, Tensor], target: str, source: str, parts: str) -> Iterator[tuple[str, Tensor]]:
    """The projections that CTranslate2 keeps in one matrix; Whisper's keys have no bias, stored as zeros."""
    weights = tensors[f"{source}/weight"].chunk(len(parts))
    biases = tensors[f"{source}/bias"].chunk(len(parts))
    for part, weight, bias in zip(parts, weights, biases, strict=True):
        yield f"{target}.{part}_proj.weight", weight
        if part != "k":
            yield f"{target}.{part}_proj.bias", bias

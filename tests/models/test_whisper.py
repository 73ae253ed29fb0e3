"""Whisper from its package: a tiny handmade one for the key map, the real one for what it hears."""

import json
import struct
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor, WhisperConfig, WhisperForConditionalGeneration

from rocket.config.errors import RocketError
from rocket.config.schema import ModelConfig
from rocket.data.sources import speech
from rocket.evaluation.wer import transcribe
from rocket.models import load_model, whisper

from .test_ctranslate2 import file, tensor

PARTS = {"self_attn": "self_attention", "encoder_attn": "attention"}


def tiny_whisper() -> WhisperForConditionalGeneration:
    torch.manual_seed(0)
    sizes = {f"{part}_{key}": size for part in ("encoder", "decoder") for key, size in (("layers", 2), ("ffn_dim", 12))}
    config = WhisperConfig(
        vocab_size=40,
        d_model=8,
        num_mel_bins=5,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        max_source_positions=10,
        max_target_positions=6,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
        decoder_start_token_id=0,
        **sizes,
    )
    model = WhisperForConditionalGeneration(config).half()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model


def half(text: str, values: torch.Tensor) -> bytes:
    return tensor(text, tuple(values.shape), 4, values.detach().half().numpy().tobytes())


def as_ctranslate2(model: WhisperForConditionalGeneration) -> list[bytes]:
    """The same weights, named and stacked as CTranslate2 does."""
    weights = {name.removeprefix("model."): value.detach() for name, value in model.state_dict().items()}
    written = []
    for part in ("encoder", "decoder"):
        written.append(tensor(f"{part}/num_heads", (), 2, struct.pack("<h", 2)))
        written.append(half(f"{part}/position_encodings/encodings", weights[f"{part}.embed_positions.weight"]))
        norms = {f"{part}.layer_norm": f"{part}/layer_norm"}
        linears = {}
        for index in range(2):
            layer, target = f"{part}.layers.{index}", f"{part}/layer_{index}"
            norms[f"{layer}.final_layer_norm"] = f"{target}/ffn/layer_norm"
            linears |= {f"{layer}.fc1": f"{target}/ffn/linear_0", f"{layer}.fc2": f"{target}/ffn/linear_1"}
            for attention in ("self_attn", "encoder_attn")[: 1 if part == "encoder" else 2]:
                there = f"{target}/{PARTS[attention]}"
                norms[f"{layer}.{attention}_layer_norm"] = f"{there}/layer_norm"
                stacks = ("qkv", "") if attention == "self_attn" else ("q", "kv")
                for number, stack in enumerate(filter(None, stacks)):
                    names = [f"{layer}.{attention}.{projection}_proj" for projection in stack]
                    written.append(
                        half(f"{there}/linear_{number}/weight", torch.cat([weights[f"{n}.weight"] for n in names]))
                    )
                    biases = [weights.get(f"{n}.bias", torch.zeros(8)) for n in names]
                    written.append(half(f"{there}/linear_{number}/bias", torch.cat(biases)))
                last = len([stack for stack in stacks if stack])
                linears[f"{layer}.{attention}.out_proj"] = f"{there}/linear_{last}"
        for source, there in linears.items():
            written += [half(f"{there}/{kind}", weights[f"{source}.{kind}"]) for kind in ("weight", "bias")]
        for source, there in norms.items():
            kinds = (("gamma", "weight"), ("beta", "bias"))
            written += [half(f"{there}/{kind}", weights[f"{source}.{name}"]) for kind, name in kinds]
    for convolution in ("conv1", "conv2"):
        for kind in ("weight", "bias"):
            written.append(half(f"encoder/{convolution}/{kind}", weights[f"encoder.{convolution}.{kind}"]))
    return [*written, half("decoder/embeddings/weight", weights["decoder.embed_tokens.weight"])]


def write_folder(folder: Path, tensors: list[bytes]) -> Path:
    (folder / "model.bin").write_bytes(file(*tensors))
    settings = {"suppress_ids": [1, 2], "suppress_ids_begin": [3], "alignment_heads": [[1, 0]]}
    (folder / "config.json").write_text(json.dumps(settings))
    special = ["<|endoftext|>", "<|startoftranscript|>", "<|startofprev|>", "<|notimestamps|>"]
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_every_weight_finds_its_place(tmp_path):
    expected = tiny_whisper()
    model, processor = whisper.load(write_folder(tmp_path, as_ctranslate2(expected)) / "model.bin", torch.float16)
    actual = model.state_dict()
    assert actual.keys() == expected.state_dict().keys()
    assert all(torch.equal(actual[name], value) for name, value in expected.state_dict().items())
    assert model.proj_out.weight is model.model.decoder.embed_tokens.weight
    assert not model.training
    model.save_pretrained(tmp_path / "saved")
    again = WhisperForConditionalGeneration.from_pretrained(tmp_path / "saved", dtype=torch.float16).state_dict()
    assert all(torch.equal(again[name], value) for name, value in expected.state_dict().items())
    sizes = ("vocab_size", "d_model", "num_mel_bins", "encoder_ffn_dim", "decoder_layers", "max_target_positions")
    assert [getattr(model.config, size) for size in sizes] == [40, 8, 5, 12, 2, 6]
    assert processor.feature_extractor.feature_size == 5
    assert model.generation_config.no_timestamps_token_id == processor.tokenizer.convert_tokens_to_ids(
        "<|notimestamps|>"
    )


def test_tensor_is_missing(tmp_path):
    tensors = as_ctranslate2(tiny_whisper())
    with pytest.raises(RocketError, match=r"no Whisper model, it has no tensor 'decoder/embeddings/weight'"):
        whisper.load(write_folder(tmp_path, tensors[:-1]) / "model.bin", torch.float32)


@pytest.fixture(scope="module")
def real():
    try:
        clips = list(speech.read_pocketsphinx(speech.SHARE))
        return *load_model(ModelConfig(path="embedded:whisper-tiny.en", dtype="float32", device="cpu")), clips
    except RocketError as missing:
        pytest.skip(str(missing))


def test_real_model_hears_real_speech(real, tmp_path):
    """And hears the same after it was saved and opened again."""
    model, processor, clips = real
    assert sum(parameter.numel() for parameter in model.parameters()) == 37_760_256
    assert processor.tokenizer("hello world").input_ids == [50257, 50362, 31373, 995, 50256]
    with torch.no_grad():
        heard = transcribe(model, processor, [clips[0].audio])
    sentence = "And Mr. John Dashwood had then leisure to consider how much there might be prudently in his power"
    assert heard == [f" {sentence} to do for them."]
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert transcribe(again, AutoProcessor.from_pretrained(tmp_path), [clips[0].audio]) == heard


def test_bfloat16(real):
    _, _, clips = real
    model, processor = load_model(ModelConfig(path="embedded:whisper-tiny.en", device="cpu"))
    assert model.dtype == torch.bfloat16
    with torch.no_grad():
        assert transcribe(model, processor, [clips[3].audio])[0].startswith(" Had he married a more amiable woman")

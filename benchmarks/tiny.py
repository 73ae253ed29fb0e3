"""A random Llama so small that the whole pipeline takes seconds, with a tokenizer, a text and the config of a run."""

from __future__ import annotations

import random
from pathlib import Path

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

WORDS = ("the", "a", "river", "winds", "past", "old", "stone", "houses", "while", "nobody", "watches", "cold", "rain")


def make_model(layers: int = 1, hidden: int = 16, intermediate_size: int | None = None) -> PreTrainedModel:
    """A Llama with this many blocks, in float32."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=257,
        hidden_size=hidden,
        intermediate_size=intermediate_size or 2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<eos>": 0} | {letter: number for number, letter in enumerate(alphabet, start=1)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")


def write_run(directory: Path, layers: int = 1, hidden: int = 16, **sections: dict[str, object]) -> Path:
    """Save model, tokenizer and text into a folder, and the config of a run beside them, whose path is returned."""
    make_model(layers, hidden).save_pretrained(directory / "model")
    make_tokenizer().save_pretrained(directory / "model")
    words = random.Random(0)
    text = directory / "texts.txt"
    text.write_text("\n\n".join(" ".join(words.choices(WORDS, k=30)) for _ in range(60)))
    config: dict[str, object] = {
        "output_dir": str(directory / "run"),
        "model": {"path": str(directory / "model"), "dtype": "float32", "device": "cpu"},
        "calib": {"source": str(text), "num_samples": 8, "seq_len": 32, "batch_size": 4, "sensitivity_samples": 4},
        "profiling": {"removed_ratios": [0.3, 0.6], "rank_support_ratios": [1.5, 2.0]},
        "compression": {"removed_ratio": 0.3},
        "evaluation": {"texts": [str(text)], "seq_len": 32, "max_tokens": 64},
    }
    path = directory / "config.yaml"
    path.write_text(yaml.safe_dump({**config, **sections}))
    return path

"""Which class opens a config."""

import pytest
from transformers import AutoConfig

from rocket.models import auto_class


@pytest.mark.parametrize(
    ("kind", "architecture", "expected"),
    [
        ("llama", "LlamaForCausalLM", "AutoModelForCausalLM"),
        ("llama", "LlamaForSequenceClassification", "AutoModelForSequenceClassification"),
        ("llama", "LlamaModel", "AutoModel"),
        ("llama", None, "AutoModelForCausalLM"),
        ("llama", "SomebodysLlama", "AutoModelForCausalLM"),
        ("t5", "T5WithLMHeadModel", "AutoModelForSeq2SeqLM"),
        ("bart", "BartForConditionalGeneration", "AutoModelForSeq2SeqLM"),
        ("bert", "BertForMaskedLM", "AutoModelForMaskedLM"),
        ("bert", "BertLMHeadModel", "AutoModelForCausalLM"),
        ("gemma3", "Gemma3ForConditionalGeneration", "AutoModelForCausalLM"),
        ("clip_text_model", "CLIPTextModelWithProjection", "CLIPTextModelWithProjection"),
        ("vit", None, "AutoModel"),
    ],
)
def test_class_of_a_config(kind, architecture, expected):
    config = AutoConfig.for_model(kind)
    config.architectures = [architecture] if architecture else None
    assert auto_class(config).__name__ == expected


def test_class_of_code_that_a_checkpoint_brings():
    config = AutoConfig.for_model("llama")
    config.architectures = ["MineForMaskedLM"]
    config.auto_map = {"AutoConfig": "mine.MineConfig", "AutoModelForMaskedLM": "mine.MineForMaskedLM"}
    assert auto_class(config).__name__ == "AutoModelForMaskedLM"

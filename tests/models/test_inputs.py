"""From windows to what a model's forward takes, and what it learns from."""

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    BartForSequenceClassification,
    BartModel,
    LlamaConfig,
    LlamaForSequenceClassification,
    ViTConfig,
    ViTModel,
)

from rocket.config.errors import RocketError
from rocket.models import (
    first_batches,
    labels_of,
    most_positions,
    run_forward,
    token_batches,
    without_cache,
)
from rocket.models.inputs import without_padding

WIDTHS = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 40}
LAYERS = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
BART = {"vocab_size": 260, "d_model": 32, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40, **LAYERS}


def test_windows_of_text(make_model, token_ids):
    (first, second) = token_batches(make_model("llama"), token_ids, 10)
    assert first.keys() == {"input_ids"}
    assert torch.equal(torch.cat([first["input_ids"], second["input_ids"]]), token_ids)


def test_windows_are_halved_for_an_encoder_decoder(token_ids):
    model = BartForConditionalGeneration(BartConfig(**BART))
    (batch,) = token_batches(model, token_ids, 16)
    assert torch.equal(torch.cat([batch["input_ids"], batch["labels"]], dim=1), token_ids)
    assert run_forward(model, batch).logits.shape == (16, 16, 260)


def test_windows_are_halved_for_an_encoder_decoder_without_a_head(token_ids):
    model = BartModel(BartConfig(**BART))
    (batch,) = token_batches(model, token_ids, 16)
    assert batch.keys() == {"input_ids", "decoder_input_ids"}
    assert run_forward(model, batch).last_hidden_state.shape == (16, 16, 32)


def test_windows_are_no_texts_to_classify(token_ids):
    model = BartForSequenceClassification(BartConfig(**BART))
    with pytest.raises(RocketError, match="BartForSequenceClassification generates no text from text; give rocket"):
        token_batches(model, token_ids, 16)
    batch = {"input_ids": torch.tensor([[5, 6, 2], [7, 8, 2]]), "labels": torch.tensor([0, 1])}
    assert run_forward(model, batch).logits.shape == (2, 3)


def test_a_decoder_that_classifies_needs_no_padding_token(token_ids):
    model = LlamaForSequenceClassification(
        LlamaConfig(**WIDTHS, vocab_size=260, bos_token_id=0, eos_token_id=0, num_labels=3)
    )
    (batch,) = token_batches(model, token_ids.clamp(min=1), 16)
    logits = run_forward(model, batch).logits
    assert model.config.pad_token_id is None
    model.config.pad_token_id = 0
    assert torch.equal(model(**batch).logits, logits)
    model.config.pad_token_id = model.config.eos_token_id = None
    assert torch.equal(run_forward(model, batch).logits, logits)
    assert model.config.pad_token_id is None


def test_parting_a_padded_batch(make_model):
    model, mask = make_model("llama"), torch.tensor([[0, 1, 1], [1, 1, 1], [0, 0, 0]])
    ids = torch.arange(9).view(3, 3)
    batch = {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": torch.tensor([5, 6, 7]),
        "position_ids": torch.arange(3)[None],
        "planes": torch.stack([ids, ids + 9]),
        "use_cache": False,
    }
    first, second = without_padding(model, batch)
    assert first["input_ids"].tolist() == [[1, 2]]
    assert first["position_ids"].tolist() == [[1, 2]]
    assert first["planes"].tolist() == [[[1, 2]], [[10, 11]]]
    assert (first["labels"].tolist(), first["use_cache"]) == ([5], False)
    assert second["input_ids"].tolist() == [[3, 4, 5]]
    pieces = {**batch, "pixel_values": torch.zeros(12, 4)}  # of which text, it does not tell
    assert without_padding(model, pieces) == [pieces]
    whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    assert without_padding(model, whole) == [whole]


def test_labels_of_a_batch(make_model, token_ids):
    model = make_model("llama")
    assert torch.equal(labels_of(model, {"input_ids": token_ids}), token_ids)
    assert (
        labels_of(
            ViTModel(ViTConfig(**WIDTHS, image_size=16, patch_size=8)), {"pixel_values": torch.zeros(1, 3, 16, 16)}
        )
        is None
    )
    given = token_ids.clone()
    assert labels_of(model, {"input_ids": token_ids, "labels": given}) is given


def test_first_batches():
    batches = [{"input_ids": torch.zeros(3, 4)} for _ in range(4)]
    assert [len(first_batches(batches, count)) for count in (1, 3, 4, 100, None)] == [1, 1, 2, 4, 4]
    images = [{"output_hidden_states": True, "pixel_values": torch.zeros(3, 4)}] * 2
    assert len(first_batches(images, 3)) == 1


def test_what_is_no_tensor_is_passed_on(make_model, token_ids):
    output = run_forward(make_model("llama"), {"input_ids": token_ids, "output_hidden_states": True})
    assert len(output.hidden_states) == 3


def test_caches_are_off_for_a_while(make_model):
    model: AutoModelForCausalLM = make_model("llama")
    assert model.config.use_cache
    with without_cache(model):
        assert not model.config.use_cache
    assert model.config.use_cache


@pytest.mark.parametrize(("family", "count"), [("llama", 32), ("roberta", 30)])
def test_positions_that_a_text_may_have(family, count):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = AutoConfig.for_model(family, **sizes, vocab_size=61, max_position_embeddings=32, pad_token_id=1)
    model = AutoModel.from_config(config).eval()
    assert most_positions(model) == count
    model(torch.full((1, count), 5))

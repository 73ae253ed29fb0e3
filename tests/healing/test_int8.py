"""Healing of layers whose values are int8: trained as what they stand for, and int8 again afterwards."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rocket.config.schema import HealingConfig
from rocket.healing import heal
from rocket.healing.parameters import choose_parameters, settle_parameters

KINDS = ["dense int8", "sparse int8", "dictionary int8", "low_rank int8", "sparse"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("train", ["values", "dictionary", "lora"])
def test_untrained_they_are_what_they_were(make_compressed, token_ids, dtype, train):
    model = make_compressed(*KINDS, dtype=dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        expected = model(input_ids=token_ids).logits
    chosen = choose_parameters(model, HealingConfig(minutes=1, train=train))
    trained = {"values": {"weight", "dictionary"}, "dictionary": {"dictionary"}, "lora": {"down", "up"}}[train]
    assert {name.rpartition(".")[2] for name in chosen} == trained
    assert all(parameter.requires_grad == (name in chosen) for name, parameter in model.named_parameters())
    settle_parameters(model, dtype)
    after = model.state_dict()
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in after.items()} == {
        name: (tensor.shape, tensor.dtype) for name, tensor in before.items()
    }
    with torch.no_grad():
        found = model(input_ids=token_ids).logits
    assert (found - expected).norm() < 0.01 * expected.norm()


def test_healed_from_checkpoint_to_checkpoint(pair, make_compressed, tmp_path, byte_tokenizer):
    small, healed = tmp_path / "small", tmp_path / "healed"
    make_compressed(*KINDS).save_pretrained(small)
    byte_tokenizer.save_pretrained(small)
    settings = HealingConfig(seq_len=32, batch_size=4, tokens=24 * 4 * 32, learning_rate=3e-3, save_steps=100)
    heal(small, pair.original, settings, pair.windows, tmp_path / "work", healed)
    before, after = (load_file(path / "model.safetensors") for path in (small, healed))
    quantized = {name for name, tensor in before.items() if tensor.dtype == torch.int8}
    assert quantized == {name for name, tensor in after.items() if tensor.dtype == torch.int8}
    assert all(not torch.equal(before[name], after[name]) for name in quantized)
    with torch.no_grad():
        wanted, lost, won = (
            AutoModelForCausalLM.from_pretrained(path)(input_ids=pair.windows).logits
            for path in (pair.original.path, small, healed)
        )
    assert (won - wanted).norm() < 0.9 * (lost - wanted).norm()

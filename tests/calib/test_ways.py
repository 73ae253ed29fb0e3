"""Grams and sensitivities of models whose blocks tell each other more than their outputs, or that keep what enters."""

import gc
import weakref
from functools import partial

import pytest
import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES

from rocket.calib import collect_grams, measure_sensitivities
from rocket.calib.objective import objective
from rocket.config import RocketError
from rocket.models import run_forward, stream, target_layers
from rocket.models.residence import Spilled
from rocket.models.sweep import Call, sweep

WIDTHS = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64}
TEXT = {**WIDTHS, "vocab_size": 61, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0}
SHARING = {
    **TEXT,
    "num_hidden_layers": 10,
    "num_kv_shared_layers": 5,
    "layer_types": (["sliding_attention"] * 4 + ["full_attention"]) * 2,
    "sliding_window": 16,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 61,
}
SIDES = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40}
FAMILIES = {
    "gemma3n_text": {
        **SHARING,
        "laurel_rank": 4,
        "altup_num_inputs": 2,
        "activation_sparsity_pattern": [0.0] * 10,
        "intermediate_size": [64] * 10,
    },
    "gemma4_text": {**SHARING, "global_head_dim": 8},
    "pegasus_x": {"vocab_size": 61, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "block_size": 8, **SIDES},
    "deberta": {
        **{name: value for name, value in TEXT.items() if name not in ("num_key_value_heads", "head_dim")},
        "num_hidden_layers": 2,
        "relative_attention": True,
        "pos_att_type": ["c2p", "p2c"],
    },
    "xlm": {"vocab_size": 61, "emb_dim": 32, "n_layers": 3, "n_heads": 4, "max_position_embeddings": 64, "n_langs": 1},
    "mixtral": {**TEXT, "num_hidden_layers": 2, "num_local_experts": 4, "output_router_logits": True},
    "llava": {
        "text_config": {**TEXT, "model_type": "llama", "num_hidden_layers": 2},
        "vision_config": {
            **{name: value for name, value in WIDTHS.items() if name != "num_key_value_heads"},
            "model_type": "clip_vision_model",
            "num_hidden_layers": 3,
            "image_size": 28,
            "patch_size": 14,
        },
        "image_token_index": 60,
        "vision_feature_layer": -2,
    },
}


def make(family, **changes):
    if family not in CONFIG_MAPPING:
        pytest.skip(f"this version of transformers has no {family}")
    config = AutoConfig.for_model(family, **{**FAMILIES[family], **changes})
    auto = AutoModelForCausalLM
    if family in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES:
        auto = AutoModelForSeq2SeqLM
    if family == "deberta":
        auto = AutoModelForMaskedLM
    torch.manual_seed(0)
    model = (AutoModel if family == "llava" else auto).from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.1)
    return model


def batches_of(family):
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(2):
        ids = torch.randint(3, 59, (2, 24), generator=generator)
        batch = {"input_ids": ids}
        if family == "llava":
            ids[:, 2:6] = 60
            batch["pixel_values"] = torch.randn(2, 3, 28, 28, generator=generator)
        if family == "pegasus_x":
            batch["labels"] = ids
        found.append(batch)
    return found


def by_autograd(model, layers, batches) -> dict[str, torch.Tensor]:
    """φ [out] of each layer by a plain backward pass through the whole model, and its tokens."""
    sums = {name: torch.zeros(layer.out_features, dtype=torch.float64) for name, layer in layers.items()}

    def add(name, gradient):
        sums[name] += gradient.reshape(-1, gradient.shape[-1]).double().square().sum(dim=0)

    def watch(name, output):
        output.register_hook(partial(add, name))
        return output.clone()  # what is changed in place, through a view even, loses its hook

    handles = [
        layer.register_forward_hook(lambda _, __, output, name=name: watch(name, output))
        for name, layer in layers.items()
    ]
    terms = 0
    for seed, batch in enumerate(batches):
        value, count = objective(model, batch, torch.Generator().manual_seed(seed))
        value.backward()
        terms += count
    for handle in handles:
        handle.remove()
    model.zero_grad()
    return {name: total / terms for name, total in sums.items() if total.any()}


@pytest.mark.parametrize("family", FAMILIES)
def test_sensitivities_are_those_of_one_backward_pass(family):
    model, batches = make(family), batches_of(family)
    layers = target_layers(model)
    expected = by_autograd(model, layers, batches)
    found = measure_sensitivities(model, layers, batches)
    assert found.keys() == expected.keys()
    for name, values in found.items():
        torch.testing.assert_close(values.double(), expected[name], rtol=1e-3, atol=1e-4 * float(expected[name].max()))


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_of_every_block_see_all_tokens(family):
    model, batches = make(family), batches_of(family)
    layers = target_layers(model)
    seen = dict.fromkeys(layers, 0)

    def count(name, inputs):
        seen[name] += inputs.reshape(-1, inputs.shape[-1]).shape[0]

    handles = [
        layer.register_forward_pre_hook(lambda _, args, name=name: count(name, args[0]))
        for name, layer in layers.items()
    ]
    with torch.no_grad():
        for batch in batches:
            run_forward(model, batch)
    for handle in handles:
        handle.remove()
    calibration = collect_grams(model, layers, batches)
    assert {name: calibration.tokens[calibration.inputs[name]] for name in calibration.inputs} == {
        name: number for name, number in seen.items() if number
    }


@pytest.mark.parametrize("family", ["llava", "mixtral"])
def test_nothing_changes_where_hidden_states_wait_on_disk(family, tmp_path):
    batches = batches_of(family)
    in_memory, streamed = make(family), make(family)
    stream(streamed, torch.device("cpu"), tmp_path / "states")
    layers, others = target_layers(in_memory), target_layers(streamed)
    expected, found = collect_grams(in_memory, layers, batches), collect_grams(streamed, others, batches)
    assert all(torch.equal(found.gram(name), expected.gram(name)) for name in expected.inputs)
    expected, found = (
        measure_sensitivities(in_memory, layers, batches),
        measure_sensitivities(streamed, others, batches),
    )
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], values) for name, values in expected.items())
    del expected, found
    gc.collect()
    assert not any((tmp_path / "states").iterdir())


def test_blocks_that_tell_more_are_not_cut_where_the_model_is_streamed():
    model = make("gemma3n_text")
    stream(model, torch.device("cpu"), None)
    with pytest.raises(RocketError, match=r"blocks of Gemma3nForCausalLM tell each other more.*raise memory_budget"):
        measure_sensitivities(model, target_layers(model), batches_of("gemma3n_text"))


def test_hidden_states_go_as_they_are_used(tmp_path, monkeypatch):
    model = make("mixtral", num_hidden_layers=4)
    stream(model, torch.device("cpu"), tmp_path / "states")
    made, load, waiting, in_memory = Spilled.__init__, Spilled.load, [], []

    def keep(self, *arguments):
        made(self, *arguments)
        waiting.append(weakref.ref(arguments[0]))

    def count(self):
        load(self)
        held = [tensor() for tensor in waiting if tensor() is not None]
        in_memory.append(sum(tensor.untyped_storage().nbytes() > 0 for tensor in held))

    monkeypatch.setattr(Spilled, "__init__", keep)
    monkeypatch.setattr(Spilled, "load", count)
    ids = torch.randint(3, 59, (12, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        sweep(model, [partial(run_forward, model, {"input_ids": each[None]}) for each in ids])
    assert max(in_memory) == len(ids) + 1  # what enters the first block: models keep their embeddings
    in_memory.clear()
    collect_grams(model, target_layers(model), [{"input_ids": each[None]} for each in ids])
    assert max(in_memory) == len(ids) + 1  # what enters the first block: models keep their embeddings


class Telling(nn.Module):
    """A block that adds what the one before it has written into ``notes``, in place of its own if ``writes``."""

    def __init__(self, writes: bool) -> None:
        super().__init__()
        self.inner, self.writes = nn.Linear(16, 16), writes

    def forward(self, hidden_states, notes):
        if self.writes:
            notes["last"] = self.inner(hidden_states)
        return hidden_states + self.inner(notes["last"])


@pytest.mark.parametrize("writes", [True, False])
def test_what_is_only_read_does_not_keep_the_graph_whole(writes):
    block = Telling(writes)
    state, last = torch.randn(1, 4, 16), torch.randn(1, 4, 16)
    call = Call(0, "0", block.forward, (state,), {"notes": {"last": last}})
    before = call.notes()
    with torch.no_grad():
        call.run()
    assert (call.notes() != before) == writes

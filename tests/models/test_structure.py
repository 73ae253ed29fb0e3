"""Blocks and target layers, found by structure in many architectures."""

from collections import Counter

import pytest
import torch
from torch import nn
from transformers import DbrxConfig, DbrxForCausalLM, RwkvConfig, RwkvForCausalLM

from rocket.config.errors import RocketError
from rocket.models import block_of, find_blocks, target_layers, unstack_experts

LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ARCHITECTURES = {
    "llama": ("model.layers", LLAMA),
    "qwen2": ("model.layers", LLAMA),
    "qwen3": ("model.layers", LLAMA),
    "gemma2": ("model.layers", LLAMA),
    "olmo2": ("model.layers", LLAMA),
    "phi3": ("model.layers", ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]),
    "gpt_neox": ("gpt_neox.layers", ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]),
    "gpt2": ("transformer.h", ["c_attn", "c_proj", "c_fc", "c_proj"]),
    "opt": ("model.decoder.layers", ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]),
}


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_blocks_and_layers(make_model, family):
    prefix, endings = ARCHITECTURES[family]
    model = make_model(family)
    assert list(find_blocks(model)) == [f"{prefix}.0", f"{prefix}.1"]
    layers = target_layers(model)
    assert Counter(name.rpartition(".")[2] for name in layers) == {end: 2 * endings.count(end) for end in endings}
    assert all(layer is model.get_submodule(name) for name, layer in layers.items())
    order = [name for name, _ in model.named_modules() if name in layers]
    assert list(layers) == order
    assert {block_of(name, list(find_blocks(model))) for name in layers} == {f"{prefix}.0", f"{prefix}.1"}


@pytest.mark.parametrize(
    ("targets", "ignore", "expected"),
    [
        (["q_proj"], [], ["0.self_attn.q_proj", "1.self_attn.q_proj"]),
        (["mlp.down_proj"], [], ["0.mlp.down_proj", "1.mlp.down_proj"]),
        ([r"re:model\.layers\.1\..*(up|gate)_proj"], [], ["1.mlp.gate_proj", "1.mlp.up_proj"]),
        (["q_proj", "k_proj"], [r"re:.*\.0\."], ["1.self_attn.q_proj", "1.self_attn.k_proj"]),
        ([], ["re:.*self_attn", "gate_proj", "up_proj"], ["0.mlp.down_proj", "1.mlp.down_proj"]),
    ],
)
def test_patterns(make_model, targets, ignore, expected):
    found = target_layers(make_model("llama"), targets, ignore)
    assert [name.removeprefix("model.layers.") for name in found] == expected


@pytest.mark.parametrize(
    ("targets", "ignore", "message"),
    [
        (["query"], [], r"model\.targets: 'query' matches no layer; layers end in down_proj, .*, v_proj"),
        (["proj"], [], r"model\.targets: 'proj' matches no layer"),  # endings stop at a dot
        (["q_proj", "re:layers"], [], r"model\.targets: 're:layers' matches no layer"),  # from the start
        ([], ["lm_head"], r"model\.ignore: 'lm_head' matches no layer"),
        (["re:(model"], [], r"model\.targets: 're:\(model' is no regular expression: "),
        ([], ["re:.*"], r"model\.ignore leaves no layer to compress"),
    ],
)
def test_patterns_that_match_nothing(make_model, targets, ignore, message):
    with pytest.raises(RocketError, match=message) as error:
        target_layers(make_model("llama"), targets, ignore)
    assert "\n" not in str(error.value)


class Tied(nn.Module):
    """Two blocks; the layer `b` is one weight in both. A list of norms and a lone layer are no blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(4), nn.LayerNorm(4)])
        self.lone = nn.Linear(4, 4)
        self.blocks = nn.ModuleList([nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)}) for _ in range(2)])
        self.blocks[1]["b"].weight = self.blocks[0]["b"].weight
        self.blocks[0]["experts"] = nn.ModuleList([nn.Sequential(nn.Linear(4, 4))])


def test_tied_weights_are_left_out():
    model = Tied()
    assert list(find_blocks(model)) == ["blocks.0", "blocks.1"]
    assert list(target_layers(model)) == ["blocks.0.a", "blocks.0.experts.0.0", "blocks.1.a"]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            nn.Linear(3, 3),
            "Linear has no linear layer inside repeated blocks to compress; it has no repeated blocks",
        ),
        (nn.ModuleList([nn.Conv1d(3, 3, 1)]), "it has no repeated blocks"),
    ],
)
def test_nothing_to_compress(model, message):
    with pytest.raises(RocketError, match=message):
        target_layers(model)


class Renamed(nn.Linear):
    """As Falcon's."""

    def forward(self, inputs):
        return inputs @ self.weight.T + self.bias


class Scaled(nn.Linear):
    def forward(self, inputs):
        return 2 * super().forward(inputs)


class Curious(nn.Linear):
    def forward(self, inputs, more):
        return super().forward(inputs + more)


class Packed(nn.Linear):
    def __init__(self, *features: int) -> None:
        super().__init__(*features)
        self.weight = nn.Parameter(torch.zeros(3, 3, dtype=torch.uint8), requires_grad=False)


def test_subclasses_that_only_multiply_are_linear_layers():
    kinds = [Renamed, Scaled, Curious, Packed]
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.ModuleList([kind(3, 3) for kind in kinds])])})
    assert list(target_layers(model)) == ["blocks.0.0"]


def test_block_of():
    assert block_of("model.layers.1.mlp.up", ["model.layers.0", "model.layers.1"]) == "model.layers.1"
    assert block_of("model.layers.10.mlp.up", ["model.layers.1"]) == ""


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4, 4))

    def forward(self, x):
        return sum(nn.functional.linear(x, self.weight[index]) for index in range(3))


@pytest.mark.parametrize("experts", [Experts(), nn.ModuleList(nn.Linear(4, 4) for _ in range(3))])
def test_routers_are_left_alone(experts):
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            mixture = {
                "router": nn.Linear(4, 3),
                "shared": nn.Linear(4, 4),
                "weigh": nn.Linear(4, 1),
                "experts": experts,
            }
            self.blocks = nn.ModuleList([nn.ModuleDict({"k": nn.Linear(4, 3), "mlp": nn.ModuleDict(mixture)})])
            self.dummy_inputs = {"x": torch.ones(2, 4)}

        def forward(self, x):
            return self.blocks[0]["mlp"]["experts"](x)

    model = Model()
    unstack_experts(model)
    names = [name.removeprefix("blocks.0.") for name in target_layers(model)]
    stack = "mlp.experts.weight" if isinstance(experts, Experts) else "mlp.experts"
    assert names == ["k", "mlp.shared", *(f"{stack}.{number}" for number in range(3))]


def test_routers_of_experts_that_are_one_matrix():
    attention = {"kv_n_heads": 2, "rope_theta": 1e4}
    experts = {"moe_num_experts": 4, "moe_top_k": 2, "ffn_hidden_size": 48}
    config = DbrxConfig(
        d_model=32, n_heads=4, n_layers=2, vocab_size=61, max_seq_len=64, attn_config=attention, ffn_config=experts
    )
    layers = target_layers(DbrxForCausalLM(config))
    assert layers
    assert not [name for name in layers if "router" in name]


def test_what_torch_reads_without_calling_it_is_left_alone():
    def block():
        return nn.Sequential(nn.Linear(16, 16), nn.TransformerEncoderLayer(16, 2, 24, batch_first=True))

    assert list(target_layers(nn.Sequential(nn.ModuleList([block(), block()])))) == ["0.0.0", "0.1.0"]


def test_a_model_that_changes_its_weights_is_refused():
    model = RwkvForCausalLM(RwkvConfig(vocab_size=61, hidden_size=32, num_hidden_layers=2, rescale_every=2))
    with pytest.raises(RocketError, match=r"RwkvForCausalLM divides its weights as it runs; set rescale_every to 0"):
        target_layers(model)
    model.config.rescale_every = 0
    assert target_layers(model)

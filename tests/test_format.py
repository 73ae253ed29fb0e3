"""docs/format.md is the format's definition: its reader, run as it stands there, must agree with rocket."""

import copy
import re
from dataclasses import replace
from itertools import cycle
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import rocket
from rocket.config.schema import CalibConfig, ProfilingConfig
from rocket.nn import LAYERS, CompressedLinear

KINDS = [*(form for form in LAYERS if form != "dense"), *(f"{form} int8" for form in LAYERS)]
DOCUMENT = Path(__file__).parents[1] / "docs" / "format.md"


@pytest.fixture(scope="module")
def reader():
    (source,) = re.findall(r"^```python\n(.*?)^```$", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    namespace = {}
    exec(compile(source, str(DOCUMENT), "exec"), namespace)
    return namespace["read_weight"]


@pytest.fixture(scope="module")
def compressed():
    """A tiny model with every form in it, in both precisions, biases, and widths that are no multiples of 64."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=72,
            intermediate_size=100,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            attention_bias=True,
        )
    ).eval()
    planner = rocket.plan(
        model,
        torch.randint(64, (16, 32)),
        calib=CalibConfig(sensitivity_samples=4),
        profiling=ProfilingConfig(forms=list(LAYERS), removed_ratios=[0.3, 0.5], precisions=["float", "int8"]),
    )
    labels = cycle(KINDS)
    choices = {
        profile.layer: next(option for option in profile.options if option.label == label)
        for profile, label in zip(planner.profiles, labels, strict=False)
    }
    return rocket.compress(model, replace(planner.at(removed_ratio=0.3), choices=choices))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_documented_reader_agrees_with_the_layers(reader, compressed, dtype, tmp_path):
    copy.deepcopy(compressed).to(dtype).save_pretrained(tmp_path)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    layers = {name: module for name, module in opened.named_modules() if isinstance(module, CompressedLinear)}
    assert {(layer.form, layer.spec.precision) for layer in layers.values()} == {
        (label.partition(" ")[0], "int8" if label.endswith("int8") else "float") for label in KINDS
    }
    for name, layer in layers.items():
        weight = reader(str(tmp_path), name)
        torch.testing.assert_close(weight, layer.float().dense_weight())


def test_documented_reader_reads_shards(reader, compressed, tmp_path):
    compressed.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    for name, module in compressed.named_modules():
        if isinstance(module, CompressedLinear):
            torch.testing.assert_close(reader(str(tmp_path), name), module.dense_weight())


def test_documented_reader_reads_experts(reader, make_model, token_ids, quick_settings, tmp_path):
    calib, profiling = quick_settings
    original = make_model("mixtral")
    plan = rocket.plan(original, token_ids, calib=calib, profiling=profiling).at(removed_ratio=0.5)
    small = rocket.compress(original, plan)
    small.save_pretrained(tmp_path)
    experts = [name for name, option in plan.choices.items() if ".experts." in name and option.form != "dense"]
    assert experts
    for name in experts:
        torch.testing.assert_close(reader(str(tmp_path), name), small.get_submodule(name).dense_weight())


def test_documented_reader_refuses_other_versions(reader, compressed, tmp_path):
    compressed.save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    text = config.read_text()
    assert text.count('"version": 1') == 1
    config.write_text(text.replace('"version": 1', '"version": 2'))
    with pytest.raises(ValueError, match="version 1"):
        reader(str(tmp_path), "model.layers.0.self_attn.q_proj")
    with pytest.raises(rocket.RocketError, match="version 2"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_documented_forms_are_those_of_the_registry():
    table = DOCUMENT.read_text(encoding="utf-8").partition("| form | W |")[2].partition("\n\n")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == set(LAYERS)

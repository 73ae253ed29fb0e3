"""What is written: as many values and bytes as planned, readable again, and mergeable into plain weights."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

import rocket
from rocket.calib.experts import split_number
from rocket.compression import merge, save_checkpoint, stored_values
from rocket.config.errors import RocketError
from rocket.config.schema import CalibConfig, ProfilingConfig
from rocket.forms import Option
from rocket.models import ExpertLinears, find_blocks
from rocket.nn import CompressedLinear


def compressed_with_plan(make_model, token_ids, settings, family="llama", dtype=torch.float32, **budget):
    model = make_model(family, dtype)
    calib, profiling = settings
    plan = rocket.plan(model, token_ids, calib=calib, profiling=profiling).at(**budget)
    return rocket.compress(model, plan, inplace=True), plan


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen2", "opt", "gpt2", "gpt_oss", "mixtral"])
def test_disk_holds_what_the_plan_counts(make_model, token_ids, quick_settings, tmp_path, family, dtype):
    model, plan = compressed_with_plan(make_model, token_ids, quick_settings, family, dtype, removed_ratio=0.3)
    save_checkpoint(model, None, tmp_path)
    assert stored_values(tmp_path, plan.choices) == plan.kept_target_parameters
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    assert sum(tensor.nbytes for tensor in tensors.values()) == plan.bytes
    values = sum(tensor.numel() for name, tensor in tensors.items() if not name.endswith(".mask"))
    assert values == plan.parameters
    assert plan.kept_target_parameters <= 0.7 * plan.size.target_parameters
    modules = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["modules"]
    assert modules.keys() == {name for name, option in plan.choices.items() if option.form != "dense"}


def test_bytes_budget_holds_on_disk(make_model, token_ids, quick_settings, tmp_path):
    dense = sum(parameter.nbytes for parameter in make_model("llama").parameters())
    model, plan = compressed_with_plan(make_model, token_ids, quick_settings, bytes=int(0.85 * dense))
    model.save_pretrained(tmp_path)
    written = sum(tensor.nbytes for tensor in load_file(tmp_path / "model.safetensors").values())
    assert written == plan.bytes <= 0.85 * dense


def test_bytes_of_a_model_of_two_types(byte_tokenizer, token_ids, tmp_path):
    """T5 in float16 keeps some weights in float32; its int8 layers run, too."""
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4, "vocab_size": 257}
    config = AutoConfig.for_model("t5", **sizes, decoder_start_token_id=0)
    AutoModelForSeq2SeqLM.from_config(config).save_pretrained(tmp_path / "t5")
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "t5", dtype=torch.float16).eval()
    dense = sum({parameter.data_ptr(): parameter.nbytes for parameter in model.parameters()}.values())
    profiling = ProfilingConfig(cost="activation", precisions=["float", "int8"])
    planner = rocket.plan(model, token_ids, calib=CalibConfig(num_samples=16), profiling=profiling)
    plan = planner.at(bytes=0.6 * dense)
    assert planner.size.bytes == dense
    assert len(planner.size.itemsizes) == 2
    assert {plan.choices[name].precision for name in planner.size.itemsizes} == {"int8"}
    small = rocket.compress(model, plan)
    small.save_pretrained(tmp_path / "small")
    written = sum(tensor.nbytes for tensor in load_file(tmp_path / "small" / "model.safetensors").values())
    assert written == plan.bytes <= 0.6 * dense
    batch = {"input_ids": token_ids[:2], "decoder_input_ids": token_ids[2:4]}
    with torch.no_grad():
        expected = small(**batch).logits
        torch.testing.assert_close(rocket.optimize(small)(**batch).logits, expected, rtol=0.02, atol=0.02)


def test_round_trip_guard(make_model, token_ids, quick_settings, tmp_path, monkeypatch):
    """A reader that returns other tensors than were written is found out."""
    model, _ = compressed_with_plan(make_model, token_ids, quick_settings, removed_ratio=0.3)
    load = type(model).from_pretrained

    def careless(*arguments, **options):
        reopened = load(*arguments, **options)
        with torch.no_grad():
            reopened.model.norm.weight[0] += 1
        return reopened

    monkeypatch.setattr(type(model), "from_pretrained", careless)
    with pytest.raises(RocketError, match=r"model\.norm\.weight came back different from what was saved"):
        save_checkpoint(model, None, tmp_path)


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_merged_model_is_the_same_function(make_model, token_ids, quick_settings, tmp_path, family):
    model, plan = compressed_with_plan(make_model, token_ids, quick_settings, family, removed_ratio=0.4)
    plain = merge(model)
    assert any(isinstance(module, CompressedLinear) for module in model.modules())  # not in place
    assert not any(isinstance(module, CompressedLinear) for module in plain.modules())
    with torch.no_grad():
        expected = model(input_ids=token_ids[:3]).logits
        torch.testing.assert_close(plain(input_ids=token_ids[:3]).logits, expected, rtol=0, atol=1e-3)
    plain.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    weight = load_file(tmp_path / "model.safetensors")[f"{next(iter(plan.choices))}.weight"]
    assert weight.shape == make_model(family).get_submodule(next(iter(plan.choices))).weight.shape


def test_tables_that_are_not_saved(byte_tokenizer, token_ids, quick_settings, tmp_path):
    """Marian leaves out its positions, which transformers makes anew; and notes what it knows of quantized models."""
    sizes = {f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in
             {"layers": 1, "attention_heads": 4, "ffn_dim": 48}.items()}  # fmt: skip
    config = AutoConfig.for_model("marian", **sizes, d_model=32, vocab_size=257, max_position_embeddings=64,
                                  pad_token_id=0, decoder_start_token_id=0, eos_token_id=0)  # fmt: skip
    model = AutoModelForSeq2SeqLM.from_config(config).eval()
    calib, profiling = quick_settings
    plan = rocket.plan(model, token_ids, calib=calib, profiling=profiling).at(removed_ratio=0.3)
    small = rocket.compress(model, plan)
    save_checkpoint(small, byte_tokenizer, tmp_path)
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    batch = {"input_ids": token_ids[:2], "decoder_input_ids": token_ids[2:4]}
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, small(**batch).logits)
    assert getattr(small.config, "_is_quantized", None) is True
    assert not hasattr(merge(small).config, "_is_quantized")


@pytest.mark.parametrize("family", ["gpt_oss", "granitemoe", "mixtral"])
def test_merged_experts_are_stacked_again(make_model, token_ids, quick_settings, tmp_path, family):
    """And saved under the names of the original's checkpoint, which plain transformers opens."""
    original = make_model(family)
    calib, profiling = quick_settings
    plan = rocket.plan(original, token_ids, calib=calib, profiling=profiling).at(removed_ratio=0.3)
    dense = {name: Option("dense", option.parameters, 0, 0.0) for name, option in plan.choices.items()}
    blocks = list(find_blocks(original))
    choices = {
        name: option if split_number(name, blocks)[1] == "1" else dense[name] for name, option in plan.choices.items()
    }
    small = rocket.compress(original, replace(plan, choices=choices))
    for model in (small, reopened(small, tmp_path / "small")):
        plain = merge(model)
        implementations = [getattr(one.config, "_experts_implementation", None) for one in (plain, original)]
        assert implementations[0] == implementations[1]
        state, expected = plain.state_dict(), original.state_dict()
        assert {name: tensor.shape for name, tensor in state.items()} == {
            name: tensor.shape for name, tensor in expected.items()
        }
        stacks = [name for name, tensor in expected.items() if tensor.ndim == 3]
        compressed = {name.rpartition(".")[0] for name, option in choices.items() if option.form != "dense"}
        for name in stacks:
            assert torch.equal(state[name][[0, 2, 3]], expected[name][[0, 2, 3]])
            assert torch.equal(state[name][1], expected[name][1]) == (name not in compressed)
        again = reopened(plain, tmp_path / "plain")
        assert not any(isinstance(module, (CompressedLinear, ExpertLinears)) for module in again.modules())
        original.save_pretrained(tmp_path / "original")
        names = [load_file(tmp_path / path / "model.safetensors").keys() for path in ("plain", "original")]
        assert names[0] == names[1]
        with torch.no_grad():
            wanted = small(input_ids=token_ids[:3]).logits
            torch.testing.assert_close(again(input_ids=token_ids[:3]).logits, wanted, rtol=0, atol=1e-3)


def reopened(model, path):
    model.save_pretrained(path)
    return AutoModelForCausalLM.from_pretrained(path)


OPEN_WITHOUT_ROCKET = """
import sys, torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
with torch.no_grad():
    torch.save(model(torch.arange(1, 9)[None]).logits, sys.argv[2])
assert "rocket" not in sys.modules
"""


def test_merged_model_opens_without_rocket(make_model, token_ids, quick_settings, tmp_path):
    model, _ = compressed_with_plan(make_model, token_ids, quick_settings, removed_ratio=0.4)
    path, logits = tmp_path / "dense", tmp_path / "logits.pt"
    merge(model, inplace=True).save_pretrained(path)
    subprocess.run([sys.executable, "-c", OPEN_WITHOUT_ROCKET, path, logits], check=True, cwd=tmp_path)
    again = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        assert torch.equal(torch.load(logits), again(torch.arange(1, 9)[None]).logits)

"""Layers with int8 values in whole models: reloaded, run by the kernels, refused where they are not what they say."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import rocket
from rocket.config.errors import RocketError
from rocket.nn import CompressedLinear

KINDS = ["dense int8", "low_rank int8", "sparse int8", "dictionary int8"]


def run(model, ids):
    with torch.inference_mode():
        return model(input_ids=ids).logits


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "granitemoe"])
def test_the_kernels_agree_with_the_plain_layers(save_compressed, token_ids, family):
    model = AutoModelForCausalLM.from_pretrained(save_compressed(family, *KINDS))
    layers = [module for module in model.modules() if isinstance(module, CompressedLinear)]
    assert {layer.form for layer in layers} == {"dense", "low_rank", "sparse", "dictionary"}
    assert all(layer.spec.precision == "int8" for layer in layers)
    for ids in (token_ids[:2], token_ids[:1, :1]):
        expected = run(rocket.optimize(model, "trivial"), ids)
        torch.testing.assert_close(run(rocket.optimize(model), ids), expected, rtol=1e-4, atol=1e-4)


def test_layers_of_one_input_multiply_together(save_compressed, token_ids):
    model = AutoModelForCausalLM.from_pretrained(save_compressed("llama", "sparse int8"))
    expected = run(model, token_ids[:1, :1])
    rocket.optimize(model)
    attention = model.model.layers[0].self_attn
    assert attention.q_proj.shared_input is attention.v_proj.shared_input is not None
    torch.testing.assert_close(run(model, token_ids[:1, :1]), expected, rtol=1e-4, atol=1e-4)


def test_int8_and_float_of_one_input_do_not(save_compressed, token_ids):
    model = AutoModelForCausalLM.from_pretrained(save_compressed("llama", "sparse int8", "sparse"))
    expected = run(model, token_ids[:1, :1])
    torch.testing.assert_close(run(rocket.optimize(model), token_ids[:1, :1]), expected, rtol=1e-4, atol=1e-4)
    for layer in (module for module in model.modules() if isinstance(module, CompressedLinear)):
        if layer.shared_input is not None:
            assert len({one.spec.precision for one in layer.shared_input.layers}) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_opened_in_another_type(save_compressed, token_ids, dtype):
    path = save_compressed("llama", *KINDS)
    expected = run(AutoModelForCausalLM.from_pretrained(path), token_ids[:2])
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {dtype, torch.int8, torch.uint8}
    found = run(model, token_ids[:2])
    assert found.dtype == dtype
    assert (found.float() - expected).norm() < 0.03 * expected.norm()


def test_transformers_alone_refuses_a_dense_layer_in_int8(save_compressed):
    """As an nn.Linear it would take the int8 values for the weights."""
    code = "import sys, transformers; transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])"
    path = save_compressed("llama", "dense int8")
    run = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True)
    assert run.returncode != 0
    assert "weight" in run.stderr


def test_scales_and_values_take_no_gradient(save_compressed):
    model = AutoModelForCausalLM.from_pretrained(save_compressed("llama", *KINDS))
    for layer in (module for module in model.modules() if isinstance(module, CompressedLinear)):
        assert not any(parameter.requires_grad for parameter in layer.parameters())
    assert model.num_parameters() > sum(layer.stored_values() for layer in model.modules() if hasattr(layer, "spec"))


def test_explain_says_what_int8_runs(save_compressed):
    model = AutoModelForCausalLM.from_pretrained(save_compressed("llama", *KINDS))
    before = {str(line).partition(": ")[2] for line in rocket.explain(model) if "int8" in line.form}
    assert before == {f"{kind}, torch (not optimized: int8 values are converted first)" for kind in KINDS}
    rocket.optimize(model)
    assert {line.form for line in rocket.explain(model)} >= set(KINDS)


@pytest.fixture
def damaged(save_compressed, tmp_path):
    for file in save_compressed("llama", *KINDS).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def change_tensor(path, ending, change):
    tensors = load_file(path / "model.safetensors")
    name = next(name for name in tensors if name.endswith(ending))
    value = change(tensors.pop(name))
    save_file(tensors if value is None else {**tensors, name: value}, path / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("ending", "change", "message"),
    [
        ("weight_scale", lambda tensor: None, r"lacks the tensor .*weight_scale"),
        ("dictionary_scale", lambda tensor: None, r"lacks the tensor .*dictionary_scale"),
        ("weight_scale", lambda tensor: tensor[1:].clone(), r"weight_scale is \[\d+\] in the checkpoint, config.json"),
        ("weight_scale", lambda tensor: tensor.to(torch.int8), "weight_scale holds I8 values.*must be floating-point"),
        ("self_attn.q_proj.weight", lambda tensor: tensor.float(), "q_proj.weight holds .* values"),
        ("dictionary", lambda tensor: tensor.to(torch.uint8), "dictionary holds U8 values.*they must be I8"),
    ],
)
def test_tensors_that_are_not_what_config_json_says(damaged, ending, change, message):
    change_tensor(damaged, ending, change)
    with pytest.raises(RocketError, match=message):
        AutoModelForCausalLM.from_pretrained(damaged)


@pytest.mark.parametrize(
    ("precision", "message"),
    [
        ("int4", "precision 'int4': there are float, int8"),
        (None, "precision None"),
        ("float", "precision=float is imp"),
    ],
)
def test_other_precisions(damaged, precision, message):
    config = json.loads((damaged / "config.json").read_text())
    spec = next(spec for spec in config["quantization_config"]["modules"].values() if spec["form"] == "dense")
    spec["precision"] = precision
    (damaged / "config.json").write_text(json.dumps(config))
    with pytest.raises(RocketError, match=message):
        AutoModelForCausalLM.from_pretrained(damaged)

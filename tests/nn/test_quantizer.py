"""Our checkpoints under transformers: reload bit by bit, refuse what is damaged, never load garbage."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
)

import rocket
from benchmarks.harness import peak_memory_mb
from rocket.config.errors import RocketError
from rocket.models import check_places, check_size
from rocket.nn import CompressedLinear, RocketConfig
from rocket.nn.quantizer import match_modules, refuse_parallel

FORMS = ["low_rank", "dictionary", "sparse", "sparse_low_rank"]


@pytest.fixture(scope="module")
def compress_tiny(make_model, token_ids, quick_settings):
    """Compresses a tiny model of a family: every layer to one form, or (None) to dense and each form in turn."""
    calib, profiling = quick_settings

    def compress(family: str = "llama", form: str | None = None, dtype: torch.dtype = torch.float32):
        model = make_model(family, dtype)
        planner = rocket.plan(model, token_ids, calib=calib, profiling=profiling)
        turns = cycle([form] if form else [*FORMS, "dense"])
        choices = {
            profile.layer: next(option for option in profile.options[::-1] if option.form == wanted)
            for profile, wanted in zip(planner.profiles, turns, strict=False)
        }
        plan = replace(planner.at(removed_ratio=0.2), choices=choices)
        return rocket.compress(model, plan, inplace=True)

    return compress


@pytest.fixture(scope="module")
def saved(compress_tiny, tmp_path_factory) -> Path:
    """A checkpoint in which all four forms occur. Do not change it; copy it (`damaged`)."""
    model = compress_tiny()
    path = tmp_path_factory.mktemp("saved")
    model.save_pretrained(path)
    return path


@pytest.fixture
def damaged(saved, tmp_path) -> Path:
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def logits(model, token_ids) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=token_ids[:3]).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("family", "form"),
    [
        ("llama", None),
        *(("llama", form) for form in FORMS),
        ("opt", None),
        ("gpt_neox", "dictionary"),
        ("phi3", "sparse"),
        ("mixtral", None),
        *(("gpt_oss", form) for form in FORMS),
        ("gpt_oss", None),
    ],
)
def test_reload_is_bit_equal(compress_tiny, token_ids, tmp_path, aligned, family, form, dtype):
    model = compress_tiny(family, form, dtype)
    compressed = [module for module in model.modules() if isinstance(module, CompressedLinear)]
    assert compressed
    assert form is None or {module.form for module in compressed} == {form}
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert type(again) is type(model)
    assert torch.equal(logits(aligned(again), token_ids), logits(model, token_ids))

    # AutoModel drops the prefix of every layer's name.
    body = aligned(AutoModel.from_pretrained(tmp_path, dtype=dtype).eval())
    assert sum(isinstance(module, CompressedLinear) for module in body.modules()) == len(compressed)
    with torch.no_grad():
        expected = model.base_model(input_ids=token_ids[:3]).last_hidden_state
        assert torch.equal(body(input_ids=token_ids[:3]).last_hidden_state, expected)


def test_saved_again_it_is_the_same(saved, tmp_path):
    AutoModelForCausalLM.from_pretrained(saved).save_pretrained(tmp_path)
    first, second = load_file(saved / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    configs = [json.loads((path / "config.json").read_text()) for path in (saved, tmp_path)]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]


def test_sharded_checkpoint(compress_tiny, token_ids, tmp_path):
    model = compress_tiny()
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 1
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path), token_ids), logits(model, token_ids))
    shards[1].unlink()
    with pytest.raises(RocketError, match=rf"{shards[1].name} is no safetensors file that can be read: No such file"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_generates(saved, token_ids):
    model = AutoModelForCausalLM.from_pretrained(saved)
    generated = model.generate(token_ids[:2, :8], max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert generated.shape == (2, 13)
    # Greedy decoding with a cache picks what the whole sequence's logits say.
    with torch.no_grad():
        assert torch.equal(model(generated[:, :-1]).logits[:, 7:].argmax(-1), generated[:, 8:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_conversion(saved, token_ids, dtype):
    model = AutoModelForCausalLM.from_pretrained(saved)
    expected = logits(model, token_ids)
    model = model.to(dtype)
    assert logits(model, token_ids).dtype == dtype
    tolerance = 0.1 * float(expected.abs().max())
    torch.testing.assert_close(logits(model, token_ids).float(), expected, rtol=0, atol=tolerance)
    assert all(module.mask.dtype == torch.uint8 for module in model.modules() if hasattr(module, "mask"))


def test_trains(saved, token_ids):
    model = AutoModelForCausalLM.from_pretrained(saved)
    masks = {name: buffer.clone() for name, buffer in model.named_buffers() if name.endswith("mask")}
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(3):
        loss = model(input_ids=token_ids, labels=token_ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[2] < losses[0]
    assert all(torch.equal(buffer, masks[name]) for name, buffer in model.named_buffers() if name in masks)


WITHOUT_ROCKET = """
import sys
from transformers import AutoModelForCausalLM
for path in sys.argv[1:]:
    try:
        AutoModelForCausalLM.from_pretrained(path)
    except Exception as error:
        print("refused", type(error).__name__)
    else:
        print("loaded garbage from", path)
assert "rocket" not in sys.modules
"""


def test_plain_transformers_refuses(compress_tiny, tmp_path):
    """Without `import rocket` a `weight` of unexpected shape must stop the loading: random weights are no model."""
    for form in FORMS:
        compress_tiny(form=form).save_pretrained(tmp_path / form)
    command = [sys.executable, "-c", WITHOUT_ROCKET, *(tmp_path / form for form in FORMS)]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    assert [line.split()[0] for line in finished.stdout.splitlines()] == ["refused"] * len(FORMS), finished.stdout


# --- hostile checkpoints


def edit_config(path: Path, change) -> None:
    content = json.loads((path / "config.json").read_text())
    change(content["quantization_config"])
    (path / "config.json").write_text(json.dumps(content))


def edit_tensors(path: Path, change) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


def first_layer(quantization: dict, form: str) -> str:
    return next(name for name, spec in quantization["modules"].items() if spec["form"] == form)


def changed_spec(kind: str, **fields: object):
    def change(quantization: dict) -> None:
        quantization["modules"][first_layer(quantization, kind)].update(fields)

    return change


def moved(new_name: str):
    def change(quantization: dict) -> None:
        quantization["modules"][new_name] = quantization["modules"].pop(first_layer(quantization, "sparse"))

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed_spec("sparse", nnz="many"), "model.layers.* expected form, .*rank, nnz, input_group"),
        (changed_spec("sparse", nnz=1.5), "model.layers.* expected form, .*rank, nnz, input_group"),
        (changed_spec("sparse", nnz=10**12), "config.json: model.layers.*: nnz=1000000000000 is impossible"),
        (changed_spec("sparse", nnz=-1), "config.json: model.layers.*: nnz=-1 is impossible"),
        (changed_spec("sparse", rank=3), "config.json: model.layers.*: rank=3 is impossible"),
        (changed_spec("sparse", form="magic"), "config.json: model.layers.*: unknown layer form 'magic'"),
        (
            changed_spec("sparse", script="rm -rf"),
            "model.layers.* expected form, .*rank, nnz, input_group",
        ),
        (moved("model.layers.7.mlp.up_proj"), "model.layers.7.mlp.up_proj is compressed, but this model has no such"),
        (moved("model.layers.0.input_layernorm"), "input_layernorm is a LlamaRMSNorm in this model, not a linear"),
        (moved("x"), "config.json: x is compressed, but this model has no such layer"),
        (moved(""), "config.json: '' is no name of a layer"),
        (lambda quantization: quantization.update(version=2), "format version 2; this rocket reads 1"),
        (lambda quantization: quantization.pop("version"), "format version None; this rocket reads 1"),
        (changed_spec("sparse", in_features=31), "is 16x31, in this model it is 16x32"),
        (lambda quantization: quantization.update(surprise=1), "unknown fields: surprise"),
        (lambda quantization: quantization.update(version=True), "format version True; this rocket reads 1"),
        (lambda quantization: quantization.update(version=1.0), "format version 1.0; this rocket reads 1"),
        (changed_spec("sparse", nnz=True), "model.layers.* expected form, .*rank, nnz, input_group"),
        (changed_spec("sparse", nnz=10**30), "config.json: model.layers.*: nnz=1000000000000000000000000000000 is"),
        (changed_spec("sparse", nnz=[1] * 10_000), r"nnz, input_group .and precision., got .{,200}$"),
        (changed_spec("low_rank", rank=33), "config.json: model.layers.*: rank=33 is impossible"),
        (changed_spec("low_rank", rank=0), "config.json: model.layers.*: rank=0 is impossible"),
        (changed_spec("dictionary", rank=10**12), "config.json: model.layers.*: rank=1000000000000 is impossible"),
        (changed_spec("dictionary", nnz=10**12), "config.json: model.layers.*: nnz=1000000000000 is impossible"),
        (moved("../../../etc/passwd"), "config.json: '../../../etc/passwd' is no name of a layer"),
        (moved("/etc/passwd"), "config.json: '/etc/passwd' is no name of a layer"),
        (moved("model..layers"), "config.json: 'model..layers' is no name of a layer"),
        (moved("a." * 100_000 + "a"), "config.json: 'a.a.a.* is no name of a layer"),
    ],
)
def test_edited_config(damaged, change, message):
    edit_config(damaged, change)
    with pytest.raises(RocketError, match=message):
        AutoModelForCausalLM.from_pretrained(damaged)


SPEC = {"form": "sparse", "in_features": 4, "out_features": 3, "rank": 0, "nnz": 5, "input_group": "x"}


@pytest.mark.parametrize(
    "modules",
    [
        None,
        [],
        ["a"],
        "abc",
        {"a": None},
        {"a": 3},
        {"a": "text"},
        {"a": ["form"]},
        {"a": {}},
        {"a": {"form": "sparse"}},
    ],
)
def test_modules_of_the_wrong_type(modules):
    with pytest.raises(RocketError, match=r"must map layer names to their specs|a: expected form, "):
        RocketConfig(modules, version=1).specs()


def test_config_round_trip():
    config = RocketConfig({"model.layers.0.mlp.up_proj": SPEC}, version=1)
    values = config.to_dict()
    assert values == {"quant_method": "rocket", "version": 1, "modules": {"model.layers.0.mlp.up_proj": SPEC}}
    assert RocketConfig.from_dict(values).specs() == config.specs()


def without(ending: str):
    def change(tensors: dict) -> None:
        del tensors[next(name for name in tensors if name.endswith(ending))]

    return change


def test_a_layer_that_config_json_does_not_name(damaged):
    edit_config(damaged, lambda quantization: quantization["modules"].pop(first_layer(quantization, "sparse")))
    with pytest.raises(RocketError, match=r"weight is \[\d+\] in the checkpoint, config\.json says \[\d+, \d+\]"):
        AutoModelForCausalLM.from_pretrained(damaged)


@pytest.mark.parametrize("ending", ["dictionary", "mask", "up_proj.weight", "embed_tokens.weight", "norm.weight"])
def test_missing_tensor(damaged, ending):
    edit_tensors(damaged, without(ending))
    with pytest.raises(RocketError, match=rf"lacks the tensor .*{ending}; a file is missing or was replaced"):
        AutoModelForCausalLM.from_pretrained(damaged)


@pytest.fixture
def damaged_experts(compress_tiny, tmp_path) -> Path:
    """A checkpoint of stacked experts, some of them dense, to be damaged."""
    compress_tiny("gpt_oss").save_pretrained(tmp_path)
    return tmp_path


def test_missing_tensor_of_a_dense_expert(damaged_experts):
    modules = json.loads((damaged_experts / "config.json").read_text())["quantization_config"]["modules"]
    experts = [f"model.layers.0.mlp.experts.down_proj.{number}" for number in range(4)]
    missing = next(name for name in experts if name not in modules)
    edit_tensors(damaged_experts, without(f"{missing}.weight"))
    with pytest.raises(RocketError, match=rf"lacks the tensor {missing}\.weight; a file is missing or was replaced"):
        AutoModelForCausalLM.from_pretrained(damaged_experts)


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        ({"model": 3}, "quantization_config.experts must map parameter names to their layouts"),
        (["a"], "quantization_config.experts must map parameter names to their layouts"),
        ({"model.layers.0.mlp.experts.up_proj": "expert,in,out"}, "up_proj is compressed, but this model has no such"),
        ({"model.layers.0.mlp.experts.down_proj": "sideways"}, "down_proj lie as 'sideways'; there are expert,out,in"),
        ({}, "is compressed, but this model has no such layer"),
    ],
)
def test_edited_experts(damaged_experts, experts, message):
    edit_config(damaged_experts, lambda quantization: quantization.update(experts=experts))
    with pytest.raises(RocketError, match=message):
        AutoModelForCausalLM.from_pretrained(damaged_experts)


def test_experts_under_another_class(damaged_experts, compress_tiny, token_ids):
    bare = AutoModel.from_pretrained(damaged_experts)
    full = AutoModelForCausalLM.from_pretrained(damaged_experts)
    with torch.no_grad():
        hidden = full.model(input_ids=token_ids[:2]).last_hidden_state
        assert torch.equal(bare(input_ids=token_ids[:2]).last_hidden_state, hidden)


def test_one_layer_twice(damaged):
    def double(quantization: dict) -> None:
        name = first_layer(quantization, "sparse")
        quantization["modules"][f"another.{name}"] = quantization["modules"][name]

    edit_config(damaged, double)
    with pytest.raises(RocketError, match=r"config\.json: (model\S+) and another\.\1 are both \1 in this model"):
        AutoModelForCausalLM.from_pretrained(damaged)


def edit_model_config(path: Path, **fields: object) -> None:
    content = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**content, **fields}))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000 is more than any model has"),
        ({"num_hidden_layers": 3}, r"the checkpoint lacks the tensor model\.layers\.2\..*; a file is missing"),
        ({"vocab_size": 10**12}, r"a model with 64,000,000,000,008 values that the checkpoint's files do not hold"),
        ({"intermediate_size": 10**12}, "is 32x72, in this model it is|is 72x32, in this model it is"),
        ({"hidden_size": 2**20}, "config.json: model.layers.* in this model it is"),
    ],
)
def test_architecture_of_absurd_size(damaged, fields, message):
    edit_model_config(damaged, **fields)

    def refused() -> None:
        with pytest.raises(RocketError, match=message):
            AutoModelForCausalLM.from_pretrained(damaged)

    assert peak_memory_mb(refused) < 300


def test_model_larger_than_its_checkpoint(damaged):
    """A new head may be missing, but not one that takes all memory."""
    edit_model_config(damaged, num_labels=3)
    AutoModelForSequenceClassification.from_pretrained(damaged)
    with pytest.raises(RocketError, match=r"config\.json makes a model with 134,217,729 values that the checkpoint's"):
        check_size(2**27 + 1)


def test_a_head_of_another_shape(saved, tmp_path):
    """Is transformers' to refuse, or to make anew, as in any checkpoint; not so within what is compressed."""
    AutoModelForSequenceClassification.from_pretrained(saved, num_labels=2).save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match=r"ignore_mismatched_sizes|size mismatch"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=5)
    options = {"num_labels": 5, "ignore_mismatched_sizes": True}
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path, **options).score.out_features == 5
    edit_tensors(tmp_path, lambda tensors: tensors.update({"model.layers.0.input_layernorm.weight": torch.ones(3)}))
    with pytest.raises(
        RocketError, match=r"input_layernorm.weight is \[3\] in the checkpoint, config.json says \[32\]"
    ):
        AutoModelForSequenceClassification.from_pretrained(tmp_path, **options)


@pytest.mark.parametrize(
    ("ending", "dtype"),
    [
        ("mask", torch.float32),
        ("mask", torch.int8),
        ("mlp.up_proj.weight", torch.int64),
        ("dictionary", torch.uint8),
        ("model.norm.weight", torch.int64),
    ],
)
def test_tensors_of_the_wrong_type(damaged, ending, dtype):
    def change(tensors: dict) -> None:
        name = next(name for name in tensors if name.endswith(ending))
        tensors[name] = tensors[name].to(dtype)

    edit_tensors(damaged, change)
    message = rf"{ending} holds \w+ values in the checkpoint; they must be (U8|floating-point)"
    with pytest.raises(RocketError, match=message):
        AutoModelForCausalLM.from_pretrained(damaged)


def test_names_of_absurd_length(damaged):
    edit_tensors(damaged, lambda tensors: tensors.update({"a." * 500_000: torch.zeros(1)}))
    with pytest.raises(RocketError, match=r"has a tensor with a name of 1,000,000 letters: a\.a\."):
        AutoModelForCausalLM.from_pretrained(damaged)


@pytest.mark.parametrize(
    "header",
    [b"", b"\xff" * 8, b"\x00" * 8, (10**6).to_bytes(8, "little") + b"{}", (2).to_bytes(8, "little") + b"[]"],
)
def test_hostile_headers(damaged, header):
    (damaged / "model.safetensors").write_bytes(header)
    with pytest.raises(RocketError, match=r"model\.safetensors is no safetensors file that can be read: "):
        AutoModelForCausalLM.from_pretrained(damaged)


def test_pickles_are_not_opened(damaged):
    (damaged / "model.safetensors").unlink()
    torch.save({}, damaged / "pytorch_model.bin")
    with pytest.raises(RocketError, match=r"pytorch_model\.bin: only safetensors are read"):
        AutoModelForCausalLM.from_pretrained(damaged)


@pytest.mark.parametrize("place", ["../outside.safetensors", "{root}/outside.safetensors"])
def test_index_that_leads_outside(damaged, place):
    (damaged / "inside").mkdir()
    for name in ("config.json", "generation_config.json"):
        (damaged / name).rename(damaged / "inside" / name)
    (damaged / "model.safetensors").rename(damaged / "outside.safetensors")
    names = load_file(damaged / "outside.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, place.format(root=damaged))}
    (damaged / "inside" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(RocketError, match=r"the index of .* names .*outside\.safetensors, which is not in it"):
        AutoModelForCausalLM.from_pretrained(damaged / "inside")


def test_no_tensors_at_all(damaged):
    (damaged / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(damaged)


def test_truncated_tensors(damaged):
    content = (damaged / "model.safetensors").read_bytes()
    (damaged / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(RocketError, match=r"is no safetensors file that can be read: .*(?i:incomplete|header)"):
        AutoModelForCausalLM.from_pretrained(damaged)


def test_mask_that_keeps_more_than_there_are_values(damaged):
    def change(tensors: dict) -> None:
        name = next(name for name in tensors if name.endswith("mask"))
        tensors[name] = torch.full_like(tensors[name], 255)

    edit_tensors(damaged, change)
    with pytest.raises(RocketError, match=r"mask keeps \d+ values.*, config.json says \d+; the checkpoint is damaged"):
        AutoModelForCausalLM.from_pretrained(damaged)


@pytest.mark.parametrize("ending", ["mask", "dictionary"])
def test_tensor_of_another_shape(damaged, ending):
    def change(tensors: dict) -> None:
        name = next(name for name in tensors if name.endswith(ending))
        tensors[name] = tensors[name][1:].contiguous()

    edit_tensors(damaged, change)
    with pytest.raises(RocketError, match=rf"{ending} is \[.*\] in the checkpoint, config\.json says \["):
        AutoModelForCausalLM.from_pretrained(damaged)


def test_names_are_matched_by_their_ending():
    modules = ["layers.1.mlp.up", "layers.11.mlp.up", "model.lm.layers.2.mlp.up", "up"]
    found = match_modules(["model.layers.1.mlp.up", "layers.2.mlp.up"], modules)
    assert found == {"model.layers.1.mlp.up": "layers.1.mlp.up", "layers.2.mlp.up": "model.lm.layers.2.mlp.up"}
    with pytest.raises(RocketError, match=r"model\.layers\.3\.mlp\.up is compressed"):
        match_modules(["model.layers.3.mlp.up"], modules)


def test_opens_from_the_current_directory(saved, monkeypatch, token_ids):
    monkeypatch.chdir(saved)
    here = AutoModelForCausalLM.from_pretrained(".")
    assert torch.equal(here(token_ids).logits, AutoModelForCausalLM.from_pretrained(saved)(token_ids).logits)


def test_opens_from_a_cache_beside_the_current_directory(saved, tmp_path, monkeypatch):
    repository = tmp_path / "hub" / "models--org--name"
    shutil.copytree(saved, repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    AutoModelForCausalLM.from_pretrained("org/name", cache_dir="../hub", local_files_only=True)


def test_index_of_the_hub_that_leads_outside():
    cached = Path("/home/me/hub/models--org--name/snapshots/0123")
    check_places("org/name", [cached / "model.safetensors"])
    for place in (cached / "../4567/model.safetensors", Path("/mirror/name/../other/model.safetensors")):
        with pytest.raises(RocketError, match="which is not in it"):
            check_places("org/name", [place])


def test_opens_a_part_of_what_was_saved(tmp_path, quick_settings):
    sizes = {"vocab_size": 61, "d_model": 32, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 4}
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).eval()
    ids = torch.randint(3, 60, (8, 16), generator=torch.Generator().manual_seed(0))
    calib, profiling = quick_settings
    small = rocket.compress(model, rocket.plan(model, ids, calib=calib, profiling=profiling).at(removed_ratio=0.3))
    small.save_pretrained(tmp_path / "whole")
    encoder = T5EncoderModel.from_pretrained(tmp_path / "whole")
    assert torch.equal(encoder(ids).last_hidden_state, small.encoder(ids).last_hidden_state)
    encoder.save_pretrained(tmp_path / "part")
    modules = json.loads((tmp_path / "part" / "config.json").read_text())["quantization_config"]["modules"]
    assert modules.keys() == {n for n, layer in encoder.named_modules() if isinstance(layer, CompressedLinear)}
    again = T5EncoderModel.from_pretrained(tmp_path / "part")
    assert torch.equal(again(ids).last_hidden_state, encoder(ids).last_hidden_state)


def test_config_json_names_layers_as_the_class_that_saves_them_does(saved, tmp_path):
    AutoModel.from_pretrained(saved).save_pretrained(tmp_path / "bare")
    modules = json.loads((tmp_path / "bare" / "config.json").read_text())["quantization_config"]["modules"]
    stored = load_file(tmp_path / "bare" / "model.safetensors")
    assert all(f"{name}.weight" in stored for name in modules)
    named = {*modules, *(spec["input_group"] for spec in modules.values())}
    assert not any(name.startswith("model.") for name in named)


def test_tensor_parallel_is_refused(saved):
    model = AutoModelForCausalLM.from_pretrained(saved)
    refuse_parallel(model)
    model.config.distributed_config = SimpleNamespace(tp_plan=None, tp_size=1)  # as it is without
    refuse_parallel(model)
    model.config.distributed_config = SimpleNamespace(tp_plan="auto", tp_size=1)
    with pytest.raises(RocketError, match="do not run tensor-parallel"):
        refuse_parallel(model)

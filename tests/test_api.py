"""plan -> compress -> save -> load, from Python, on a model in memory."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

import rocket
from rocket.config.schema import CalibConfig, ProfilingConfig


def test_the_readmes_lines(make_model, byte_tokenizer, texts, quick_settings, aligned, tmp_path):
    model = make_model("llama")
    calib, profiling = quick_settings
    planner = rocket.plan(model, texts, byte_tokenizer, calib=calib, profiling=profiling)
    assert [point.cost for point in planner.curve()] == sorted(point.cost for point in planner.curve())
    small = rocket.compress(model, planner.at(removed_ratio=0.3))
    small.save_pretrained(tmp_path)
    again = aligned(AutoModelForCausalLM.from_pretrained(tmp_path))
    ids = torch.arange(1, 20)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, small(ids).logits)
        assert not torch.equal(model(ids).logits, small(ids).logits)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt_oss", "mixtral"])
def test_planning_leaves_the_model_as_it_is(make_model, token_ids, quick_settings, family, training):
    model = make_model(family).train(training)
    model.model.embed_tokens.weight.requires_grad_(False)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parameters = [(name, id(parameter), parameter.requires_grad) for name, parameter in model.named_parameters()]
    implementation = getattr(model.config, "_experts_implementation", None)
    calib, profiling = quick_settings
    rocket.plan(model, token_ids, calib=calib, profiling=profiling)
    assert model.training == training
    after = [(name, id(parameter), parameter.requires_grad) for name, parameter in model.named_parameters()]
    assert after == parameters
    assert getattr(model.config, "_experts_implementation", None) == implementation
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_planning_leaves_the_mode_of_each_submodule(make_model, token_ids, quick_settings):
    model = make_model("llama").train()
    model.model.layers[0].eval()
    calib, profiling = quick_settings
    rocket.plan(model, token_ids, calib=calib, profiling=profiling)
    assert model.training
    assert not model.model.layers[0].training


def test_targets_and_ignore(make_model, token_ids, quick_settings):
    calib, profiling = quick_settings
    options = {"calib": calib, "profiling": profiling}
    planner = rocket.plan(make_model("llama"), token_ids, targets=["mlp.up_proj"], ignore=[r"re:.*\.1\."], **options)
    assert [profile.layer for profile in planner.profiles] == ["model.layers.0.mlp.up_proj"]
    with pytest.raises(rocket.RocketError, match="matches no layer"):
        rocket.plan(make_model("llama"), token_ids, targets=["query"], **options)


def test_costs_without_a_backward_pass(make_model, token_ids):
    profiling = ProfilingConfig(cost="weight", forms=["low_rank"], removed_ratios=[0.2, 0.5])
    planner = rocket.plan(make_model("llama"), token_ids, calib=CalibConfig(num_samples=16), profiling=profiling)
    assert planner.calibration.sensitivities == {}
    assert {option.form for profile in planner.profiles for option in profile.options} == {"dense", "low_rank"}


def test_the_predicted_loss_is_about_the_measured_one(make_model, token_ids):
    """Δloss ≈ Σ ½ φ_j ‖S δ_j‖² to a small factor, for small changes; here of a model of random weights."""
    model = make_model("llama", torch.float64, initializer_range=0.08)
    profiling = ProfilingConfig(forms=["sparse"], removed_ratios=[0.05, 0.1, 0.2])
    planner = rocket.plan(model, token_ids, calib=CalibConfig(sensitivity_samples=16), profiling=profiling)
    plan = planner.at(removed_ratio=0.1)
    small = rocket.compress(model, plan)
    with torch.no_grad():
        original, compressed = model(token_ids).logits.log_softmax(-1), small(token_ids).logits.log_softmax(-1)
        divergence = (original.exp() * (original - compressed)).sum(-1).mean()
    assert 0.2 * plan.cost < float(divergence) < 5 * plan.cost


def test_one_text_is_a_text(make_model, byte_tokenizer, texts, quick_settings):
    calib, profiling = quick_settings
    model, text = make_model("llama"), " ".join(texts)
    one = rocket.plan(model, text, byte_tokenizer, calib=calib, profiling=profiling)
    other = rocket.plan(model, [text], byte_tokenizer, calib=calib, profiling=profiling)
    assert [profile.options for profile in one.profiles] == [profile.options for profile in other.profiles]


def test_one_batch_is_a_batch(make_model, token_ids, quick_settings):
    calib, profiling = quick_settings
    planner = rocket.plan(make_model("llama"), {"input_ids": token_ids[:4]}, calib=calib, profiling=profiling)
    assert set(planner.calibration.tokens.values()) == {token_ids[:4].numel()}


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        ((text for text in "ab"), "calibration is a generator; give texts"),
        ([[1, 2, 3]], "calibration holds list objects; give texts"),
        ([{"text": "a row of a data set"}], "calibration holds dict objects; give texts"),
        (["a text", {"input_ids": torch.ones(1, 2)}], "calibration holds str objects; give texts"),
        ([], "calibration is empty"),
        (torch.arange(9), r"calibration is torch.int64 \[9\]; token ids are integers \[samples, seq_len\]"),
        (torch.rand(2, 9), "calibration is torch.float32"),
        (torch.full((2, 9), 10_000), "calibration has token ids from 10000 to 10000, the model 257 tokens"),
    ],
)
def test_calibration_of_another_kind(make_model, calibration, message):
    with pytest.raises(ValueError, match=message):
        rocket.plan(make_model("llama"), calibration)


def test_what_is_not_in_memory_is_refused(make_model, token_ids, quick_settings):
    calib, profiling = quick_settings
    model = make_model("llama")
    planner = rocket.plan(model, token_ids, calib=calib, profiling=profiling)
    small = rocket.compress(model, planner.at(removed_ratio=0.3))
    for part in (model, small):
        part.model.layers[1].to("meta")
    with pytest.raises(rocket.RocketError, match=r"model\.layers\.1\..* is on disk or offloaded, not in memory"):
        rocket.plan(model, token_ids, calib=calib, profiling=profiling)
    with pytest.raises(rocket.RocketError, match="not in memory"):
        rocket.merge(small)


def test_layers_in_two_places_stay(make_model, token_ids, quick_settings):
    calib, profiling = quick_settings
    model = make_model("llama")
    model.model.layers[1].mlp = model.model.layers[0].mlp
    planner = rocket.plan(model, token_ids, calib=calib, profiling=profiling)
    assert {profile.layer.split(".")[3] for profile in planner.profiles} == {"self_attn"}


def test_texts_need_a_tokenizer(make_model, texts):
    with pytest.raises(ValueError, match="calibration texts need the tokenizer"):
        rocket.plan(make_model("llama"), texts)


def test_texts_take_the_tokenizer_of_a_processor(make_model, byte_tokenizer, texts, quick_settings):
    calib, profiling = quick_settings
    processor = SimpleNamespace(tokenizer=byte_tokenizer, image_processor=None)
    planner = rocket.plan(make_model("llama"), texts, processor=processor, calib=calib, profiling=profiling)
    assert planner.profiles


def test_text_shorter_than_a_sequence(make_model, byte_tokenizer):
    with pytest.raises(rocket.RocketError, match="shorter than one sequence of seq_len=512"):
        rocket.plan(make_model("llama"), ["too short"], byte_tokenizer)

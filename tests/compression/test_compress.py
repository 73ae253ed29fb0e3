"""From a plan to a compressed model: each layer what the plan says, the original as it was."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import rocket
from rocket.allocation import Plan
from rocket.config.errors import RocketError
from rocket.forms import Option
from rocket.nn import LAYERS, CompressedLinear, Int8Linear


@pytest.fixture(scope="module")
def plan(planned) -> Plan:
    """All forms and dense in turn, so that each is seen."""
    forms = ["dictionary", "low_rank", "sparse", "dense", "sparse_low_rank"]
    choices = {}
    for number, profile in enumerate(planned.planner.profiles):
        form = forms[number % len(forms)]
        choices[profile.layer] = next(option for option in profile.options[::-1] if option.form == form)
    return replace(planned.planner.at(removed_ratio=0.3), choices=choices)


def test_every_layer_is_what_the_plan_says(planned, plan):
    compressed = rocket.compress(planned.model, plan)
    for name, option in plan.choices.items():
        layer, original = compressed.get_submodule(name), planned.model.get_submodule(name)
        if option.form == "dense":
            assert type(layer) is nn.Linear
            assert torch.equal(layer.weight, original.weight)
            continue
        assert type(layer) is LAYERS[option.form]
        assert (layer.spec.rank, layer.spec.nnz) == (option.rank, option.nnz)
        assert layer.spec.input_group == plan.input_groups[name]
        assert layer.stored_values() == option.parameters
        problem = plan.calibration.problem(name, original.weight, plan.profiling)
        # Prices are interpolated, and what iterations and refits gain is foretold.
        assert 0 < problem.evaluate(layer.dense_weight().detach()) <= 1.15 * option.cost
    assert not any(parameter.is_meta for parameter in compressed.parameters())


def assert_agree(logits: torch.Tensor, expected: torch.Tensor) -> None:
    if expected.dtype == torch.float32:
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert (logits - expected).norm() <= 0.04 * expected.norm()  # in bfloat16 single ones round by more


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_within_a_budget_of_bytes(make_model, token_ids, quick_settings, dtype, tmp_path):
    """Sizes on disk are the plan's; products, reloading and merging agree with what the layers stand for."""
    calib, profiling = quick_settings
    model = make_model("llama", dtype=dtype, hidden_size=64)
    profiling = profiling.model_copy(update={"precisions": ["float", "int8"]})
    planner = rocket.plan(model, token_ids, calib=calib, profiling=profiling)
    plan = planner.at(bytes=0.6 * planner.size.bytes)
    assert plan.bytes <= 0.6 * planner.size.bytes
    assert "int8" in {option.precision for option in plan.choices.values()}
    compressed = rocket.compress(model, plan)
    state = compressed.state_dict()
    assert sum(tensor.numel() * tensor.element_size() for tensor in state.values()) == plan.bytes

    compressed.save_pretrained(tmp_path)
    reopened = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert all(torch.equal(tensor, reopened.state_dict()[name]) for name, tensor in state.items())
    assert sum(file.stat().st_size for file in tmp_path.glob("*.safetensors")) < 1.05 * plan.bytes + 20_000
    inputs = token_ids[:2]
    with torch.no_grad():
        expected = compressed(input_ids=inputs).logits
        assert torch.equal(reopened(input_ids=inputs).logits, expected)
        for backend in ("auto", "trivial"):
            rocket.optimize(reopened, backend)
            assert_agree(reopened(input_ids=inputs[:, :5]).logits, expected[:, :5])
            assert_agree(reopened(input_ids=inputs).logits, expected)
        assert_agree(rocket.merge(compressed)(input_ids=inputs).logits, expected)


def test_without_float_every_layer_is_int8(make_model, token_ids, quick_settings):
    calib, profiling = quick_settings
    model = make_model("llama")
    planner = rocket.plan(
        model, token_ids, calib=calib, profiling=profiling.model_copy(update={"precisions": ["int8"]})
    )
    plan = planner.at(removed_ratio=0.01)
    compressed = rocket.compress(model, plan)
    assert all(compressed.get_submodule(name).spec.precision == "int8" for name in plan.choices)
    assert any(type(module) is Int8Linear for module in compressed.modules())


def test_the_original_is_untouched(planned, plan):
    before = {name: tensor.clone() for name, tensor in planned.model.state_dict().items()}
    with torch.no_grad():
        logits = planned.model(input_ids=planned.tokens[:2]).logits
    compressed = rocket.compress(planned.model, plan)
    with torch.no_grad():
        assert torch.equal(planned.model(input_ids=planned.tokens[:2]).logits, logits)
        compressed.model.norm.weight.zero_()  # nothing is shared
    after = planned.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert not hasattr(planned.model.config, "quantization_config")
    assert getattr(planned.model, "hf_quantizer", None) is None


def test_what_is_frozen_stays_frozen(make_model, plan):
    model = make_model("llama").requires_grad_(False)
    model.model.layers[0].requires_grad_(True)
    small = rocket.compress(model, plan)
    compressed = {name for name, module in small.named_modules() if isinstance(module, CompressedLinear)}
    for name, parameter in small.named_parameters():
        assert parameter.requires_grad == ("layers.0." in name), name
    assert any("layers.0." in name for name in compressed)
    assert any("layers.1." in name for name in compressed)


@pytest.mark.parametrize("plan", [0.3, None])
def test_what_is_no_plan(make_model, plan):
    with pytest.raises(RocketError, match=r"the plan is a (float|NoneType); give rocket\.plan"):
        rocket.compress(make_model("llama"), plan)


def test_in_place(make_model, plan):
    model = make_model("llama")
    assert rocket.compress(model, plan, inplace=True) is model
    assert any(isinstance(module, CompressedLinear) for module in model.modules())


def test_twice_the_same(make_model, plan):
    states = [rocket.compress(make_model("llama"), plan, inplace=True).state_dict() for _ in range(2)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_biases_and_modes_are_kept(make_model, token_ids, quick_settings):
    model = make_model("opt").train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    calib, profiling = quick_settings
    planner = rocket.plan(model, token_ids, calib=calib, profiling=profiling)
    assert model.training
    compressed = rocket.compress(model, planner.at(removed_ratio=0.3))
    for name in planner.at(removed_ratio=0.3).choices:
        layer = compressed.get_submodule(name)
        assert layer.training
        assert torch.equal(layer.bias, model.get_submodule(name).bias)


def dense_only(plan: Plan) -> Plan:
    return replace(plan, choices={name: Option("dense", 1, 0, 0.0) for name in plan.choices})


def renamed(plan: Plan, name: str) -> Plan:
    option = next(option for option in plan.choices.values() if option.form != "dense")
    return replace(plan, choices={name: option}, input_groups={name: name})


def changed(plan: Plan, **fields: int) -> Plan:
    """A plan of one dictionary layer, 32 x 32, that says something else of it."""
    name = next(name for name, option in plan.choices.items() if option.form == "dictionary")
    option = replace(plan.choices[name], rank=1, nnz=32, parameters=64)
    return replace(plan, choices={name: replace(option, **fields)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dense_only, "the plan leaves every layer dense; there is nothing to compress"),
        (lambda plan: replace(plan, calibration=None), "pass the calibration it was made with"),
        (
            lambda plan: renamed(plan, "model.layers.9.mlp"),
            r"names model\.layers\.9\.mlp, which this model does not have",
        ),
        (lambda plan: changed(plan, form="magic"), r"unknown layer form 'magic'"),
        (lambda plan: changed(plan, rank=33), r"model\.layers\.0\..*: rank=33 is impossible"),
        (lambda plan: changed(plan, rank=0), r"model\.layers\.0\..*: rank=0 is impossible"),
        (lambda plan: changed(plan, nnz=10**9), r"model\.layers\.0\..*: nnz=1000000000 is impossible"),
        (lambda plan: changed(plan, scales=7), r"the plan counts 7 scales where its form and rank make 33"),
        (lambda plan: changed(plan, parameters=7), r"model\.layers\.0\..*: the plan counts 7 values where"),
        (lambda plan: changed(plan, rank=2, nnz=33, parameters=97), r"nnz=33 is not the same number of coefficients"),
        (lambda plan: renamed(plan, "model.norm"), r"names model\.norm, which is a LlamaRMSNorm here, not a linear"),
    ],
)
def test_plan_and_model_that_do_not_belong_together(planned, plan, change, message):
    with pytest.raises(RocketError, match=message):
        rocket.compress(planned.model, change(plan))


def test_a_compressed_model_is_not_compressed_again(planned, plan):
    with pytest.raises(RocketError, match=r"which is a .* here, not a linear layer"):
        rocket.compress(rocket.compress(planned.model, plan), plan)


def test_built_tensors_of_another_plan(planned, plan):
    built = {name: {"weight": torch.ones(3)} for name in plan.choices}
    with pytest.raises(RocketError, match=r"model\.layers\.0\..*: its tensors are not those of the plan \(") as error:
        rocket.compress(planned.model, plan, built=built)
    assert "\n" not in str(error.value)

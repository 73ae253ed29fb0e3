"""`optimize`: the same results by the kernels, on whole models, and back."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from transformers import AutoModelForCausalLM

import rocket
from rocket.kernels import library
from rocket.nn.optimize import DenseLinear

FORMS = ["low_rank", "dictionary", "sparse", "sparse_low_rank", "dense"]
needs_kernels = pytest.mark.skipif(library.load() is None, reason="needs the compiled kernels")


@pytest.fixture
def saved(save_compressed):
    """The checkpoint of a family in which every form occurs."""
    return lambda family: save_compressed(family, *FORMS)


@pytest.fixture(params=["llama", "qwen2", "opt", "gpt2"])  # all but llama have biases
def path(request, saved):
    return saved(request.param)


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize("rows", [1, 16])
def test_same_logits_in_float32(path, token_ids, rows):
    model = AutoModelForCausalLM.from_pretrained(path)
    ids = token_ids[:rows, : 1 if rows == 1 else None]
    expected = logits(model, ids)
    assert model.optimize() is model
    found = logits(model, ids)
    assert (found - expected).norm() <= 1e-5 * expected.norm()


def test_same_logits_in_bfloat16_within_its_rounding(saved, token_ids):
    model = AutoModelForCausalLM.from_pretrained(saved("llama"), dtype=torch.bfloat16)
    exact = logits(AutoModelForCausalLM.from_pretrained(saved("llama")), token_ids[:1])
    before = (logits(model, token_ids[:1]).float() - exact).norm()
    after = (logits(model.optimize(), token_ids[:1]).float() - exact).norm()
    assert after <= 2.0 * before


def test_generation_is_token_identical_in_float32(path, token_ids):
    model = AutoModelForCausalLM.from_pretrained(path)
    options = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False}
    expected = model.generate(token_ids[:2, :8], **options)
    assert torch.equal(model.optimize().generate(token_ids[:2, :8], **options), expected)


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("optimized", "dtype"),
    [(True, torch.float32), (True, torch.bfloat16), (True, torch.float16), (False, torch.bfloat16)],
)
def test_opens_optimizes_and_compiles_to_one_graph(saved, token_ids, optimized, dtype, device):
    """The way that the paper's authors show: device_map, torch_dtype, optimize(), torch.compile."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    model = AutoModelForCausalLM.from_pretrained(saved("llama"), device_map=device, torch_dtype=dtype)
    ids = token_ids[:1].to(device)
    expected = logits(model, ids)
    if optimized:
        model.optimize()
    torch._dynamo.reset()
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    with torch.no_grad():
        found = compiled(input_ids=ids, use_cache=False).logits
    tolerance = 1e-4 if dtype == torch.float32 else 0.1 * float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=tolerance)


def test_what_is_saved_does_not_change(path, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(path)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.optimize().save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert before.keys() == again.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in before.items())


@needs_kernels
def test_twice_is_once_and_trivial_takes_it_back(saved, token_ids):
    model = AutoModelForCausalLM.from_pretrained(saved("llama"))
    kinds = [type(module) for module in model.modules()]
    expected = logits(model, token_ids[:1])
    model.optimize()
    modules = list(model.modules())
    assert [type(module) for module in modules] != kinds
    assert list(model.optimize().modules()) == modules
    model.optimize(backend="trivial")
    assert [type(module) for module in model.modules()] == kinds
    assert torch.equal(logits(model, token_ids[:1]), expected)


@needs_kernels
def test_tied_embeddings_stay_tied(saved):
    model = AutoModelForCausalLM.from_pretrained(saved("qwen2")).optimize()
    assert isinstance(model.lm_head, DenseLinear)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_gradients_flow_as_before(saved, token_ids):
    model = AutoModelForCausalLM.from_pretrained(saved("llama"))
    model(input_ids=token_ids[:2], labels=token_ids[:2]).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    model.optimize()(input_ids=token_ids[:2], labels=token_ids[:2]).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name])


def test_a_trainable_bias_alone_gets_its_gradient(saved, token_ids):
    model = AutoModelForCausalLM.from_pretrained(saved("qwen2")).optimize().requires_grad_(False)
    bias = model.model.layers[0].self_attn.q_proj.bias.requires_grad_()
    model(input_ids=token_ids[:1], labels=token_ids[:1]).loss.backward()
    assert bias.grad is not None
    assert bias.grad.any()


def test_autocast_is_followed(path, token_ids):
    model = AutoModelForCausalLM.from_pretrained(path)
    with torch.autocast("cpu", torch.bfloat16):
        expected = logits(model, token_ids[:1])
        found = logits(model.optimize(), token_ids[:1])
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected)


def test_pickles_and_is_freed(path, token_ids):
    model = AutoModelForCausalLM.from_pretrained(path).optimize()
    again = pickle.loads(pickle.dumps(model))
    assert again.optimize() is again
    torch.testing.assert_close(logits(again, token_ids[:1]), logits(model, token_ids[:1]))
    copied = copy.deepcopy(model)
    assert copied.optimize() is copied
    gc.collect()
    gc.disable()
    try:
        watch = weakref.ref(copied)
        del copied
        assert watch() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("compressed_here", [True, False])
def test_a_pickle_brings_optimize_along(saved, planned, monkeypatch, compressed_here):
    """Another process has opened no model of this class."""
    if compressed_here:
        model = rocket.compress(planned.model, planned.planner.at(removed_ratio=0.2))
    else:
        model = AutoModelForCausalLM.from_pretrained(saved("llama"))
    content = pickle.dumps(model)
    monkeypatch.delattr(type(model), "optimize")
    again = pickle.loads(content)
    assert again.optimize() is again


def test_merges_to_plain_layers(path, token_ids):
    model = AutoModelForCausalLM.from_pretrained(path)
    expected = logits(model, token_ids[:1])
    merged = rocket.merge(model.optimize())
    assert {type(module) for module in merged.modules() if isinstance(module, nn.Linear)} == {nn.Linear}
    torch.testing.assert_close(logits(merged, token_ids[:1]), expected, rtol=1e-4, atol=1e-4)


@needs_kernels
def test_an_optimized_model_can_be_planned(make_model, token_ids, quick_settings):
    calib, profiling = quick_settings
    model = make_model("llama")
    expected = rocket.plan(model, token_ids, calib=calib, profiling=profiling).at(removed_ratio=0.3)
    plan = rocket.plan(rocket.optimize(model), token_ids, calib=calib, profiling=profiling).at(removed_ratio=0.3)
    assert plan.choices.keys() == expected.choices.keys()
    assert plan.cost == pytest.approx(expected.cost, rel=1e-3)
    assert rocket.merge(rocket.compress(model, plan)).num_parameters() == model.num_parameters()


@needs_kernels
def test_explains_each_layer(saved):
    model = AutoModelForCausalLM.from_pretrained(saved("llama"))
    assert {entry.path for entry in rocket.explain(model)} == {"torch"}
    kernel = library.PATHS[library.load().path]
    entries = {entry.layer: entry for entry in rocket.explain(model.optimize())}
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert {entries[name].form for name in linear} == {"dense"}
    assert {entry.form for entry in entries.values()} == set(FORMS)
    assert {entry.path for entry in entries.values()} == {kernel}
    assert kernel in str(entries["lm_head"])


@needs_kernels
def test_parametrized_layers_are_explained(saved):
    model = AutoModelForCausalLM.from_pretrained(saved("llama")).optimize()
    name, layer = next((name, module) for name, module in model.named_modules() if hasattr(module, "mask"))
    parametrize.register_parametrization(layer, "weight", nn.Identity())
    entry = next(entry for entry in rocket.explain(model) if entry.layer == name)
    assert (entry.path, entry.reason) == ("torch", "its weight is made of other tensors")


@needs_kernels
def test_layers_with_hooks_are_left_alone(make_model):
    model = make_model("llama")
    model.lm_head.register_forward_hook(lambda *_: None)
    rocket.optimize(model)
    assert type(model.lm_head) is nn.Linear
    entry = next(entry for entry in rocket.explain(model) if entry.layer == "lm_head")
    assert entry.reason == "hooks are attached to it"


@needs_kernels
@pytest.mark.parametrize("optimized_first", [True, False])
def test_weights_that_are_no_plain_memory_go_by_torch(make_model, token_ids, make_odd, optimized_first):
    model = make_model("llama")
    expected = logits(model, token_ids[:1, :4])
    if optimized_first:
        logits(rocket.optimize(model), token_ids[:1, :4])
    model.lm_head.weight = make_odd(model.lm_head.weight)
    rocket.optimize(model)
    assert (type(model.lm_head) is DenseLinear) == optimized_first
    torch.testing.assert_close(logits(model, token_ids[:1, :4]), expected, rtol=1e-4, atol=1e-4)
    entry = next(entry for entry in rocket.explain(model) if entry.layer == "lm_head")
    assert entry.path == "torch"
    assert entry.reason in ("its weight is of class Wrapped", "its weight is not contiguous")


@needs_kernels
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.parametrize("optimized_first", [True, False])
@torch.no_grad()
def test_a_sparse_weight_of_torch_goes_by_torch(optimized_first):
    model, x = nn.Sequential(nn.Linear(4, 3)), torch.randn(1, 4)
    expected = model(x)
    if optimized_first:
        rocket.optimize(model)
    model[0].weight = nn.Parameter(model[0].weight.to_sparse_csr(), requires_grad=False)
    torch.testing.assert_close(rocket.optimize(model)(x), expected)
    assert [entry.reason for entry in rocket.explain(model)] == ["its weight is of layout torch.sparse_csr"]


@needs_kernels
def test_types_without_a_kernel_are_left_alone(make_model):
    model = rocket.optimize(make_model("llama", torch.float64))
    assert "no kernel for torch.float64" in str(rocket.explain(model)[0])


def test_unknown_backend():
    with pytest.raises(ValueError, match="backend='cuda': there are 'auto', 'trivial' and 'macko'"):
        rocket.optimize(nn.Linear(2, 2), backend="cuda")

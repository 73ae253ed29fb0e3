"""Packed layers of one input multiply together; nothing else changes."""

import copy
import gc
import weakref

import accelerate
import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.nn.utils import prune
from transformers import AutoModelForCausalLM

import rocket
from rocket.kernels import cpu, ops
from rocket.nn.layers import PackedLinear

KINDS = [
    ("llama", "sparse"),
    ("qwen2", "sparse"),  # its q, k and v have biases
    ("llama", "sparse_low_rank"),
    ("qwen2", "sparse_low_rank", "sparse", "dictionary"),
]


@pytest.fixture(params=KINDS, ids="-".join)
def model(request, save_compressed):
    return AutoModelForCausalLM.from_pretrained(save_compressed(*request.param))


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def groups(model):
    layers = [module for module in model.modules() if isinstance(module, PackedLinear)]
    return {id(layer.shared_input): layer.shared_input for layer in layers if layer.shared_input is not None}


def test_layers_of_one_input_multiply_together(model, token_ids, monkeypatch):
    blocks = model.config.num_hidden_layers
    expected = logits(model, token_ids[:1, :3])
    model.optimize()
    assert (
        sorted(len(group.layers) for group in groups(model).values())
        == [1] * (2 * blocks) + [2] * blocks + [3] * blocks
    )
    calls = []
    for owner, name in (
        (cpu.PackedProducts, "__call__"),
        (ops, "sparse_linear"),
        (ops, "factor_linear"),
        (ops, "packed_linears"),
    ):
        product = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, product=product: calls.append(args) or product(*args))
    torch.testing.assert_close(logits(model, token_ids[:1, :3]), expected, rtol=1e-5, atol=1e-5)
    assert len(calls) == 4 * blocks  # q k v, o, gate up, down
    assert all(group._pending is None for group in groups(model).values())


def test_many_rows_multiply_apart(model, token_ids):
    expected = logits(model, token_ids[:4])
    torch.testing.assert_close(logits(model.optimize(), token_ids[:4]), expected, rtol=1e-5, atol=1e-5)


def test_tensors_stay_where_they_are(model):
    before = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    assert {name: tensor.data_ptr() for name, tensor in model.optimize().state_dict().items()} == before


def test_any_order_and_any_input_is_right(model):
    group = next(iter(groups(model.optimize()).values()))
    first, second = group.layers[:2]
    x, y = torch.randn(2, 1, first.in_features)
    with torch.no_grad():
        apart = {(layer, z): layer.dense_weight() @ z[0] for layer in (first, second) for z in (x, y)}
        bias = {layer: 0 if layer.bias is None else layer.bias for layer in (first, second)}
        for layer, z in [(second, x), (first, y), (first, y), (second, y), (second, x), (first, x)]:
            torch.testing.assert_close(layer(z)[0], apart[layer, z] + bias[layer], rtol=1e-5, atol=1e-5)


def test_copies_part_and_can_join_again(model, token_ids):
    model.optimize()
    copied = copy.deepcopy(model)
    assert not groups(copied)
    torch.testing.assert_close(logits(copied, token_ids[:1, :2]), logits(model, token_ids[:1, :2]))
    assert len(groups(copied.optimize())) == len(groups(model))
    model.optimize(backend="trivial")
    assert not groups(model)


def test_other_types_stay_together_and_a_layer_of_another_type_multiplies_apart(model, token_ids):
    model.optimize().to(torch.bfloat16)
    assert groups(model)
    assert logits(model, token_ids[:1, :2]).dtype == torch.bfloat16
    group = next(iter(groups(model).values()))
    first, second = group.layers[:2]
    first.to(torch.float32)
    for layer in (first, second):
        x = torch.randn(1, layer.in_features).to(layer.weight.dtype)
        torch.testing.assert_close(out_of(layer, x), plain(layer, x), rtol=2e-2, atol=1e-3)


def test_saves_and_reopens(model, token_ids, tmp_path):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.optimize().save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in before.items())


def test_compiles_to_one_graph(model, token_ids):
    expected = logits(model, token_ids[:1, :4])
    model.optimize()
    torch._dynamo.reset()
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    for _ in range(2):
        with torch.no_grad():
            found = compiled(input_ids=token_ids[:1, :4], use_cache=False).logits
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert all(group._pending is None for group in groups(model).values())


class Logits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(input_ids=ids, use_cache=False).logits


@torch.no_grad()
def test_exports_with_dynamic_shapes(model, token_ids):
    """One graph for few rows of input, which the kernels multiply directly, and for many."""
    whole = Logits(model.optimize()).eval()
    shapes = ({0: torch.export.Dim("batch", min=2, max=64), 1: torch.export.Dim("length", min=2, max=100)},)
    exported = torch.export.export(whole, (token_ids[:2, :6].clone(),), dynamic_shapes=shapes).module()
    for ids in (token_ids[:2, :3], token_ids[:3, :20]):
        torch.testing.assert_close(exported(ids), logits(model, ids), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_compiles_to_one_graph_for_few_rows_and_many(model, token_ids):
    torch._dynamo.reset()
    graphs = CompileCounter()
    compiled = torch.compile(Logits(model.optimize()).eval(), backend=graphs, dynamic=True)
    for length in (3, 9, 30):
        ids = token_ids[:2, :length]
        torch.testing.assert_close(compiled(ids), logits(model, ids), rtol=1e-4, atol=1e-4)
    assert graphs.frame_count == 1


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("backend", ["auto", "trivial"])
def test_is_traced(model, token_ids, backend):
    rocket.optimize(model, backend)
    traced = torch.jit.trace(Logits(model).eval(), token_ids[:1, :4])
    ids = token_ids[1:2, :4]
    torch.testing.assert_close(traced(ids), logits(model, ids), rtol=1e-4, atol=1e-4)


def test_is_explained(model):
    entries = {entry.layer: entry for entry in rocket.explain(model.optimize())}
    entry = next(entry for name, entry in entries.items() if name.endswith("gate_proj"))
    assert "one product for 2 layers" in entry.reason


def out_of(layer, x):
    with torch.no_grad():
        return layer(x)


def plain(layer, x):
    with torch.no_grad():
        return torch.nn.functional.linear(x, layer.dense_weight(), layer.bias)


@pytest.fixture
def group(model):
    return next(iter(groups(model.optimize()).values()))


def set_weight_in_place(layer):
    layer.weight.data.mul_(2.0)


def set_weight_data(layer):
    layer.weight.data = 2.0 * layer.weight.data


def set_bias_in_place(layer):
    if layer.bias is not None:
        layer.bias.data.add_(5.0)


def load_state(layer):
    mask = layer.mask.flip(0)
    layer.load_state_dict({**layer.state_dict(), "mask": mask, "weight": 3.0 * layer.weight.detach()})


def load_state_by_assignment(layer):
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer.load_state_dict({**state, "weight": 3.0 * state["weight"]}, assign=True)


def parametrize_weight(layer):
    torch.nn.utils.parametrize.register_parametrization(layer, "weight", Doubled())


def parametrize_dictionary(layer):
    if not layer.spec.rank:
        pytest.skip("the layer has no dictionary")
    torch.nn.utils.parametrize.register_parametrization(layer, "dictionary", Doubled())


def set_dictionary_in_place(layer):
    if not layer.spec.rank:
        pytest.skip("the layer has no dictionary")
    layer.dictionary.data.mul_(2.0)


def prune_bias(layer):
    if layer.bias is None:
        pytest.skip("the layer has no bias")
    prune.random_unstructured(layer, "bias", 0.5)


class Doubled(torch.nn.Module):
    def forward(self, weight):
        return 2.0 * weight


CHANGES = [
    *(set_weight_in_place, set_weight_data, set_dictionary_in_place, set_bias_in_place),
    *(load_state, load_state_by_assignment),
]


@pytest.mark.parametrize("change", [*CHANGES, parametrize_weight, parametrize_dictionary, prune_bias])
def test_changed_tensors_count(group, change):
    first, second = group.layers[:2]
    x = torch.randn(1, first.in_features)
    out_of(first, x)
    change(second)
    x = torch.randn(1, first.in_features)
    for layer in (first, second):
        torch.testing.assert_close(out_of(layer, x), plain(layer, x), rtol=1e-5, atol=1e-5)


def test_a_layer_that_trains_does_not_make_its_mates_train(group):
    first, second = group.layers[:2]
    first.requires_grad_(False)
    x = torch.randn(1, first.in_features)
    torch.testing.assert_close(first(x), plain(first, x), rtol=1e-5, atol=1e-5)
    assert not first(x).requires_grad
    assert second(x).requires_grad


def test_a_layer_whose_tensors_do_not_fit_fails_alone(group):
    first, second = group.layers[:2]
    second.weight_scale = torch.nn.Parameter(torch.ones(3))
    x = torch.randn(1, first.in_features)
    torch.testing.assert_close(out_of(first, x), plain(first, x), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="int8 needs a scale"):
        out_of(second, x)


def test_a_weight_that_is_no_plain_memory_any_more(group, make_odd):
    first, second = group.layers[:2]
    x = torch.randn(1, first.in_features)
    expected = [out_of(layer, x) for layer in (first, second)]
    second.weight = make_odd(second.weight)
    for layers in ((first, second), (second, first)):
        y = x.clone()
        found = {layer: out_of(layer, y) for layer in layers}
        torch.testing.assert_close([found[first], found[second]], expected, rtol=1e-5, atol=1e-5)


def test_an_input_changed_in_place_is_another_input(group):
    first, second = group.layers[:2]
    x = torch.randn(1, first.in_features)
    out_of(first, x)
    x.copy_(torch.randn_like(x))
    torch.testing.assert_close(out_of(second, x), plain(second, x), rtol=1e-5, atol=1e-5)


def test_parameters_stay_the_same_objects(model):
    before = list(model.parameters())
    model.optimize().to("cpu")
    assert groups(model)
    assert all(old is new for old, new in zip(before, model.parameters(), strict=True))
    model.optimize(backend="trivial")
    assert all(old is new for old, new in zip(before, model.parameters(), strict=True))


def test_offloaded_layers_are_left_alone(model, token_ids):
    expected = logits(model, token_ids[:1, :2])
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=True)
    model.optimize()
    assert not groups(model)
    torch.testing.assert_close(logits(model, token_ids[:1, :2]), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("change", CHANGES)
def test_changed_tensors_of_a_layer_alone_count(model, change):
    layer = next(group.layers[0] for group in groups(model.optimize()).values() if len(group.layers) == 1)
    x = torch.randn(1, layer.in_features)
    out_of(layer, x)
    change(layer)
    torch.testing.assert_close(out_of(layer, x), plain(layer, x), rtol=1e-5, atol=1e-5)


def test_a_tensor_cut_in_place_is_not_read_beyond(group):
    layer = group.layers[0]
    x = torch.randn(1, layer.in_features)
    out_of(layer, x)
    layer.weight.data = layer.weight.data[:10]
    with pytest.raises(RuntimeError, match="offsets and values disagree"):
        out_of(layer, x.clone())


def test_layers_of_a_group_can_part(group):
    first, second = group.layers[:2]
    x = torch.randn(1, first.in_features)
    expected = out_of(first, x).clone()
    second.to("meta")
    torch.testing.assert_close(out_of(first, x.clone()), expected)


def test_offloading_after_optimizing_keeps_nothing(model, token_ids, tmp_path):
    expected = logits(model, token_ids[:1, :2])
    references = [weakref.ref(parameter) for parameter in model.parameters()]
    model.optimize()
    logits(model, token_ids[:1, :2])
    accelerate.disk_offload(model, tmp_path, execution_device=torch.device("cpu"), offload_buffers=True)
    torch.testing.assert_close(logits(model, token_ids[:1, :2]), expected, rtol=1e-4, atol=1e-4)
    gc.collect()
    assert not any(reference() is not None and not reference().is_meta for reference in references)


def test_products_keep_no_tensors(group):
    layer = group.layers[0]
    out_of(layer, torch.randn(1, layer.in_features))
    reference = weakref.ref(layer.mask)
    layer.mask = layer.mask.clone()
    assert reference() is None


def test_mates_whose_tensors_are_elsewhere_do_not_matter(group):
    first, *mates = group.layers
    x = torch.randn(1, first.in_features)
    expected = plain(first, x)
    for layer in mates:
        layer.weight.data = layer.weight.new_empty(0)
    torch.testing.assert_close(out_of(first, x), expected)

"""Gram matrices from hooks, against numpy on the inputs that the layers really get."""

import weakref

import numpy as np
import pytest
import torch
from torch import nn

from rocket.calib import Calibration, collect_grams, pack_triangle, unpack_triangle
from rocket.calib.gram import GramAccumulator
from rocket.config.errors import RocketError
from rocket.config.schema import ProfilingConfig
from rocket.models import target_layers


def recorded_inputs(model, layers, batches, keep=None) -> dict[str, np.ndarray]:
    """Every token [n, in] that each layer reads, by hooks of our own; ``keep`` masks positions of each batch."""
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in layers}
    handles = [
        layer.register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[0].detach().clone()))
        for name, layer in layers.items()
    ]
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for handle in handles:
        handle.remove()
    keep = keep or [torch.ones(batch["input_ids"].shape, dtype=torch.bool) for batch in batches]
    return {
        name: np.concatenate([flat(inputs)[mask.flatten()].numpy() for inputs, mask in zip(tensors, keep, strict=True)])
        for name, tensors in seen.items()
    }


def flat(inputs: torch.Tensor) -> torch.Tensor:
    return inputs.reshape(-1, inputs.shape[-1]).double()


@pytest.fixture
def llama(make_model):
    model = make_model("llama")
    return model, target_layers(model)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "opt", "phi3"])
def test_gram_is_that_of_the_real_inputs(make_model, token_ids, family):
    model = make_model(family)
    layers = target_layers(model)
    batches = [{"input_ids": ids} for ids in token_ids.split(6)]  # the last batch is smaller
    calibration = collect_grams(model, layers, batches)
    assert set(calibration.inputs) == set(layers)
    for name, tokens in recorded_inputs(model, layers, batches).items():
        np.testing.assert_allclose(calibration.gram(name), tokens.T @ tokens / len(tokens), rtol=1e-3, atol=1e-5)
        assert calibration.tokens[calibration.inputs[name]] == token_ids.numel()


def test_padding_is_left_out(llama, token_ids):
    model, layers = llama
    mask = torch.ones_like(token_ids)
    mask[1, 20:], mask[2, :5] = 0, 0
    batch = {"input_ids": token_ids, "attention_mask": mask}
    calibration = collect_grams(model, layers, [batch])
    expected = recorded_inputs(model, layers, [batch], [mask.bool()])
    for name, tokens in expected.items():
        assert len(tokens) == token_ids.numel() - 17
        assert calibration.tokens[calibration.inputs[name]] == len(tokens)
        np.testing.assert_allclose(calibration.gram(name), tokens.T @ tokens / len(tokens), rtol=1e-3, atol=1e-5)


def test_shared_inputs_are_found(llama, token_ids):
    model, layers = llama
    calibration = collect_grams(model, layers, [{"input_ids": token_ids}])
    for block in ("model.layers.0", "model.layers.1"):
        q, gate = f"{block}.self_attn.q_proj", f"{block}.mlp.gate_proj"
        groups = {name.removeprefix(f"{block}."): calibration.inputs[name] for name in layers if block in name}
        assert groups == {
            "self_attn.q_proj": q,
            "self_attn.k_proj": q,
            "self_attn.v_proj": q,
            "self_attn.o_proj": f"{block}.self_attn.o_proj",
            "mlp.gate_proj": gate,
            "mlp.up_proj": gate,
            "mlp.down_proj": f"{block}.mlp.down_proj",
        }
    assert len(calibration.grams) == 8


def test_matrices_of_a_block_are_handed_over_when_it_is_left(llama, token_ids, monkeypatch):
    model, layers = llama
    alive, counts, stored = weakref.WeakSet(), [], []

    class Watched(GramAccumulator):
        def __init__(self, *arguments) -> None:
            super().__init__(*arguments)
            alive.add(self)

    class Store(dict):
        def __setitem__(self, name, gram) -> None:
            stored.append(name)
            counts.append(len(alive))
            super().__setitem__(name, gram)

    monkeypatch.setattr("rocket.calib.sums.GramAccumulator", Watched)
    store = Store()
    calibration = collect_grams(model, layers, [{"input_ids": ids} for ids in token_ids.split(4)], store)
    assert calibration.grams is store
    assert stored == list(calibration.tokens) == list(dict.fromkeys(calibration.inputs.values()))
    assert counts == [0] * 8  # no sums but those of one block are ever held


def test_sums_hardly_depend_on_how_they_are_split():
    inputs = torch.randn(4096, 70, generator=torch.Generator().manual_seed(0)).bfloat16()
    parts = inputs.split(256)
    whole = GramAccumulator(70, torch.device("cpu"))
    for part in parts:
        whole.add(part)
    shares = [GramAccumulator(70, torch.device("cpu")) for _ in range(3)]
    for number, part in enumerate(parts):
        shares[number % 3].add(part)
    for share in shares[:0:-1]:
        for total, more in zip(shares[0].sums, share.sums, strict=True):
            total += more
        shares[0].tokens += share.tokens
    assert torch.equal(whole.gram(), shares[0].gram())


def test_a_block_that_is_called_again_adds_to_its_matrices(token_ids):
    class Again(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 4))])

        def forward(self, x):
            for _ in range(3):
                for block in self.blocks:
                    x = torch.tanh(block(x))
            return x

    torch.manual_seed(0)
    model = Again()
    seen = []
    handle = model.blocks[1][0].register_forward_pre_hook(lambda _, args: seen.append(flat(args[0])))
    calibration = collect_grams(model, target_layers(model), [{"x": torch.randn(5, 4)} for _ in range(2)])
    handle.remove()
    tokens = torch.cat(seen).detach()
    assert calibration.tokens["blocks.1.0"] == len(tokens) == 30
    torch.testing.assert_close(calibration.gram("blocks.1.0").double(), tokens.T @ tokens / 30, rtol=1e-4, atol=1e-6)


def test_equal_values_in_other_tensors_are_not_shared(token_ids):
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.first(x) + self.second(x.clone()) + self.third(x)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Block(), Block()])

        def forward(self, x, use_cache):
            for block in self.blocks:
                x = block(x)
            return x

    model = Model()
    calibration = collect_grams(model, target_layers(model), [{"x": torch.randn(2, 3, 4)}])
    assert calibration.inputs["blocks.0.third"] == "blocks.0.first"
    assert calibration.inputs["blocks.0.second"] == "blocks.0.second"


def test_non_finite_activations_name_layer_and_batch(llama, token_ids):
    model, layers = llama
    with torch.no_grad():
        model.model.embed_tokens.weight[65, 3] = float("nan")
    batches = [{"input_ids": torch.full((1, 8), token)} for token in (70, 70, 65)]
    with pytest.raises(RocketError, match=r"model\.layers\.0\.self_attn\.q_proj: calibration batch 2 produced non-fin"):
        collect_grams(model, layers, batches)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_layers_that_no_token_reaches(llama, token_ids):
    model, layers = llama
    with pytest.raises(RocketError, match=r"q_proj: no calibration token reached this layer, nor any other"):
        collect_grams(model, layers, [])


def test_layers_that_are_never_called_are_left_out(llama, token_ids, caplog):
    model, layers = llama
    calibration = collect_grams(model, {"model.layers.0.unused": nn.Linear(4, 4), **layers}, [{"input_ids": token_ids}])
    assert list(calibration.inputs) == list(layers)
    assert calibration.known({"model.layers.0.unused": nn.Linear(4, 4), **layers}) == layers
    assert "model.layers.0.unused and 0 other layers saw no calibration token" in caplog.text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_model_is_left_as_it_was(make_model, token_ids, dtype):
    model = make_model("llama", dtype)
    model.model.embed_tokens.weight.requires_grad_(False)
    before = {name: (tensor.clone(), tensor.requires_grad) for name, tensor in model.named_parameters()}
    collect_grams(model, target_layers(model), [{"input_ids": token_ids}])
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    for name, tensor in model.named_parameters():
        assert torch.equal(tensor, before[name][0])
        assert tensor.requires_grad == before[name][1]


def test_accumulator_is_exact_over_batches():
    inputs = torch.randn(1000, 9, generator=torch.Generator().manual_seed(0))
    accumulator = GramAccumulator(9, torch.device("cpu"))
    for part in inputs.split(130):
        accumulator.add(part)
    expected = inputs.double().T @ inputs.double() / 1000
    assert accumulator.tokens == 1000
    with pytest.raises(ValueError, match="non-finite"):
        accumulator.add(torch.full((1, 9), float("inf")))
    assert accumulator.tokens == 1000
    torch.testing.assert_close(accumulator.gram().double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("features", [1, 5, 13])
def test_gram_of_any_type_and_layout(dtype, features):
    inputs = torch.randn(features, 40).to(dtype).T[::2]  # neither contiguous nor in float32
    accumulator = GramAccumulator(features, torch.device("cpu"))
    accumulator.add(inputs)
    expected = inputs.double().T @ inputs.double() / 20
    gram = accumulator.gram()
    torch.testing.assert_close(gram.double(), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(gram, gram.T)


@pytest.mark.parametrize("size", [1, 2, 7, 64])
def test_triangle_round_trip(size):
    matrix = torch.randn(size, size)
    matrix = matrix + matrix.T
    triangle = pack_triangle(matrix)
    assert triangle.shape == (size * (size + 1) // 2,)
    assert torch.equal(unpack_triangle(triangle), matrix)


def test_problem_of_a_layer():
    calibration = Calibration({"a": "a", "b": "a"}, {"a": torch.eye(3)}, {"a": 5}, {"b": torch.ones(2)})
    weight = nn.Parameter(torch.ones(2, 3, dtype=torch.bfloat16))
    problem = calibration.problem("b", weight, ProfilingConfig(cost="loss", correlation_shrinkage=0.1))
    assert problem.weight.dtype == torch.float32
    assert not problem.weight.requires_grad
    assert torch.equal(problem.gram, torch.eye(3))
    assert torch.equal(problem.sensitivity, torch.ones(2))
    assert problem.shrinkage == 0.1
    assert calibration.problem("a", weight, ProfilingConfig(cost="weight")).sensitivity is None


def test_blocks_that_are_never_called_as_such(token_ids):
    class Halves(nn.Module):
        """Its list holds lists: no block has a forward of its own."""

        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.ModuleList([nn.Sequential(nn.Linear(4, 4))]) for _ in range(2)])
            self.config = None

        def forward(self, input_ids, attention_mask=None):
            hidden = nn.functional.one_hot(input_ids % 4, 4).float()
            for block in self.blocks:
                hidden = torch.tanh(block[0](hidden))
            return hidden

    torch.manual_seed(0)
    model, ids = Halves(), token_ids[:6]
    masks = [torch.ones(2, 32), torch.ones(2, 32), torch.ones(2, 32)]
    masks[0][:, 4:] = 0
    batches = [{"input_ids": i, "attention_mask": mask} for i, mask in zip(ids.split(2), masks, strict=True)]
    calibration = collect_grams(model, target_layers(model), batches)
    assert calibration.tokens["blocks.0.0.0"] == 2 * 4 + 2 * 32 + 2 * 32
    counts = torch.bincount(torch.cat([ids[0, :4], ids[1, :4], ids[2:].flatten()]) % 4, minlength=4) / 136
    torch.testing.assert_close(calibration.gram("blocks.0.0.0"), torch.diag(counts))

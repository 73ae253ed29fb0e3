"""What is trained and what is not, and that it is stored as before."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file

import rocket
from rocket.config.errors import RocketError
from rocket.config.schema import HealingConfig
from rocket.healing.parameters import check_unchanged, choose_parameters, settle_parameters
from rocket.kernels import bitmap
from rocket.nn import CompressedLinear


def settings(**changes: object) -> HealingConfig:
    return HealingConfig(**{"minutes": 1, **changes})


def compressed_layers(model) -> dict[str, CompressedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, CompressedLinear)}


def logits(model, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def test_gradients_are_those_of_the_dense_model(make_compressed, token_ids):
    """The chain rule by hand: W = C D, and only what C keeps is stored."""
    model, ids = make_compressed(), token_ids[:2]
    dense = rocket.merge(model)
    chosen = choose_parameters(model, settings())
    for network in (model, dense):
        network(input_ids=ids, labels=ids).loss.backward()

    for name, layer in compressed_layers(model).items():
        expected = dense.get_submodule(name).weight.grad
        if layer.form != "sparse":
            matrix = layer.matrix("weight")[:, : layer.spec.rank]
            torch.testing.assert_close(layer.dictionary.grad, matrix.T @ expected, rtol=1e-3, atol=1e-6)
            beside = [expected] if layer.form == "sparse_low_rank" else []
            expected = torch.cat([expected @ layer.dictionary.T, *beside], dim=1)
        if layer.form != "low_rank":
            expected = expected[bitmap.unpack_mask(layer.mask, layer.mask_columns)]
        torch.testing.assert_close(layer.weight.grad, expected, rtol=1e-3, atol=1e-6)
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == set(chosen)


@pytest.mark.parametrize(
    ("train", "trained"),
    [("values", {"weight", "dictionary"}), ("dictionary", {"dictionary"}), ("lora", {"down", "up"})],
)
def test_all_else_is_frozen(make_compressed, train, trained):
    model = make_compressed(dtype=torch.bfloat16)
    chosen = choose_parameters(model, settings(train=train))
    layers = compressed_layers(model)
    assert {name.rpartition(".")[2] for name in chosen} == trained
    assert {layer for layer in layers if any(name.startswith(f"{layer}.") for name in chosen)} == {
        name for name, layer in layers.items() if train != "dictionary" or layer.form != "sparse"
    }
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (name in chosen)
        assert parameter.dtype == (torch.float32 if name in chosen else torch.bfloat16)


def test_no_dictionary_to_train(make_compressed):
    with pytest.raises(RocketError, match=r"healing.train=dictionary: no layer of this model has one; use values"):
        choose_parameters(make_compressed("sparse"), settings(train="dictionary"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_low_rank_change_is_added_exactly(make_compressed, token_ids, dtype):
    model = make_compressed(dtype=dtype)
    before = copy.deepcopy(model)
    choose_parameters(model, settings(train="lora", lora_rank=3))
    assert torch.equal(logits(model, token_ids), logits(before, token_ids))  # it begins with none

    changes = {}
    for name, layer in compressed_layers(model).items():
        (change,) = layer.parametrizations["weight"]
        assert change.up.shape == (layer.out_features, 3)
        torch.nn.init.normal_(change.up, std=0.1, generator=torch.Generator().manual_seed(1))
        changes[name] = (change.up @ change.down).detach()
    healed = logits(model, token_ids)
    assert not torch.equal(healed, logits(before, token_ids))

    settle_parameters(model, dtype)
    assert torch.equal(logits(model, token_ids), healed)
    assert model.state_dict().keys() == before.state_dict().keys()
    for name, layer in compressed_layers(model).items():
        old, change = before.get_submodule(name), changes[name]
        if layer.form != "low_rank":
            assert torch.equal(layer.mask, old.mask)
            change = change[bitmap.unpack_mask(layer.mask, layer.mask_columns)]
        assert torch.equal(layer.weight, (old.weight.float() + change).to(dtype))


def test_a_changed_checkpoint_is_told(pair, tmp_path):
    file = pair.compressed / "model.safetensors"
    tensors = load_file(file)
    mask = next(name for name in tensors if name.endswith(".mask"))
    weight = mask.replace(".mask", ".weight")
    save_file(tensors, tmp_path / file.name)
    check_unchanged(pair.compressed, tmp_path)
    for name, changed in ((mask, tensors[mask].flip(0)), (weight, tensors[weight][:-1])):
        save_file({**tensors, name: changed.contiguous()}, tmp_path / file.name)
        with pytest.raises(RocketError, match=f"healing changed .*{name}"):
            check_unchanged(pair.compressed, tmp_path)

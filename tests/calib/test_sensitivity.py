"""φ from one backward pass, against autograd layer by layer."""

from functools import partial

import pytest
import torch
from torch.nn import functional as F

from rocket.calib import measure_sensitivities
from rocket.calib.objective import objective
from rocket.config.errors import RocketError
from rocket.models import find_blocks, target_layers


def brute_force(model, name: str, token_ids: torch.Tensor) -> torch.Tensor:
    """Σ g_j² for each predicted token: zeros that require a gradient are added to the output, sequence by sequence."""
    total, layer = 0.0, model.get_submodule(name)
    for ids in token_ids:
        zeros = torch.zeros(len(ids), layer.out_features, dtype=torch.float64, requires_grad=True)
        handle = layer.register_forward_hook(lambda _, __, output, zeros=zeros: output + zeros)
        logits = model(input_ids=ids[None]).logits[0]
        handle.remove()
        loss = sum(F.cross_entropy(logits[position], ids[position + 1]) for position in range(len(ids) - 1))
        total = total + torch.autograd.grad(loss, zeros)[0].square().sum(dim=0)
    return total / token_ids[:, 1:].numel()


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "opt", "gemma2"])
def test_mean_squared_gradient_of_each_output(make_model, token_ids, family):
    model = make_model(family, torch.float64)
    layers = target_layers(model)
    measured = measure_sensitivities(model, layers, [{"input_ids": ids} for ids in token_ids[:3].split(2)])
    assert list(measured) == list(layers)
    for name in [list(layers)[index] for index in (0, -2, -1)]:
        expected = brute_force(model, name, token_ids[:3])
        torch.testing.assert_close(measured[name].double(), expected, rtol=1e-4, atol=1e-12)


@pytest.fixture
def prepared(make_model):
    """A model with frozen weights, a patched block and a hook, as users have them."""
    model = make_model("llama")
    model.model.embed_tokens.weight.requires_grad_(False)
    model.model.layers[0].register_forward_hook(lambda *_: None)
    return model


def test_model_is_left_as_it_was(prepared, token_ids):
    flags = {name: parameter.requires_grad for name, parameter in prepared.named_parameters()}
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in prepared.modules()]
    with torch.no_grad():
        before = prepared(input_ids=token_ids[:2]).logits
    measure_sensitivities(prepared, target_layers(prepared), [{"input_ids": token_ids[:2]}])
    assert {name: parameter.requires_grad for name, parameter in prepared.named_parameters()} == flags
    assert [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in prepared.modules()] == hooks
    assert all(parameter.grad is None for parameter in prepared.parameters())
    assert not any("forward" in vars(block) for block in find_blocks(prepared).values())
    with torch.no_grad():
        assert torch.equal(prepared(input_ids=token_ids[:2]).logits, before)


def test_patched_forward_survives(prepared, token_ids):
    block = prepared.model.layers[1]
    patched = partial(block.forward)
    block.forward = patched
    measure_sensitivities(prepared, target_layers(prepared), [{"input_ids": token_ids[:2]}])
    assert vars(block).get("forward") is patched


def test_model_is_left_as_it_was_after_a_failure(prepared):
    with pytest.raises(IndexError):
        measure_sensitivities(prepared, target_layers(prepared), [{"input_ids": torch.tensor([[100_000, 1]])}])
    assert prepared.lm_head.weight.requires_grad
    assert not any("forward" in vars(block) for block in find_blocks(prepared).values())


def test_non_finite_gradients_name_the_layer(make_model, token_ids):
    model = make_model("llama")
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(RocketError, match=r"model\.layers\.0\.self_attn\.q_proj: the backward pass gave non-finite"):
        measure_sensitivities(model, target_layers(model), [{"input_ids": token_ids[:2]}])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_padding_counts_on_neither_side(make_model, token_ids, family):
    model = make_model(family)
    layers = target_layers(model)
    ids, lengths = token_ids[:2].clone(), (token_ids.shape[1] - 5, token_ids.shape[1])
    found = []
    for side in ("right", "left"):
        mask, rows = torch.zeros_like(ids), torch.zeros_like(ids)
        for row, length in enumerate(lengths):
            place = slice(0, length) if side == "right" else slice(ids.shape[1] - length, None)
            mask[row, place], rows[row, place] = 1, ids[row, :length]
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        batch = {"input_ids": rows, "attention_mask": mask, "position_ids": positions}
        found.append(measure_sensitivities(model, layers, [batch]))
    for name, right in found[0].items():
        torch.testing.assert_close(found[1][name], right, rtol=1e-4, atol=0.0)


def test_terms_are_the_labels_that_are_predicted(make_model, token_ids):
    _, terms = objective(make_model("llama"), {"input_ids": token_ids}, torch.Generator())
    assert terms == token_ids.shape[0] * (token_ids.shape[1] - 1)

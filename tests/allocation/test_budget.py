"""The three budgets, their names, and what the rest of a model takes."""

import pytest
import torch
from safetensors import safe_open
from torch import nn

from rocket.allocation import Budget, measure_size
from rocket.config.errors import RocketError
from rocket.config.schema import CompressionConfig
from rocket.models import target_layers


@pytest.mark.parametrize(
    ("given", "kind", "value", "name"),
    [
        ({"removed_ratio": 0.3}, "removed_ratio", 0.3, "removed-0.30"),
        ({"removed_ratio": 0.123}, "removed_ratio", 0.123, "removed-0.123"),
        ({"kept_parameters": 8.2e9}, "kept_parameters", 8_200_000_000, "parameters-8.2B"),
        ({"kept_parameters": "8.2B"}, "kept_parameters", 8_200_000_000, "parameters-8.2B"),
        ({"bytes": 6_000_000_000}, "bytes", 6_000_000_000, "bytes-6GB"),
        ({"kept_parameters": "8.2e+9"}, "kept_parameters", 8_200_000_000, "parameters-8.2B"),
        ({"bytes": "6GB"}, "bytes", 6_000_000_000, "bytes-6GB"),
        ({"bytes": "1TiB"}, "bytes", 1 << 40, "bytes-1099511627776B"),
    ],
)
def test_one_of_three(given, kind, value, name):
    budget = Budget.of(**given)
    assert (budget.kind, budget.value, budget.name) == (kind, value, name)
    assert Budget.from_config(CompressionConfig(**given)) == budget


@pytest.mark.parametrize("given", [{}, {"removed_ratio": 0.2, "bytes": 10}, {"kept_parameters": 5, "bytes": 10}])
def test_not_one_of_three(given):
    with pytest.raises(RocketError, match="exactly one of removed_ratio, kept_parameters, bytes"):
        Budget.of(**given)


def test_whole_numbers_are_made_of_fractions():
    assert Budget.of(bytes=10.7) == Budget("bytes", 10)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"bytes": "6 apples"}, "bytes='6 apples': '6 apples' is not a size; write for example 6GB"),
        ({"kept_parameters": "8X"}, "kept_parameters='8X': '8X' is no number; write for example 8e9 or 8B"),
    ],
)
def test_no_size(given, message):
    with pytest.raises(RocketError, match=message):
        Budget.of(**given)


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.1, 1.5, float("nan"), 10**400])
def test_removed_ratio_lies_between_0_and_1(ratio):
    with pytest.raises(RocketError, match=r"removed_ratio=.*: must be a share between 0 and 1, for example 0\.3"):
        Budget.of(removed_ratio=ratio)


def test_size_counted_by_hand():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 5, bias=False)).to(torch.bfloat16)
    size = measure_size(model, {"0": model[0]})
    assert size.target_parameters == 12
    assert size.other_parameters == 4 + 8 + 20
    assert size.other_bytes == 2 * (4 + 8 + 20) + 2 * 8 + 8  # running statistics, and an int64 counter
    assert (size.itemsize, size.parameters, size.bytes) == (2, 44, 24 + size.other_bytes)


def test_size_of_layers_of_several_types():
    layers = {"a": nn.Linear(3, 4).half(), "b": nn.Linear(4, 5), "c": nn.Linear(5, 6).half()}
    size = measure_size(nn.ModuleDict(layers), layers)
    assert [size.itemsize_of(name) for name in "abc"] == [2, 4, 2]
    assert size.bytes == 2 * 12 + 4 * 20 + 2 * 30 + 2 * 4 + 4 * 5 + 2 * 6


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gpt_neox", "opt", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_size_is_that_of_the_file(make_model, tmp_path, family, dtype):
    """Tied embeddings are counted once, as they are stored once."""
    model = make_model(family, dtype)
    model.save_pretrained(tmp_path)
    size = measure_size(model, target_layers(model))
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        tensors = [file.get_tensor(key) for key in file.keys()]  # noqa: SIM118 (no mapping)
    assert size.bytes == sum(tensor.nbytes for tensor in tensors)
    assert size.parameters == sum(tensor.numel() for tensor in tensors) == model.num_parameters()

"""Every method of benchmarks.quality on a tiny model: within its budget, and put back after the measurement."""

import argparse

import pytest
import torch

from benchmarks.methods import METHODS, Bench, swapped


@pytest.fixture(scope="module")
def bench(make_model, byte_tokenizer, texts, tmp_path_factory):
    source = tmp_path_factory.mktemp("texts") / "texts.txt"
    source.write_text("\n\n".join(texts))
    args = argparse.Namespace(
        sizes=[0.4],
        search_samples=4,
        seq_len=32,
        sensitivity_samples=4,
        evopress_samples=2,
        evaluations=5,
        measure=[0.3],
        level_step=3,
        strs_samples=2,
        learning_steps=2,
        cospadi_iterations=2,
    )
    return Bench(args, make_model("llama"), byte_tokenizer, seed=0, source=str(source), samples=8)


@pytest.mark.parametrize("method", METHODS)
def test_method(bench, method):
    before = {name: layer.weight.detach().clone() for name, layer in bench.layers.items()}
    result = METHODS[method](bench, 0.4)
    assert 0.39 <= result.removed_ratio <= 0.55  # whole ranks remove a little more on layers this small
    assert result.bytes_removed_ratio < result.removed_ratio
    with swapped(bench.layers, result.weights):
        changed = [name for name in before if not torch.equal(bench.layers[name].weight, before[name])]
        assert changed
        assert set(changed) == set(result.weights)
        assert all(torch.isfinite(layer.weight).all() for layer in bench.layers.values())
    assert all(torch.equal(layer.weight, before[name]) for name, layer in bench.layers.items())


def test_prices_are_corrected_by_other_sizes_only(bench):
    assert METHODS["rocket"](bench, 0.4).corrected > 0
    assert METHODS["rocket"](bench, 0.3).corrected is None

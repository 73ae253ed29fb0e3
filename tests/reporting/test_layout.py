"""Where layers lie: towers, blocks, kinds, whatever a model calls them."""

import pytest

from rocket.reporting.layout import form_letters, layers_by_kind, locate_layer, towers_of


@pytest.mark.parametrize(
    ("layer", "place"),
    [
        ("model.layers.7.self_attn.q_proj", ("model.layers", "7", "self_attn.q_proj")),
        ("encoder.block.0.layer.1.DenseReluDense.wi", ("encoder.block", "0", "layer.*.DenseReluDense.wi")),
        ("model.decoder.layers.11.fc2", ("model.decoder.layers", "11", "fc2")),
        ("model.layers.0.mlp.experts.down_proj.3", ("model.layers", "0", "mlp.experts.down_proj.*")),
        ("h.0.attn.c_attn", ("h", "0", "attn.c_attn")),
        ("0.proj", ("", "0", "proj")),
        ("layers.3", ("layers", "3", "(itself)")),
        ("head", ("", "", "head")),
        ("v2net.proj", ("", "", "v2net.proj")),
    ],
)
def test_places(layer, place):
    assert locate_layer(layer) == place


def test_towers_and_experts(invent):
    experts = [f"decoder.layers.1.experts.{number}.up" for number in range(3)]
    summary = invent(["encoder.layers.0.fc1", "encoder.layers.0.fc2", "decoder.layers.0.fc1", *experts])
    encoder, decoder = towers_of(summary.planner, summary.plan)
    assert (encoder.name, encoder.blocks, encoder.kinds) == ("encoder.layers", ["0"], ["fc1", "fc2"])
    assert (decoder.name, decoder.blocks, decoder.kinds) == ("decoder.layers", ["0", "1"], ["fc1", "experts.*.up"])
    assert encoder.cells["0", "fc1"].removed_ratio == 0.5
    assert encoder.cells["0", "fc1"].cost == 0.25
    assert encoder.cells["0", "fc2"].removed_ratio == 0.0
    assert ("0", "experts.*.up") not in decoder.cells
    cell = decoder.cells["1", "experts.*.up"]  # dense, half, dense
    assert cell.layers == tuple(experts)
    assert cell.forms == {"dense": 2, "sparse": 1}
    assert cell.removed_ratio == pytest.approx(50 / 300)
    assert cell.cost == 0.25


def test_kinds_hold_layers_of_all_blocks():
    kinds = layers_by_kind(["a.0.x", "a.0.y.1", "a.1.x", "a.1.y.2"])
    assert kinds == {"x": ["a.0.x", "a.1.x"], "y.*": ["a.0.y.1", "a.1.y.2"]}


def test_letters():
    assert form_letters(["sparse", "low_rank", "sparse"]) == "ls"
    assert form_letters(["augmented"]) == "?"

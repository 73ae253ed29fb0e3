"""The layers that replace nn.Linear, against the matrix that they stand for."""

import pytest
import torch
from torch.nn import functional as F

from rocket.kernels import bitmap
from rocket.nn import LAYERS, FactorizedLinear, LayerSpec, LowRankLinear, SparseLinear
from rocket.nn.layers import CompressedLinear, empty_layer

IN, OUT, RANK, KEPT = 70, 24, 20, 300  # 70 columns: rows of the mask are padded to two words


def layer_spec(form: str, rank: int, nnz: int) -> LayerSpec:
    return LayerSpec(form, IN, OUT, rank, nnz, "")


def keep_mask(rows: int, columns: int, count: int) -> torch.Tensor:
    order = torch.randperm(rows * columns, generator=torch.Generator().manual_seed(0))
    return (order < count).view(rows, columns)


def make_layer(form: str, bias: bool = True, dtype: torch.dtype = torch.float32) -> CompressedLinear:
    spec = {"low_rank": (RANK, 0), "sparse": (0, KEPT), "dictionary": (RANK, KEPT)}[form]
    layer = empty_layer(layer_spec(form, *spec), bias)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        if form != "low_rank":
            layer.mask.copy_(bitmap.pack_mask(keep_mask(OUT, RANK if form == "dictionary" else IN, KEPT)))
    return layer.to(dtype)


@pytest.mark.parametrize("form", LAYERS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(IN,), (1, IN), (2, 3, IN), (40, IN)])
def test_forward_is_its_dense_weight(form, bias, shape):
    layer = make_layer(form, bias)
    inputs = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    weight = layer.dense_weight()
    assert weight.shape == (OUT, IN)
    torch.testing.assert_close(layer(inputs), F.linear(inputs, weight, layer.bias), rtol=1e-4, atol=1e-4)


def test_dense_weight_by_hand():
    layer = empty_layer(LayerSpec("sparse", 3, 2, 0, 3, ""), bias=False)
    layer.load_state_dict(
        {"weight": torch.tensor([1.0, 2.0, 3.0]), "mask": bitmap.pack_mask(torch.tensor([[1, 0, 1], [0, 1, 0]]).bool())}
    )
    assert layer.dense_weight().tolist() == [[1.0, 0.0, 2.0], [0.0, 3.0, 0.0]]

    layer = empty_layer(LayerSpec("dictionary", 3, 2, 2, 2, ""), bias=False)
    atoms = torch.tensor([[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]])
    mask = bitmap.pack_mask(torch.tensor([[0, 1], [1, 0]]).bool())
    layer.load_state_dict({"dictionary": atoms, "weight": torch.tensor([2.0, 5.0]), "mask": mask})
    assert layer.coefficients().tolist() == [[0.0, 2.0], [5.0, 0.0]]
    assert layer.dense_weight().tolist() == [[20.0, 40.0, 60.0], [5.0, 10.0, 15.0]]


@pytest.mark.parametrize("form", LAYERS)
def test_gradients_flow_to_stored_values_only(form):
    layer = make_layer(form)
    inputs = torch.randn(5, IN, requires_grad=True)
    weight = layer.dense_weight().detach().requires_grad_()
    (layer(inputs) ** 2).sum().backward()
    expected = torch.autograd.grad((F.linear(inputs.detach(), weight, layer.bias) ** 2).sum(), weight)[0]

    assert {name for name, _ in layer.named_parameters()} == {"weight", "bias"} | (
        {"dictionary"} if form != "sparse" else set()
    )
    assert all(parameter.grad is not None for parameter in layer.parameters())
    assert inputs.grad is not None
    if form == "sparse":  # the chain rule, done by hand
        expected = expected[bitmap.unpack_mask(layer.mask, IN)]
    elif form == "dictionary":
        expected = (expected @ layer.dictionary.T)[bitmap.unpack_mask(layer.mask, RANK)]
    else:
        expected = expected @ layer.dictionary.T
    torch.testing.assert_close(layer.weight.grad, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("form", ["sparse", "dictionary"])
def test_autocast_multiplies_rounded_values(form):
    """float32 values under bfloat16 autocast: the product of the layer in bfloat16, gradients in float32."""
    layer = make_layer(form)
    inputs = torch.randn(5, IN, generator=torch.Generator().manual_seed(2)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(inputs)
    assert torch.equal(output, make_layer(form, dtype=torch.bfloat16)(inputs))
    output.sum().backward()
    assert layer.weight.grad.dtype == torch.float32
    assert layer.weight.grad.shape == (KEPT,)
    assert layer.weight.grad.abs().max() > 0


@pytest.mark.parametrize("form", LAYERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_conversion_leaves_the_mask(form, dtype):
    layer = make_layer(form, dtype=dtype)
    assert all(parameter.dtype == dtype for parameter in layer.parameters())
    assert layer(torch.ones(2, IN, dtype=dtype)).dtype == dtype
    torch.testing.assert_close(layer.dense_weight().float(), make_layer(form).dense_weight(), rtol=0.05, atol=0.2)
    if form != "low_rank":
        assert layer.mask.dtype == torch.uint8


@pytest.mark.parametrize("form", LAYERS)
def test_stored_values(form):
    expected = {"low_rank": RANK * (IN + OUT), "sparse": KEPT, "dictionary": RANK * IN + KEPT}
    assert make_layer(form).stored_values() == expected[form]
    assert f"rank={make_layer(form).spec.rank}" in repr(make_layer(form))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (layer_spec("dictionary", OUT + 1, 5), "rank=25 is impossible"),
        (layer_spec("dictionary", 0, 5), "rank=0 is impossible"),
        (layer_spec("dictionary", -1, 5), "rank=-1 is impossible"),
        (layer_spec("dictionary", 2, 2 * OUT + 1), "nnz=49 is impossible"),
        (layer_spec("dictionary", 2, -1), "nnz=-1 is impossible"),
        (layer_spec("sparse", 1, 5), "rank=1 is impossible"),
        (layer_spec("sparse", 0, IN * OUT + 1), "nnz=1681 is impossible"),
        (layer_spec("low_rank", OUT + 1, 0), "rank=25 is impossible"),
        (layer_spec("low_rank", 4, 7), "nnz=7 is impossible"),
        (
            layer_spec("augmented", 4, 7),
            "unknown layer form 'augmented'; this version knows low_rank, sparse, dictionary",
        ),
    ],
)
def test_impossible_specs(spec, message):
    with pytest.raises(ValueError, match=message):
        empty_layer(spec, bias=False)


def test_spec_round_trip():
    spec = LayerSpec("sparse", IN, OUT, 0, 17, "model.layers.0.self_attn.q_proj")
    assert LayerSpec.from_dict(spec.to_dict()) == spec


GOOD = {"form": "sparse", "in_features": 4, "out_features": 3, "rank": 0, "nnz": 5, "input_group": "x"}


@pytest.mark.parametrize(
    "values",
    [
        {},
        {**GOOD, "extra": 1},
        {key: value for key, value in GOOD.items() if key != "nnz"},
        {**GOOD, "rank": 0.0},
        {**GOOD, "nnz": "5"},
        {**GOOD, "nnz": True},
        {**GOOD, "nnz": None},
        {**GOOD, "form": ["sparse"]},
        {**GOOD, "input_group": None},
    ],
)
def test_malformed_specs(values):
    with pytest.raises(ValueError, match="expected form, in_features, out_features, rank, nnz, input_group, got"):
        LayerSpec.from_dict(values)


def test_registry():
    assert {"low_rank": LowRankLinear, "sparse": SparseLinear, "dictionary": FactorizedLinear} == LAYERS

"""The layers that replace nn.Linear, against the matrix that they stand for."""

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.utils import parametrize

from rocket.kernels import bitmap
from rocket.nn import LAYERS, FactorizedLinear, Int8Linear, LayerSpec, LowRankLinear, SparseLinear, SparseLowRankLinear
from rocket.nn.layers import CompressedLinear, empty_layer
from rocket.nn.optimize import DenseLinear

IN, OUT, RANK, KEPT = 70, 24, 20, 300  # 70 columns: rows of the mask are padded to two words
FLOATING = [(form, "float") for form in ("low_rank", "sparse", "dictionary", "sparse_low_rank")]
KINDS = [*FLOATING, *((form, "int8") for form in ("dense", "low_rank", "sparse", "dictionary", "sparse_low_rank"))]


def layer_spec(form: str, rank: int, nnz: int, precision: str = "float") -> LayerSpec:
    return LayerSpec(form, IN, OUT, rank, nnz, "", precision)


def keep_mask(rows: int, columns: int, count: int) -> torch.Tensor:
    order = torch.randperm(rows * columns, generator=torch.Generator().manual_seed(0))
    return (order < count).view(rows, columns)


def make_layer(
    form: str, bias: bool = True, dtype: torch.dtype = torch.float32, precision: str = "float"
) -> CompressedLinear:
    rank = 0 if form in ("dense", "sparse") else RANK
    nnz = 0 if form in ("dense", "low_rank") else KEPT
    layer = empty_layer(layer_spec(form, rank, nnz, precision), bias)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.dtype == torch.int8:
                parameter.copy_(torch.randint(-127, 128, parameter.shape, generator=generator))
            else:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        if layer.is_sparse:
            layer.mask.copy_(bitmap.pack_mask(keep_mask(OUT, layer.spec.columns, KEPT)))
    return layer.to(dtype)


@pytest.mark.parametrize(("form", "precision"), KINDS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(IN,), (1, IN), (2, 3, IN), (40, IN)])
@pytest.mark.parametrize("kernels", [True, False])
@torch.no_grad()
def test_forward_is_its_dense_weight(form, precision, bias, shape, kernels):
    layer = make_layer(form, bias, precision=precision)
    layer.use_kernels(kernels)
    inputs = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    weight = layer.dense_weight()
    assert weight.shape == (OUT, IN)
    torch.testing.assert_close(layer(inputs), F.linear(inputs, weight, layer.bias), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("form", "precision"), KINDS)
@torch.no_grad()
def test_function_transforms_see_through_the_kernels(form, precision):
    layer = make_layer(form, precision=precision)
    layer.use_kernels()
    inputs = torch.randn(4, IN, generator=torch.Generator().manual_seed(2))
    expected, tangent = layer(inputs), torch.ones(4, IN) @ layer.dense_weight().T
    torch.testing.assert_close(torch.func.vmap(layer)(inputs), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.func.jvp(layer, (inputs,), (torch.ones(4, IN),))[1], tangent, rtol=1e-4, atol=1e-3)
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(layer(forward_ad.make_dual(inputs, torch.ones(4, IN))))
        torch.testing.assert_close(dual.tangent, tangent, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("form", [form for form, _ in FLOATING])
@pytest.mark.parametrize("kernels", [True, False])
def test_gradients_of_functions_of_the_parameters(form, kernels):
    layer = make_layer(form)
    layer.use_kernels(kernels)
    inputs = torch.randn(3, 2, IN, generator=torch.Generator().manual_seed(2))

    def loss(parameters: dict[str, torch.Tensor], inputs: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, parameters, inputs).square().sum()

    parameters = {name: parameter.detach() for name, parameter in layer.named_parameters()}
    found = torch.func.grad(loss)(parameters, inputs)
    apart = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, inputs)
    layer(inputs).square().sum().backward()
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad)
        torch.testing.assert_close(apart[name].sum(0), parameter.grad, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("form", "precision"), KINDS)
@pytest.mark.parametrize("kernels", [True, False])
def test_shapes_on_meta(form, precision, kernels):
    layer = make_layer(form, precision=precision)
    layer.use_kernels(kernels)
    assert layer.to("meta")(torch.empty(2, IN, device="meta")).shape == (2, OUT)


@pytest.mark.parametrize("form", [form for form, precision in KINDS if precision == "int8"])
@pytest.mark.parametrize("kernels", [True, False])
@torch.no_grad()
def test_int8_takes_inputs_of_another_type(form, kernels):
    """T5 casts to the type of a weight unless that is int8, and some of its weights are in float32 by themselves."""
    layer = make_layer(form, precision="int8")
    layer.use_kernels(kernels)
    inputs = torch.ones(2, IN)
    assert torch.equal(layer(inputs.half()), layer(inputs))


@pytest.mark.parametrize("form", [form for form, _ in FLOATING])
@torch.no_grad()
def test_values_that_are_no_plain_memory_go_by_torch(form, make_odd):
    layer = make_layer(form)
    layer.use_kernels()
    inputs = torch.randn(2, IN, generator=torch.Generator().manual_seed(2))
    expected = layer(inputs)
    for name in {"weight", "dictionary"} & dict(layer.named_parameters()).keys():
        plain = getattr(layer, name)
        setattr(layer, name, make_odd(plain))
        torch.testing.assert_close(layer(inputs), expected, rtol=1e-4, atol=1e-4)
        setattr(layer, name, plain)


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
    assert layer.matrix("weight").tolist() == [[0.0, 2.0], [5.0, 0.0]]
    assert layer.dense_weight().tolist() == [[20.0, 40.0, 60.0], [5.0, 10.0, 15.0]]


def test_dense_weight_of_int8_by_hand():
    """127 stands for the scale of a row."""
    layer = empty_layer(LayerSpec("dictionary", 2, 2, 2, 3, "", "int8"), bias=False)
    state = {
        "dictionary": torch.tensor([[127, 0], [-127, 127]], dtype=torch.int8),
        "dictionary_scale": torch.tensor([2.0, 4.0]),
        "weight": torch.tensor([127, 127, -127], dtype=torch.int8),
        "weight_scale": torch.tensor([1.0, 3.0]),
        "mask": bitmap.pack_mask(torch.tensor([[1, 0], [1, 1]]).bool()),
    }
    layer.load_state_dict(state)
    assert layer.matrix("dictionary").tolist() == [[2.0, 0.0], [-4.0, 4.0]]
    assert layer.matrix("weight").tolist() == [[1.0, 0.0], [3.0, -3.0]]
    assert layer.dense_weight().tolist() == [[2.0, 0.0], [18.0, -12.0]]


@pytest.mark.parametrize("form", [form for form, _ in FLOATING])
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
    elif form == "sparse_low_rank":
        atoms = torch.cat([layer.dictionary, torch.eye(IN)])
        expected = (expected @ atoms.T)[bitmap.unpack_mask(layer.mask, RANK + IN)]
    else:
        expected = expected @ layer.dictionary.T
    torch.testing.assert_close(layer.weight.grad, expected, rtol=1e-3, atol=1e-3)


class Shifted(nn.Module):
    """A parametrization that is trained itself."""

    def __init__(self, values: torch.Tensor) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros_like(values))

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return values + self.shift


@pytest.mark.parametrize(
    ("form", "name"),
    [("sparse", "weight"), ("sparse", "bias"), ("dictionary", "dictionary"), ("low_rank", "weight"), (None, "weight")],
)
def test_parametrizations_of_optimized_layers_get_their_gradient(form, name):
    layer = DenseLinear(IN, OUT) if form is None else make_layer(form)
    if isinstance(layer, CompressedLinear):
        layer.use_kernels()
    layer.requires_grad_(False)
    shifted = Shifted(getattr(layer, name))
    parametrize.register_parametrization(layer, name, shifted)
    layer(torch.ones(2, IN)).sum().backward()
    assert shifted.shift.grad is not None
    assert shifted.shift.grad.any()


def replica_of(layer: nn.Module) -> nn.Module:
    """What DataParallel makes of a layer on another device: its parameters are tensors like any attribute."""
    replica = layer._replicate_for_data_parallel()
    for name, tensor in (*layer._parameters.items(), *layer._buffers.items()):
        if tensor is None:
            replica._parameters[name] = None
        else:
            setattr(replica, name, tensor.view_as(tensor))
    return replica


@pytest.mark.parametrize(("form", "precision"), KINDS)
@pytest.mark.parametrize("kernels", [True, False])
def test_replicas_of_data_parallel(form, precision, kernels):
    layer = make_layer(form, precision=precision)
    layer.use_kernels(kernels)
    inputs = torch.randn(2, IN, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        torch.testing.assert_close(replica_of(layer)(inputs), layer(inputs), rtol=1e-4, atol=1e-4)
    replica_of(layer)(inputs).sum().backward()
    assert all((parameter.grad is not None) == parameter.requires_grad for parameter in layer.parameters())


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


@pytest.mark.parametrize(("form", "precision"), KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_conversion_leaves_the_mask_and_int8_values(form, precision, dtype):
    layer = make_layer(form, dtype=dtype, precision=precision)
    assert layer.dtype == dtype
    assert layer.weight.dtype == (torch.int8 if precision == "int8" else dtype)
    assert all(parameter.dtype in (dtype, layer.weight.dtype) for parameter in layer.parameters())
    assert layer(torch.ones(2, IN, dtype=dtype)).dtype == dtype
    before = make_layer(form, precision=precision)
    torch.testing.assert_close(layer.dense_weight().float(), before.dense_weight(), rtol=0.05, atol=0.2)
    assert {buffer.dtype for buffer in layer.buffers()} <= {torch.uint8}


@pytest.mark.parametrize(("form", "precision"), KINDS)
def test_stored_values(form, precision):
    expected = {"dense": IN * OUT, "low_rank": RANK * (IN + OUT), "sparse": KEPT, "dictionary": RANK * IN + KEPT}
    expected["sparse_low_rank"] = expected["dictionary"]
    layer = make_layer(form, precision=precision)
    assert layer.stored_values() == expected[form]
    assert f"precision={precision}" in repr(layer)


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
            "unknown layer form 'augmented'; this version knows dense, low_rank, sparse, dictionary",
        ),
        (layer_spec("dense", 0, 0), "precision=float is impossible"),
        (layer_spec("dense", 3, 0, "int8"), "rank=3 is impossible"),
    ],
)
def test_impossible_specs(spec, message):
    with pytest.raises(ValueError, match=message):
        empty_layer(spec, bias=False)


def test_spec_round_trip():
    for precision in ("float", "int8"):
        spec = LayerSpec("sparse", IN, OUT, 0, 17, "model.layers.0.self_attn.q_proj", precision)
        assert LayerSpec.from_dict(spec.to_dict()) == spec
        assert ("precision" in spec.to_dict()) == (precision == "int8")  # as before there was another


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
    with pytest.raises(ValueError, match=r"expected form, .*rank, nnz, input_group \(and precision\), got"):
        LayerSpec.from_dict(values)


def test_an_unknown_precision():
    with pytest.raises(ValueError, match="precision 'int4': there are float, int8"):
        LayerSpec.from_dict({**GOOD, "precision": "int4"})


def test_registry():
    assert {
        "dense": Int8Linear,
        "low_rank": LowRankLinear,
        "sparse": SparseLinear,
        "dictionary": FactorizedLinear,
        "sparse_low_rank": SparseLowRankLinear,
    } == LAYERS

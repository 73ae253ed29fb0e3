"""The optional MACKO backend: which layers take it, for which inputs. The package itself is replaced: it needs CUDA."""

import sys
from types import ModuleType

import pytest
import torch

import rocket
from rocket.kernels import bitmap, macko
from rocket.nn.layers import LayerSpec, empty_layer


@pytest.fixture
def package(monkeypatch):
    """A stand-in for macko_spmv that keeps the matrix dense and counts its products."""
    module = ModuleType("macko_spmv")
    module.compress = lambda dense: (dense, dense, dense, *dense.shape)
    calls = []
    library = torch.library.Library("macko_spmv", "DEF")
    library.define("multiply(Tensor a, Tensor b, Tensor c, int rows, int cols, Tensor v) -> Tensor")

    def multiply(a, b, c, rows, cols, v):
        calls.append(v)
        return a @ v

    library.impl("multiply", multiply, "CPU")
    monkeypatch.setitem(sys.modules, "macko_spmv", module)
    monkeypatch.setattr(macko, "fits", lambda values: values.dtype == torch.float16)
    yield calls
    library._destroy()


def layer_of(form: str, dtype: torch.dtype = torch.float16):
    """A layer 70 -> 12 with half of its sparse matrix kept."""
    rank = 0 if form == "sparse" else 10
    generator = torch.Generator().manual_seed(0)
    keep = torch.rand(12, rank or 70, generator=generator) < 0.5
    layer = empty_layer(LayerSpec(form, 70, 12, rank, int(keep.sum()), "x"), bias=True).to(dtype)
    layer.mask = bitmap.pack_mask(keep)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    return layer.requires_grad_(False)


@pytest.mark.parametrize("form", ["sparse", "dictionary"])
def test_one_row_goes_to_macko_and_more_do_not(package, form):
    layer = layer_of(form)
    one, many = torch.randn(1, 1, 70).half(), torch.randn(3, 70).half()
    expected = layer(one), layer(many)
    rocket.optimize(layer, backend="macko")
    assert "macko" in str(rocket.explain(torch.nn.Sequential(layer))[0])
    torch.testing.assert_close(layer(one), expected[0], rtol=1e-2, atol=1e-2)
    assert len(package) == 1
    torch.testing.assert_close(layer(many), expected[1], rtol=1e-2, atol=1e-2)
    assert len(package) == 1


def test_other_types_take_the_usual_kernel(package):
    layer = rocket.optimize(layer_of("sparse", torch.float32), backend="macko")
    layer(torch.randn(1, 70))
    assert layer.macko is None
    assert not package


def test_moves_and_other_backends_leave_it(package):
    layer = rocket.optimize(layer_of("sparse"), backend="macko")
    assert layer.macko is not None
    assert rocket.optimize(layer).macko is None
    assert rocket.optimize(layer, backend="macko").macko is not None
    assert layer.to(torch.float32).macko is None


def test_without_the_package():
    with pytest.raises(ValueError, match="backend='macko' needs the package macko_spmv"):
        rocket.optimize(layer_of("sparse"), backend="macko")

"""The int8 format against its definition."""

import pytest
import torch

from rocket.kernels import int8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounds_to_the_nearest_step_of_each_row(dtype):
    dense = (
        torch.randn(20, 50, generator=torch.Generator().manual_seed(0)).double() * torch.logspace(-3, 3, 20)[:, None]
    )
    values, scale = int8.quantize(dense, dtype)
    assert values.dtype == torch.int8
    assert scale.dtype == dtype
    step = scale.double() / 127
    nearest = (dense / step[:, None]).round().clamp(-127, 127)
    assert torch.equal(values.double(), nearest)
    assert (dense - values * step[:, None]).abs().max(dim=1).values.le(0.51 * step + 127 * step * 2**-8).all()


def test_the_largest_value_of_a_row_is_exact_where_its_type_holds_it():
    values, scale = int8.quantize(torch.tensor([[0.5, -2.0], [0.0, 0.0]]), torch.float16)
    assert values.tolist() == [[32, -127], [0, 0]]
    assert scale.tolist() == [2.0, 0.0]
    assert int8.dequantize(values, scale)[0, 1] == -2.0


def test_no_values():
    for shape in ((0, 3), (3, 0)):
        values, scale = int8.quantize(torch.zeros(shape), torch.float32)
        assert values.shape == shape
        assert scale.shape == shape[:1]
        assert int8.dequantize(values, scale).shape == shape


def test_a_scale_never_overflows():
    values, scale = int8.quantize(torch.tensor([[1e6, 1.0]]), torch.float16)
    assert int8.dequantize(values, scale).tolist() == [[65504.0, 0.0]]


def test_a_row_too_small_for_the_type_of_its_scale_is_zero():
    values, scale = int8.quantize(torch.tensor([[1e-30, -1e-30]]).double(), torch.float16)
    assert int8.dequantize(values, scale).tolist() == [[0.0, 0.0]]

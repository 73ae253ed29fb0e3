import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rocket.kernels import bitmap

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@st.composite
def matrices(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    """A dense matrix and the positions kept of it."""
    out, cols = draw(st.integers(0, 300)), draw(st.integers(0, 300))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    dense = torch.randn(out, cols).to(draw(st.sampled_from(DTYPES)))
    return dense, torch.rand(out, cols) < draw(st.sampled_from((0.0, 0.1, 0.5, 0.9, 1.0)))


@given(matrices())
@settings(max_examples=100, deadline=None)
def test_unpack_inverts_pack(case: tuple[torch.Tensor, torch.Tensor]) -> None:
    dense, keep = case
    values, mask = bitmap.pack(dense, keep)
    assert mask.shape == (dense.shape[0], 8 * -(-dense.shape[1] // 64))
    assert mask.dtype == torch.uint8
    assert torch.equal(bitmap.unpack_mask(mask, dense.shape[1]), keep)
    assert torch.equal(bitmap.unpack(values, mask, dense.shape[1]), torch.where(keep, dense, 0))
    assert bitmap.count(mask) == len(values) == int(keep.sum())
    assert bitmap.row_offsets(mask).tolist() == [0, *keep.sum(1).cumsum(0).tolist()]


def test_bits_are_little_endian_in_padded_words() -> None:
    keep = torch.zeros(1, 70, dtype=torch.bool)
    keep[0, [0, 9, 69]] = True
    assert bitmap.pack_mask(keep).tolist() == [[1, 2, 0, 0, 0, 0, 0, 0, 32, 0, 0, 0, 0, 0, 0, 0]]


def test_a_kept_zero_stays_a_value() -> None:
    values, mask = bitmap.pack(torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool))
    assert len(values) == bitmap.count(mask) == 6


def test_rows_are_counted_wherever_a_mask_lies() -> None:
    keep = torch.rand(4, 130) < 0.5
    mask = bitmap.pack_mask(keep)
    for place in (torch.zeros(3 + mask.numel(), dtype=torch.uint8)[3:].view_as(mask), torch.empty(24, 4).byte().T):
        assert bitmap.row_offsets(place.copy_(mask)).tolist() == [0, *keep.sum(1).cumsum(0).tolist()]


@pytest.mark.parametrize("compiled", [False, True])
def test_unpack_is_differentiable_in_the_values(compiled: bool) -> None:
    dense, keep = torch.randn(5, 70), torch.rand(5, 70) < 0.5
    values, mask = bitmap.pack(dense, keep)
    values.requires_grad_()

    def loss(values: torch.Tensor) -> torch.Tensor:
        return bitmap.unpack(values, mask, 70).square().sum()

    (torch.compile(loss, fullgraph=True) if compiled else loss)(values).backward()
    torch.testing.assert_close(values.grad, 2 * dense[keep])


def test_shapes_that_do_not_fit_are_told() -> None:
    with pytest.raises(ValueError, match="8 bytes a row; 65 columns need 16"):
        bitmap.unpack_mask(torch.zeros(1, 8, dtype=torch.uint8), 65)
    with pytest.raises(ValueError, match="one shape"):
        bitmap.pack(torch.zeros(2, 2), torch.zeros(2, 3, dtype=torch.bool))

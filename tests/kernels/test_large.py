"""Indices beyond 2^31, without as much memory: pages that only read as zero take none."""

import numpy as np
import pytest
import torch

from rocket.forms.base import padded_bits
from rocket.kernels import bitmap, library, ops

BEYOND = 2**31 + 192


def zeros(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Zeros that take address space until they are written to: numpy's come from calloc."""
    kinds = {torch.uint8: np.uint8, torch.float16: np.float16}
    return torch.from_numpy(np.zeros(shape, dtype=kinds[dtype]))


def test_counts_are_64_bit_integers():
    """A mask of 2^33 positions, on meta."""
    mask = torch.empty(2**16, bitmap.mask_bytes(2**17), dtype=torch.uint8, device="meta")
    assert mask.numel() * 8 == 2**33
    assert bitmap.row_offsets(mask).dtype == torch.int64
    assert padded_bits(2**16, 2**17) == 2**33
    assert ops.expand(torch.empty(0, device="meta"), mask, bitmap.row_offsets(mask), 2**17).shape == (2**16, 2**17)


needs_kernels = pytest.mark.skipif(library.load() is None, reason="the CPU kernels are not built")


@needs_kernels
@pytest.mark.parametrize("batch", [1, 5, 20])
def test_values_beyond_2_31(batch):
    """Two rows of a matrix whose values begin behind 2^31 others."""
    values = zeros(BEYOND + 3, dtype=torch.float16)
    values[BEYOND:] = torch.tensor([2.0, 3.0, 4.0])
    mask = bitmap.pack_mask(torch.tensor([[True, False, True], [False, True, False]]))
    offsets = torch.tensor([BEYOND, BEYOND + 2, BEYOND + 3])
    x = torch.arange(1.0, 1.0 + 3 * batch).view(batch, 3).half()
    expected = x @ torch.tensor([[2.0, 0.0, 3.0], [0.0, 4.0, 0.0]]).half().T
    assert torch.equal(ops.sparse_linear(x, values, mask, offsets, 3), expected)
    assert torch.equal(ops.expand(values, mask, offsets, 3), torch.tensor([[2.0, 0.0, 3.0], [0.0, 4.0, 0.0]]).half())


@needs_kernels
def test_positions_beyond_2_31():
    """A matrix of 2^15 x (2^16 + 64) positions that keeps one value, in its last row and column."""
    rows, columns = 2**15, 2**16 + 64
    assert rows * columns > 2**31
    mask = zeros(rows, bitmap.mask_bytes(columns), dtype=torch.uint8)
    mask[-1, -1] = 0x80
    offsets = torch.zeros(rows + 1, dtype=torch.int64)
    offsets[-1] = 1
    x = torch.zeros(1, columns)
    x[0, -1] = 3.0
    y = ops.sparse_linear(x, torch.tensor([2.0]), mask, offsets, columns)
    assert y[0, -1] == 6.0
    assert y.count_nonzero() == 1

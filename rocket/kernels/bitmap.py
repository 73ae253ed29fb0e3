"""The bitmap format in plain torch: the reference that every kernel is tested against, on any device.

A sparse matrix of shape [out, cols] is two tensors:

- `values`: 1-D, the kept values row by row (float32, bfloat16 or float16); a kept value may itself be 0;
- `mask`: uint8 [out, 8 * ceil(cols / 64)], one bit a position, little-endian (column c is bit c % 8 of byte c // 8),
  rows padded with zero bits to 64-bit words.

Where each row starts in `values` is derived from `mask` (`row_offsets`), never stored.
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

WORD_BITS = 64


def mask_bytes(cols: int) -> int:
    """Bytes of one mask row: 8 * ceil(cols / 64)."""
    return WORD_BITS // 8 * (-(-cols // WORD_BITS))


def pack_mask(keep: Tensor) -> Tensor:
    """Packs a bool matrix, one bit a position.

    Args:
        keep: bool [out, cols], True where a value is kept.

    Returns:
        uint8 [out, 8 * ceil(cols / 64)].

    >>> pack_mask(torch.tensor([[True, False, True]]))
    tensor([[5, 0, 0, 0, 0, 0, 0, 0]], dtype=torch.uint8)
    """
    out, cols = keep.shape
    width = mask_bytes(cols)
    bits = F.pad(keep.to(torch.uint8), (0, 8 * width - cols)).view(out, width, 8)
    return (bits << _bit_index(keep.device)).sum(-1, dtype=torch.uint8)


def unpack_mask(mask: Tensor, cols: int) -> Tensor:
    """The inverse of `pack_mask`: bool [out, cols] from uint8 [out, 8 * ceil(cols / 64)].

    >>> unpack_mask(pack_mask(torch.tensor([[True, False, True]])), 3)
    tensor([[ True, False,  True]])
    """
    out, width = mask.shape
    if width != mask_bytes(cols):
        raise ValueError(f"mask has {width} bytes a row; {cols} columns need {mask_bytes(cols)}")
    bits = (mask.unsqueeze(-1) >> _bit_index(mask.device)) & 1
    return bits.view(out, 8 * width)[:, :cols].bool()


def pack(dense: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Packs the kept positions of a matrix.

    Args:
        dense: [out, cols], any floating dtype.
        keep: bool [out, cols].

    Returns:
        `(values, mask)`: 1-D of `dense`'s dtype with `keep.sum()` entries, and uint8 as in `pack_mask`.

    >>> values, mask = pack(torch.tensor([[1.0, 2.0], [0.0, 4.0]]), torch.tensor([[True, False], [True, True]]))
    >>> values, count(mask), row_offsets(mask)
    (tensor([1., 0., 4.]), 3, tensor([0, 1, 3]))
    """
    if dense.shape != keep.shape:
        raise ValueError(f"dense is {list(dense.shape)}, keep is {list(keep.shape)}; they must have one shape")
    return dense[keep], pack_mask(keep)


def unpack(values: Tensor, mask: Tensor, cols: int) -> Tensor:
    """The dense [out, cols] matrix, zero where nothing is kept; differentiable in `values`."""
    keep = unpack_mask(mask, cols)
    return values.new_zeros(keep.shape).masked_scatter(keep, values)


def kept_places(mask: Tensor, cols: int) -> Tensor:
    """Where the kept values lie in the flattened matrix: int64 [nnz], ascending.

    >>> kept_places(pack_mask(torch.tensor([[True, False], [False, True]])), 2)
    tensor([0, 3])
    """
    keep = unpack_mask(mask, cols).flatten()
    if keep.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(keep.numpy()))  # torch's nonzero takes ten times as long
    return keep.nonzero().squeeze(1)


def pick(dense: Tensor, mask: Tensor) -> Tensor:
    """The values of a matrix at the kept places, row by row: the inverse of `unpack`.

    By their numbers, as picking by a bool matrix takes several times as long.

    >>> pick(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), pack_mask(torch.tensor([[True, False], [False, True]])))
    tensor([1., 4.])
    """
    return dense.flatten().index_select(0, kept_places(mask, dense.shape[1]))


def row_offsets(mask: Tensor) -> Tensor:
    """Where each row starts in `values`: int64 [out + 1], the last entry being the number of kept values."""
    return F.pad(_row_counts(mask).cumsum(0), (1, 0))


def count(mask: Tensor) -> int:
    """Number of kept values."""
    return int(_row_counts(mask).sum())


def _bit_index(device: torch.device) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=device)


def _row_counts(mask: Tensor) -> Tensor:
    """Number of kept values of each row, int64 [out]: population counts of bytes, of 64-bit words, of rows.

    Nothing much larger than the mask is made on the way: int64 counts of bytes, or a table, would take eight times it.
    """
    out, width = mask.shape
    pairs = mask - ((mask >> 1) & 0x55)
    nibbles = (pairs & 0x33) + ((pairs >> 2) & 0x33)
    bits = (nibbles + (nibbles >> 4)) & 0x0F
    return bits.reshape(out, width // 8, 8).sum(-1, dtype=torch.uint8).sum(-1, dtype=torch.int64)

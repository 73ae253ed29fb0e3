"""Products with bitmap-packed matrices on a GPU, in Triton; imported only where a CUDA tensor, or a test, needs it.

A lane owns eight columns, one byte of mask: it finds where its values begin by a prefix sum of the byte counts over its
warp, then loads up to eight of them. Neighbouring lanes read neighbouring values, so each of the eight loads of a warp
touches few cache lines, and the cost of the prefix sum is spread over 256 columns.
"""

# Triton's kernels are not typed Python.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import os

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from rocket.kernels import bitmap, int8
from rocket.kernels.operands import rows_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

MAX_KERNEL_BATCH = 16
"""Rows of x multiplied without expanding the weights first: the smallest tile that tensor cores take."""

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton's interpreter multiplies bfloat16 matrices as if their bits were integers; there they are widened first."""

ROWS_A_PROGRAM = {"vector": 8, "batch": 16, "expand": 16}
"""Rows of the weights that one program of four warps handles (a power of two; at least 16 for `batch`). More rows share
the loads of x but hold more registers: `vector` fits 32 warps on a processor of an H100 with 8 rows, 16 with 16.
Counted from the compiled code, not yet timed on a GPU."""


@triton.jit
def _byte_count(byte):
    pairs = byte - ((byte >> 1) & 0x55)
    nibbles = (pairs & 0x33) + ((pairs >> 2) & 0x33)
    return (nibbles + (nibbles >> 4)) & 0x0F


@triton.jit
def _next_value(row_values, position, byte, bit: tl.constexpr):
    """The value of column `bit` of each byte, and where the next one lies."""
    kept = (byte & (1 << bit)) != 0
    value = tl.load(row_values[:, None] + position, mask=kept, other=0.0)
    return value, position + kept.to(tl.int32)


@triton.jit
def _expand_block(row_values, taken, mask, rows, row_kept, step, words, BLOCK_ROWS: tl.constexpr):
    """256 columns of BLOCK_ROWS rows: their values [BLOCK_ROWS, 256], and how many each row has taken after them."""
    lane = tl.arange(0, 32)[None, :]
    word = step * 8 + lane // 4
    # Words, not bytes: loads of bytes would be vectorised into another layout and go through shared memory.
    packed = tl.load(mask + rows[:, None].to(tl.int64) * words + word, mask=row_kept[:, None] & (word < words), other=0)
    byte = (packed >> (lane % 4 * 8)) & 0xFF
    count = _byte_count(byte)
    before = tl.cumsum(count, axis=1) - count
    position = taken[:, None] + before
    v0, position = _next_value(row_values, position, byte, 0)
    v1, position = _next_value(row_values, position, byte, 1)
    v2, position = _next_value(row_values, position, byte, 2)
    v3, position = _next_value(row_values, position, byte, 3)
    v4, position = _next_value(row_values, position, byte, 4)
    v5, position = _next_value(row_values, position, byte, 5)
    v6, position = _next_value(row_values, position, byte, 6)
    v7, position = _next_value(row_values, position, byte, 7)
    # Each join adds an innermost dimension of two, so the outermost join decides the lowest bit of the column.
    even = tl.join(tl.join(v0, v4), tl.join(v2, v6))
    odd = tl.join(tl.join(v1, v5), tl.join(v3, v7))
    block = tl.reshape(tl.join(even, odd), (BLOCK_ROWS, 256))
    return block, taken + tl.sum(count, axis=1)


@triton.jit
def _dense_block(values, rows, row_kept, step, cols, BLOCK_ROWS: tl.constexpr):
    """256 columns of BLOCK_ROWS rows of a dense matrix: their values [BLOCK_ROWS, 256]."""
    column = step * 256 + tl.arange(0, 256)
    place = rows[:, None].to(tl.int64) * cols + column[None, :]
    return tl.load(values + place, mask=row_kept[:, None] & (column < cols)[None, :], other=0)


@triton.jit
def _units(scale, rows, exists):
    """What one unit of each row's int8 values stands for."""
    return tl.load(scale + rows, mask=exists, other=0.0).to(tl.float32) / 127.0


@triton.jit
def vector_kernel(
    values, mask, offsets, scale, x, bias, y, out, cols, words,
    SPARSE: tl.constexpr, INT8: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """y [out] = S x + bias for one row of x; mask is int32 [out, words], or S is dense."""
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    exists = rows < out
    if SPARSE:
        row_values = values + tl.load(offsets + rows, mask=exists, other=0)
        taken = tl.zeros((BLOCK_ROWS,), tl.int32)
    total = tl.zeros((BLOCK_ROWS, 256), tl.float32)
    for step in range(tl.cdiv(cols, 256)):
        if SPARSE:
            block, taken = _expand_block(row_values, taken, mask, rows, exists, step, words, BLOCK_ROWS)
        else:
            block = _dense_block(values, rows, exists, step, cols, BLOCK_ROWS)
        column = step * 256 + tl.arange(0, 256)
        operand = tl.load(x + column, mask=column < cols, other=0.0)
        total += block.to(tl.float32) * operand.to(tl.float32)[None, :]
    result = tl.sum(total, axis=1)
    if INT8:
        result *= _units(scale, rows, exists)
    if HAS_BIAS:
        result += tl.load(bias + rows, mask=exists, other=0.0).to(tl.float32)
    tl.store(y + rows, result.to(y.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=["batch"])
def batch_kernel(
    values, mask, offsets, scale, x, bias, y, batch, out, cols, words,
    SPARSE: tl.constexpr, INT8: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_ROWS: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """y [batch, out] = x Sᵀ + bias for up to 16 rows of x, on tensor cores; BLOCK_ROWS >= 16."""
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    exists = rows < out
    item = tl.arange(0, 16)
    if SPARSE:
        row_values = values + tl.load(offsets + rows, mask=exists, other=0)
        taken = tl.zeros((BLOCK_ROWS,), tl.int32)
    total = tl.zeros((BLOCK_ROWS, 16), tl.float32)
    for step in range(tl.cdiv(cols, 256)):
        if SPARSE:
            block, taken = _expand_block(row_values, taken, mask, rows, exists, step, words, BLOCK_ROWS)
        else:
            block = _dense_block(values, rows, exists, step, cols, BLOCK_ROWS)
        column = step * 256 + tl.arange(0, 256)
        operand = tl.load(
            x + item[None, :] * cols + column[:, None],
            mask=(item < batch)[None, :] & (column < cols)[:, None],
            other=0.0,
        )
        if WIDEN:
            block, operand = block.to(tl.float32), operand.to(tl.float32)
        total = tl.dot(block.to(operand.dtype), operand, total, input_precision="ieee")
    if INT8:
        total *= _units(scale, rows, exists)[:, None]
    if HAS_BIAS:
        total += tl.load(bias + rows, mask=exists, other=0.0).to(tl.float32)[:, None]
    tl.store(
        y + item[None, :] * out + rows[:, None],
        total.to(y.dtype.element_ty),
        mask=(item < batch)[None, :] & exists[:, None],
    )


@triton.jit
def expand_kernel(values, mask, offsets, scale, dense, out, cols, words, INT8: tl.constexpr, BLOCK_ROWS: tl.constexpr):
    """dense [out, cols] = S, zero where nothing is kept."""
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    exists = rows < out
    row_values = values + tl.load(offsets + rows, mask=exists, other=0)
    taken = tl.zeros((BLOCK_ROWS,), tl.int32)
    for step in range(tl.cdiv(cols, 256)):
        block, taken = _expand_block(row_values, taken, mask, rows, exists, step, words, BLOCK_ROWS)
        column = step * 256 + tl.arange(0, 256)
        if INT8:
            block = (block.to(tl.float32) * _units(scale, rows, exists)[:, None]).to(dense.dtype.element_ty)
        tl.store(
            dense + rows[:, None].to(tl.int64) * cols + column[None, :],
            block,
            mask=exists[:, None] & (column < cols)[None, :],
        )


def sparse_linear(
    x: Tensor,
    values: Tensor,
    mask: Tensor,
    offsets: Tensor,
    cols: int,
    bias: Tensor | None,
    scale: Tensor | None = None,
) -> Tensor:
    """x Sᵀ + bias, summed in float32; arguments as for `ops.sparse_linear`, all but x contiguous."""
    out = mask.shape[0]
    if rows_of(x) > MAX_KERNEL_BATCH or x.dtype not in DTYPES or 0 in (rows_of(x), out, cols):
        return F.linear(x, expand(values, mask, offsets, cols, scale), bias)
    return _linear(x, values, (mask.view(torch.int32), offsets), out, bias, scale)


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor) -> Tensor:
    """x Wᵀ + bias for int8 values [out, in], summed in float32; all but x contiguous."""
    if rows_of(x) > MAX_KERNEL_BATCH or x.dtype not in DTYPES or 0 in (rows_of(x), *weight.shape):
        return F.linear(x, int8.dequantize(weight, scale), bias)
    return _linear(x, weight, None, weight.shape[0], bias, scale)


def _linear(
    x: Tensor,
    values: Tensor,
    places: tuple[Tensor, Tensor] | None,
    out: int,
    bias: Tensor | None,
    scale: Tensor | None,
) -> Tensor:
    """The product by the kernels, for a few rows of x. ``places``: mask, as words, and offsets of a sparse matrix."""
    x = x.contiguous()
    batch, cols = rows_of(x), x.shape[-1]
    y = x.new_empty((*x.shape[:-1], out))
    weights = (values, *(places or (None, None)), scale)
    sizes = (out, cols, places[0].shape[1] if places else 0)
    given = {"SPARSE": places is not None, "INT8": scale is not None, "HAS_BIAS": bias is not None}
    with torch.cuda.device_of(x):
        if batch == 1:
            rows = ROWS_A_PROGRAM["vector"]
            vector_kernel[(triton.cdiv(out, rows),)](*weights, x, bias, y, *sizes, **given, BLOCK_ROWS=rows)
        else:
            rows = ROWS_A_PROGRAM["batch"]
            batch_kernel[(triton.cdiv(out, rows),)](
                *(*weights, x, bias, y, batch, *sizes), **given, BLOCK_ROWS=rows, WIDEN=INTERPRETED
            )
    return y


def expand(values: Tensor, mask: Tensor, offsets: Tensor, cols: int, scale: Tensor | None = None) -> Tensor:
    """The dense [out, cols]; arguments as for `ops.expand`."""
    out, dtype = mask.shape[0], values.dtype if scale is None else scale.dtype
    if dtype not in DTYPES or 0 in (out, cols):
        dense = bitmap.unpack(values, mask, cols)
        return dense if scale is None else int8.dequantize(dense, scale)
    dense = values.new_empty((out, cols), dtype=dtype)
    rows = ROWS_A_PROGRAM["expand"]
    with torch.cuda.device_of(values):
        expand_kernel[(triton.cdiv(out, rows),)](
            *(values, mask.view(torch.int32), offsets, scale, dense, out, cols, mask.shape[1] // 4),
            INT8=scale is not None,
            BLOCK_ROWS=rows,
        )
    return dense

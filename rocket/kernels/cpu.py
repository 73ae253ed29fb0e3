"""The products of `kernels.ops` on a CPU, through the compiled kernels where there are any."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from rocket.kernels import by_torch, int8, library, operands
from rocket.kernels.operands import Optionals, Tensors, rows_of

MAX_KERNEL_BATCH = 16
"""Rows of x up to which the kernels multiply directly. Beyond, expanding the weights and multiplying densely is faster:
the prototype's crossover lay between 8 and 16."""

SCRATCH_BYTES = 8 << 20
"""Weights expanded at a time for larger batches: few enough to stay in cache, and in memory that the allocator keeps,
until they are multiplied; many enough for a product at full speed."""


class Part(NamedTuple):
    """The tensors of a packed matrix, and of the dictionary before it, if there is one."""

    values: Tensor
    scale: Tensor | None
    mask: Tensor
    offsets: Tensor
    bias: Tensor | None = None
    dictionary: Tensor | None = None
    dictionary_scale: Tensor | None = None

    def types(self) -> set[tuple[torch.dtype, torch.dtype]]:
        """Of its matrices: how their values are stored, and what they are multiplied in."""
        found = {(self.values.dtype, operands.value_type(self.values, self.scale))}
        if self.dictionary is not None:
            found.add((self.dictionary.dtype, operands.value_type(self.dictionary, self.dictionary_scale)))
        return found


def pointer(tensor: Tensor | None) -> int:
    """Where its values lie; 0, a null pointer, for None. Raises ValueError for what is not plain memory of the CPU."""
    if tensor is None:
        return 0
    if not tensor.is_cpu:
        raise ValueError(f"x is on the CPU, a matrix on {tensor.device}")
    if type(tensor) not in operands.PLAIN or not tensor.is_contiguous():
        raise ValueError(
            f"weights must be plain, contiguous tensors; one of shape {list(tensor.shape)} is "
            f"{operands.why_not_plain(tensor)}: use torch's products for it"
        )
    return tensor.data_ptr()


def kernels_for(dtype: torch.dtype) -> library.Kernels | None:
    """The compiled kernels, if there are any for x of this type."""
    return library.load() if dtype in library.TYPES else None


def sparse_linear(
    x: Tensor,
    values: Tensor,
    mask: Tensor,
    offsets: Tensor,
    cols: int,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    kernels = kernels_for(operands.value_type(values, scale))
    if kernels is None:
        return by_torch.sparse_linear(x, values, mask, offsets, cols, bias, scale)
    if rows_of(x) > MAX_KERNEL_BATCH:
        operands.check_sparse(mask, offsets, cols)
        operands.check_product(x, values, cols, scale, mask.shape[0])

        def rows_of_weights(first: int, last: int, scratch: Tensor) -> Tensor:
            part = None if scale is None else scale[first:last]
            return _expand_into(scratch, kernels, values, mask[first:last], offsets[first : last + 1], part)

        return _expanded_linear(x, mask.shape[0], rows_of_weights, bias)
    return PackedProducts(kernels, [Part(values, scale, mask, offsets, bias)], [cols], cols)(x)[0]


def packed_linears(
    x: Tensor,
    values: Tensors,
    scales: Optionals,
    masks: Tensors,
    offsets: Tensors,
    biases: Optionals,
    dictionaries: Optionals,
    dictionary_scales: Optionals,
    columns: Sequence[int],
) -> list[Tensor]:
    parts = values, scales, masks, offsets, biases, dictionaries, dictionary_scales
    kernels = kernels_for(x.dtype)
    if kernels is None or rows_of(x) > MAX_KERNEL_BATCH or not masks:
        return by_torch.packed_linears(x, *parts, columns)
    together = (Part(*part) for part in zip(*parts, strict=True))
    return PackedProducts(kernels, together, columns, x.shape[-1])(x)


class PackedProducts:
    """Products of one x with several packed matrices: the arguments checked, their pointers laid out, once for all x.

    x has ``in_features`` columns, and so have matrices without a dictionary; with one, they have its rank, or both.
    ``columns`` tells which, matrix by matrix. All values are of one kind. The tensors are not kept: before another call
    it must be seen that they are where they were (`places`). Safe to call from several threads at a time.
    """

    def __init__(
        self, kernels: library.Kernels, parts: Iterable[Part], columns: Sequence[int], in_features: int
    ) -> None:
        self._kernels = kernels
        self._in_features = in_features
        self._outputs: list[int] = []
        types: set[tuple[torch.dtype, torch.dtype]] = set()
        fields: list[int] = []
        for part, cols in zip(parts, columns, strict=True):
            values, scale, mask, offsets, bias, dictionary, dictionary_scale = part
            out = mask.shape[0]
            operands.check_sparse(mask, offsets, cols)
            operands.check_scale(values, scale, out)
            operands.check_bias(bias, operands.value_type(values, scale), out)
            operands.check_dictionary(dictionary, dictionary_scale, cols, in_features)
            types |= part.types()
            rank = -1 if dictionary is None else len(dictionary)
            fields += (pointer(values), pointer(scale), pointer(mask), pointer(offsets), values.numel(), out, cols)
            fields += (pointer(bias), pointer(dictionary), pointer(dictionary_scale), rank, 0)
            self._outputs.append(out)
        if len(types) != 1:
            raise ValueError(f"matrices of one product must have values of one type, got {types}")
        ((_, self._type),) = types
        self._fields = library.parts(fields)

    def __call__(self, x: Tensor) -> list[Tensor]:
        """x Wᵀ + bias of each part, for x [..., in_features]. Raises ValueError if x does not fit."""
        operands.check_input(x, self._type, self._in_features)
        x = x.contiguous()
        fields = type(self._fields).from_buffer_copy(self._fields)
        leading = x.shape[:-1]
        outputs = []
        for part, out in enumerate(self._outputs):
            y = x.new_empty((*leading, out))
            fields[library.PART_FIELDS * (part + 1) - 1] = y.data_ptr()
            outputs.append(y)
        self._kernels.packed_linears(
            *(self._kernels.path, library.TYPES[self._type], torch.get_num_threads()),
            *(x.data_ptr(), leading.numel(), self._in_features),
            *(fields, len(outputs)),
        )
        return outputs


def prepare(parts: Sequence[Part], columns: Sequence[int], in_features: int) -> PackedProducts | None:
    """The products; None where they cannot be one call of the kernels.

    That is where there are no kernels, or where tensors are elsewhere, not plain, of several types, or do not fit.
    """
    types = set().union(*(part.types() for part in parts))
    kernels = kernels_for(next(iter(types))[1])
    if kernels is None or any(_out_of_reach(tensor) for part in parts for tensor in part):
        return None
    try:
        return PackedProducts(kernels, parts, columns, in_features)
    except ValueError:
        return None


def _out_of_reach(tensor: Tensor | None) -> bool:
    return tensor is not None and not (tensor.is_cpu and operands.is_plain(tensor))


def places(tensors: Sequence[Tensor | None]) -> tuple[object, ...]:
    """What tells that pointers to tensors can be used again: their addresses, sizes and types."""
    return tuple(None if tensor is None else (tensor.data_ptr(), tensor.numel(), tensor.dtype) for tensor in tensors)


def factor_linear(
    x: Tensor,
    dictionary: Tensor,
    values: Tensor,
    mask: Tensor,
    offsets: Tensor,
    bias: Tensor | None = None,
    dictionary_scale: Tensor | None = None,
    scale: Tensor | None = None,
    beside_input: bool = False,
) -> Tensor:
    kernels = kernels_for(operands.value_type(values, scale))
    if kernels is None or rows_of(x) > MAX_KERNEL_BATCH:
        return by_torch.factor_linear(x, dictionary, values, mask, offsets, bias, dictionary_scale, scale, beside_input)
    rank, in_features = dictionary.shape
    columns = rank + in_features if beside_input else rank
    part = Part(values, scale, mask, offsets, bias, dictionary, dictionary_scale)
    return PackedProducts(kernels, [part], [columns], in_features)(x)[0]


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
    kernels = kernels_for(operands.value_type(weight, scale))
    batch, (out, in_features) = rows_of(x), weight.shape
    if scale is not None and batch > MAX_KERNEL_BATCH:
        operands.check_product(x, weight, in_features, scale, out)
        return _expanded_linear(
            x, out, lambda first, last, part: int8.dequantize(weight[first:last], scale[first:last], part), bias
        )
    if kernels is None or batch > MAX_KERNEL_BATCH:
        return by_torch.dense_linear(x, weight, bias, scale)
    operands.check_product(x, weight, in_features, scale, out, bias)
    x = x.contiguous()
    y = x.new_empty(*x.shape[:-1], out)
    kernels.dense_linear(
        *(kernels.path, library.TYPES[x.dtype], torch.get_num_threads()),
        *(x.data_ptr(), batch, in_features),
        *(pointer(weight), pointer(scale), out),
        *(pointer(bias), y.data_ptr()),
    )
    return y


def expand(values: Tensor, mask: Tensor, offsets: Tensor, cols: int, scale: Tensor | None = None) -> Tensor:
    dtype = operands.value_type(values, scale)
    kernels = kernels_for(dtype)
    if kernels is None:
        return by_torch.expand(values, mask, offsets, cols, scale)
    operands.check_sparse(mask, offsets, cols)
    operands.check_scale(values, scale, mask.shape[0])
    dense = values.new_empty((mask.shape[0], cols), dtype=dtype)
    return _expand_into(dense, kernels, values, mask, offsets, scale)


def _expand_into(
    dense: Tensor, kernels: library.Kernels, values: Tensor, mask: Tensor, offsets: Tensor, scale: Tensor | None
) -> Tensor:
    out, cols = dense.shape
    kernels.expand(
        *(kernels.path, library.TYPES[dense.dtype], torch.get_num_threads()),
        *(pointer(values), pointer(scale), pointer(mask), pointer(offsets), values.numel(), out),
        *(cols, dense.data_ptr()),
    )
    return dense


def _expanded_linear(
    x: Tensor, out: int, rows_of_weights: Callable[[int, int, Tensor], Tensor], bias: Tensor | None
) -> Tensor:
    """For many rows of x: makes some rows of the weights, multiplies them, goes on to the next.

    ``rows_of_weights(first, last, scratch)`` are rows first ... last - 1 in the type of x; they may lie in ``scratch``.
    """
    cols = x.shape[-1]
    step = max(1, SCRATCH_BYTES // max(1, cols * x.element_size()))
    scratch = x.new_empty((min(step, out), cols))
    if step >= out:
        return F.linear(x, rows_of_weights(0, out, scratch), bias)
    rows = x.reshape(-1, cols)
    y = x.new_empty(len(rows), out)
    for first in range(0, out, step):
        last = min(first + step, out)
        weight = rows_of_weights(first, last, scratch[: last - first])
        if bias is None:  # in place: a product that is copied into its columns takes a twentieth longer
            torch.mm(rows, weight.T, out=y[:, first:last])
        else:
            torch.addmm(bias[first:last], rows, weight.T, out=y[:, first:last])
    return y.view(*x.shape[:-1], out)

"""Products with bitmap-packed matrices as torch ops (`torch.ops.rocket`): CPU, CUDA and, through torch, anywhere else.

They are for inference and have no gradient, but for `expand`, through which layers train. x may have any number of
leading dimensions. x, values, dictionary, weight and bias share one dtype and device; all but x must be contiguous.
Where a `scale` is given, the values that it belongs to are int8 (`kernels.int8`), and it has the dtype of x instead.
`offsets` is `bitmap.row_offsets(mask)`, which the caller keeps. NaN and infinity in x spread as they do in the dense
product.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from rocket.kernels import bitmap, int8, library

MAX_KERNEL_BATCH = 16
"""Rows of x up to which the CPU kernels multiply directly. Beyond, expanding the weights and multiplying densely is
faster: the prototype's crossover lay between 8 and 16."""

SCRATCH_BYTES = 8 << 20
"""Weights expanded at a time for larger batches: few enough to stay in cache, and in memory that the allocator keeps,
until they are multiplied; many enough for a product at full speed."""

Tensors: TypeAlias = Sequence[Tensor]
Optionals: TypeAlias = Sequence[Tensor | None]

_library = torch.library.Library("rocket", "DEF")
for _schema in (
    "sparse_linear(Tensor x, Tensor values, Tensor mask, Tensor offsets, int cols, Tensor? bias=None,"
    " Tensor? scale=None) -> Tensor",
    "sparse_linears(Tensor x, Tensor[] values, Tensor[] masks, Tensor[] offsets, int cols, Tensor?[] biases,"
    " Tensor?[] scales) -> Tensor[]",
    "factor_linear(Tensor x, Tensor dictionary, Tensor values, Tensor mask, Tensor offsets, Tensor? bias=None,"
    " Tensor? dictionary_scale=None, Tensor? scale=None) -> Tensor",
    "dense_linear(Tensor x, Tensor weight, Tensor? bias=None, Tensor? scale=None) -> Tensor",
    "expand(Tensor values, Tensor mask, Tensor offsets, int cols, Tensor? scale=None) -> Tensor",
    "pick(Tensor dense, Tensor mask, int count) -> Tensor",
):
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))

_sparse_linear = torch.ops.rocket.sparse_linear.default
_sparse_linears = torch.ops.rocket.sparse_linears.default
_factor_linear = torch.ops.rocket.factor_linear.default
_dense_linear = torch.ops.rocket.dense_linear.default
_expand = torch.ops.rocket.expand.default
_pick = torch.ops.rocket.pick.default


def sparse_linear(
    x: Tensor,
    values: Tensor,
    mask: Tensor,
    offsets: Tensor,
    cols: int,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """x Sᵀ + bias for a bitmap-packed S.

    Args:
        x: [..., cols].
        values: 1-D, the kept values of S.
        mask: uint8 [out, 8 * ceil(cols / 64)].
        offsets: int64 [out + 1], `bitmap.row_offsets(mask)`.
        cols: columns of S.
        bias: [out].
        scale: [out], where the values are int8.

    Returns:
        [..., out]; on a CPU summed in float32 and rounded once.

    Raises:
        ValueError: shapes or dtypes do not fit together.
    """
    result: Tensor = _sparse_linear(x, values, mask, offsets, cols, bias, scale)
    return result


def sparse_linears(
    x: Tensor, values: Tensors, masks: Tensors, offsets: Tensors, cols: int, biases: Optionals, scales: Optionals
) -> list[Tensor]:
    """`sparse_linear` of one x with several matrices of as many columns, in one parallel pass over all their rows.

    The values of all are int8, or those of none.
    """
    result: list[Tensor] = _sparse_linears(x, values, masks, offsets, cols, biases, scales)
    return result


def factor_linear(
    x: Tensor,
    dictionary: Tensor,
    values: Tensor,
    mask: Tensor,
    offsets: Tensor,
    bias: Tensor | None = None,
    dictionary_scale: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """(x Dᵀ) Sᵀ + bias in one call, for a dense dictionary D [k, in] and a bitmap-packed S [out, k].

    x Dᵀ is rounded to the dtype of x, so that the result is that of `dense_linear` followed by `sparse_linear`, whose
    arguments and errors it shares. Both matrices have int8 values, with scales [k] and [out], or neither.
    """
    result: Tensor = _factor_linear(x, dictionary, values, mask, offsets, bias, dictionary_scale, scale)
    return result


def dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
    """`F.linear`, at memory speed for a few rows of x on a CPU: x [..., in], weight [out, in], bias and scale [out]."""
    result: Tensor = _dense_linear(x, weight, bias, scale)
    return result


def expand(values: Tensor, mask: Tensor, offsets: Tensor, cols: int, scale: Tensor | None = None) -> Tensor:
    """The dense [out, cols] at memory speed, differentiable in the values where they are not int8.

    Arguments as for `sparse_linear`.
    """
    result: Tensor = _expand(values, mask, offsets, cols, scale)
    return result


def _check_sparse(values: Tensor, mask: Tensor, offsets: Tensor, cols: int) -> None:
    if mask.shape[1] != bitmap.mask_bytes(cols) or offsets.shape[0] != mask.shape[0] + 1:
        raise ValueError(
            f"mask is {list(mask.shape)} and offsets {list(offsets.shape)}; "
            f"{cols} columns need [out, {bitmap.mask_bytes(cols)}] and [out + 1]"
        )


def _check_product(x: Tensor, weight: Tensor, cols: int, scale: Tensor | None, out: int) -> None:
    dtype = _dtype(weight, scale)
    if x.shape[-1] != cols or x.dtype != dtype:
        raise ValueError(f"x is {x.dtype} {list(x.shape)}; the matrix needs {dtype} [..., {cols}]")
    _check_scale(weight, scale, out)


def _check_scale(weight: Tensor, scale: Tensor | None, out: int) -> None:
    if scale is not None and (scale.shape != (out,) or weight.dtype != torch.int8):
        raise ValueError(f"values are {weight.dtype}, their scale {list(scale.shape)}: int8 needs a scale [{out}]")


def _dtype(values: Tensor, scale: Tensor | None) -> torch.dtype:
    """What values are multiplied in."""
    return values.dtype if scale is None else scale.dtype


def _pointer(tensor: Tensor | None) -> int:
    """Where its values lie; 0, a null pointer, for None."""
    if tensor is None:
        return 0
    if not tensor.is_contiguous():
        raise ValueError(f"weights must be contiguous; one is {list(tensor.shape)} with strides {tensor.stride()}")
    return tensor.data_ptr()


def _batch(x: Tensor) -> int:
    return math.prod(x.shape[:-1])


# Any device, through torch.


def _sparse_linear_torch(
    x: Tensor,
    values: Tensor,
    mask: Tensor,
    offsets: Tensor,
    cols: int,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    _check_product(x, values, cols, scale, mask.shape[0])
    return F.linear(x, _expand_torch(values, mask, offsets, cols, scale), bias)


def _sparse_linears_torch(
    x: Tensor, values: Tensors, masks: Tensors, offsets: Tensors, cols: int, biases: Optionals, scales: Optionals
) -> list[Tensor]:
    parts = zip(values, masks, offsets, biases, scales, strict=True)
    return [sparse_linear(x, value, mask, starts, cols, bias, scale) for value, mask, starts, bias, scale in parts]


def _factor_linear_torch(
    x: Tensor,
    dictionary: Tensor,
    values: Tensor,
    mask: Tensor,
    offsets: Tensor,
    bias: Tensor | None = None,
    dictionary_scale: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    hidden = dense_linear(x, dictionary, None, dictionary_scale)
    return sparse_linear(hidden, values, mask, offsets, dictionary.shape[0], bias, scale)


def _dense_linear_torch(x: Tensor, weight: Tensor, bias: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
    _check_scale(weight, scale, weight.shape[0])
    return F.linear(x, weight if scale is None else int8.dequantize(weight, scale), bias)


def _expand_torch(values: Tensor, mask: Tensor, offsets: Tensor, cols: int, scale: Tensor | None = None) -> Tensor:
    _check_scale(values, scale, mask.shape[0])
    dense = bitmap.unpack(values, mask, cols)
    return dense if scale is None else int8.dequantize(dense, scale)


def _pick_torch(dense: Tensor, mask: Tensor, count: int) -> Tensor:
    return bitmap.pick(dense, mask)


# CPU, through the compiled kernels.


def _kernels(dtype: torch.dtype) -> library.Kernels | None:
    """The compiled kernels, if there are any for x of this type."""
    return library.load() if dtype in library.TYPES else None


def _sparse_linear_cpu(
    x: Tensor,
    values: Tensor,
    mask: Tensor,
    offsets: Tensor,
    cols: int,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    kernels = _kernels(_dtype(values, scale))
    if kernels is None:
        return _sparse_linear_torch(x, values, mask, offsets, cols, bias, scale)
    if _batch(x) > MAX_KERNEL_BATCH:
        _check_sparse(values, mask, offsets, cols)
        _check_product(x, values, cols, scale, mask.shape[0])

        def rows_of_weights(first: int, last: int, scratch: Tensor) -> Tensor:
            part = None if scale is None else scale[first:last]
            return _expand_into(scratch, kernels, values, mask[first:last], offsets[first : last + 1], part)

        return _expanded_linear(x, mask.shape[0], rows_of_weights, bias)
    return _sparse_products(kernels, x, (values,), (mask,), (offsets,), cols, (bias,), (scale,))[0]


def _sparse_linears_cpu(
    x: Tensor, values: Tensors, masks: Tensors, offsets: Tensors, cols: int, biases: Optionals, scales: Optionals
) -> list[Tensor]:
    kernels = _kernels(x.dtype)
    if kernels is None or _batch(x) > MAX_KERNEL_BATCH:
        return _sparse_linears_torch(x, values, masks, offsets, cols, biases, scales)
    return _sparse_products(kernels, x, values, masks, offsets, cols, biases, scales)


def _sparse_products(
    kernels: library.Kernels,
    x: Tensor,
    values: Tensors,
    masks: Tensors,
    offsets: Tensors,
    cols: int,
    biases: Optionals,
    scales: Optionals,
) -> list[Tensor]:
    x = x.contiguous()
    outputs: list[Tensor] = []
    parts: list[int] = []
    for value, mask, starts, bias, scale in zip(values, masks, offsets, biases, scales, strict=True):
        out = mask.shape[0]
        _check_sparse(value, mask, starts, cols)
        _check_product(x, value, cols, scale, out)
        y = x.new_empty(*x.shape[:-1], out)
        parts += (_pointer(value), _pointer(scale), _pointer(mask), _pointer(starts))
        parts += (value.numel(), out, _pointer(bias), y.data_ptr())
        outputs.append(y)
    kernels.sparse_linears(
        *(kernels.path, library.TYPES[x.dtype], torch.get_num_threads()),
        *(x.data_ptr(), _batch(x), cols),
        *(library.parts(parts), len(outputs)),
    )
    return outputs


def _factor_linear_cpu(
    x: Tensor,
    dictionary: Tensor,
    values: Tensor,
    mask: Tensor,
    offsets: Tensor,
    bias: Tensor | None = None,
    dictionary_scale: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    kernels = _kernels(_dtype(values, scale))
    rank, in_features = dictionary.shape
    batch, out = _batch(x), mask.shape[0]
    if kernels is None or batch > MAX_KERNEL_BATCH:
        return _factor_linear_torch(x, dictionary, values, mask, offsets, bias, dictionary_scale, scale)
    _check_sparse(values, mask, offsets, rank)
    _check_product(x, dictionary, in_features, dictionary_scale, rank)
    _check_product(x, values, in_features, scale, out)
    x = x.contiguous()
    y = x.new_empty(*x.shape[:-1], out)
    kernels.factor_linear(
        *(kernels.path, library.TYPES[x.dtype], torch.get_num_threads()),
        *(x.data_ptr(), batch, in_features),
        *(_pointer(dictionary), _pointer(dictionary_scale), rank),
        *(_pointer(values), _pointer(scale), _pointer(mask), _pointer(offsets), values.numel(), out),
        *(_pointer(bias), y.data_ptr()),
    )
    return y


def _dense_linear_cpu(x: Tensor, weight: Tensor, bias: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
    kernels = _kernels(_dtype(weight, scale))
    batch, (out, in_features) = _batch(x), weight.shape
    if scale is not None and batch > MAX_KERNEL_BATCH:
        _check_product(x, weight, in_features, scale, out)
        return _expanded_linear(
            x, out, lambda first, last, part: int8.dequantize(weight[first:last], scale[first:last], part), bias
        )
    if kernels is None or batch > MAX_KERNEL_BATCH:
        return _dense_linear_torch(x, weight, bias, scale)
    _check_product(x, weight, in_features, scale, out)
    x = x.contiguous()
    y = x.new_empty(*x.shape[:-1], out)
    kernels.dense_linear(
        *(kernels.path, library.TYPES[x.dtype], torch.get_num_threads()),
        *(x.data_ptr(), batch, in_features),
        *(_pointer(weight), _pointer(scale), out),
        *(_pointer(bias), y.data_ptr()),
    )
    return y


def _expand_cpu(values: Tensor, mask: Tensor, offsets: Tensor, cols: int, scale: Tensor | None = None) -> Tensor:
    dtype = _dtype(values, scale)
    kernels = _kernels(dtype)
    if kernels is None:
        return _expand_torch(values, mask, offsets, cols, scale)
    _check_sparse(values, mask, offsets, cols)
    _check_scale(values, scale, mask.shape[0])
    dense = values.new_empty((mask.shape[0], cols), dtype=dtype)
    return _expand_into(dense, kernels, values, mask, offsets, scale)


def _expand_into(
    dense: Tensor, kernels: library.Kernels, values: Tensor, mask: Tensor, offsets: Tensor, scale: Tensor | None
) -> Tensor:
    kernels.expand(
        *(kernels.path, library.TYPES[dense.dtype], torch.get_num_threads()),
        *(_pointer(values), _pointer(scale), _pointer(mask), _pointer(offsets), values.numel(), dense.shape[0]),
        *(dense.shape[1], dense.data_ptr()),
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


# CUDA, through Triton: imported at the first call, so that nothing here needs it.


def _sparse_linear_cuda(
    x: Tensor,
    values: Tensor,
    mask: Tensor,
    offsets: Tensor,
    cols: int,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    _check_sparse(values, mask, offsets, cols)
    _check_product(x, values, cols, scale, mask.shape[0])
    from rocket.kernels import gpu

    return gpu.sparse_linear(x, values, mask, offsets, cols, bias, scale)


def _dense_linear_cuda(x: Tensor, weight: Tensor, bias: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
    if scale is None:
        return F.linear(x, weight, bias)
    _check_product(x, weight, weight.shape[1], scale, weight.shape[0])
    from rocket.kernels import gpu

    return gpu.dense_linear(x, weight, bias, scale)


def _expand_cuda(values: Tensor, mask: Tensor, offsets: Tensor, cols: int, scale: Tensor | None = None) -> Tensor:
    _check_sparse(values, mask, offsets, cols)
    _check_scale(values, scale, mask.shape[0])
    from rocket.kernels import gpu

    return gpu.expand(values, mask, offsets, cols, scale)


# Shapes alone, for torch.compile.


def _sparse_linear_fake(
    x: Tensor,
    values: Tensor,
    mask: Tensor,
    offsets: Tensor,
    cols: int,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], mask.shape[0]))


def _sparse_linears_fake(
    x: Tensor, values: Tensors, masks: Tensors, offsets: Tensors, cols: int, biases: Optionals, scales: Optionals
) -> list[Tensor]:
    return [x.new_empty((*x.shape[:-1], mask.shape[0])) for mask in masks]


def _factor_linear_fake(
    x: Tensor,
    dictionary: Tensor,
    values: Tensor,
    mask: Tensor,
    offsets: Tensor,
    bias: Tensor | None = None,
    dictionary_scale: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], mask.shape[0]))


def _dense_linear_fake(x: Tensor, weight: Tensor, bias: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _expand_fake(values: Tensor, mask: Tensor, offsets: Tensor, cols: int, scale: Tensor | None = None) -> Tensor:
    return values.new_empty((mask.shape[0], cols), dtype=_dtype(values, scale))


def _pick_fake(dense: Tensor, mask: Tensor, count: int) -> Tensor:
    return dense.new_empty(count)


for _name, _fake, _torch, _cpu, _cuda in (
    ("sparse_linear", _sparse_linear_fake, _sparse_linear_torch, _sparse_linear_cpu, _sparse_linear_cuda),
    ("sparse_linears", _sparse_linears_fake, _sparse_linears_torch, _sparse_linears_cpu, _sparse_linears_torch),
    ("factor_linear", _factor_linear_fake, _factor_linear_torch, _factor_linear_cpu, _factor_linear_torch),
    ("dense_linear", _dense_linear_fake, _dense_linear_torch, _dense_linear_cpu, _dense_linear_cuda),
    ("expand", _expand_fake, _expand_torch, _expand_cpu, _expand_cuda),
    ("pick", _pick_fake, _pick_torch, _pick_torch, _pick_torch),
):
    _library.impl(_name, _torch, "CompositeExplicitAutograd")
    _library.impl(_name, _cpu, "CPU")
    _library.impl(_name, _cuda, "CUDA")
    torch.library.register_fake(f"rocket::{_name}", cast(Callable[..., Any], _fake), lib=_library)


def _remember_mask(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, int, Tensor | None], output: Tensor) -> None:
    values, mask, *_ = inputs
    ctx.save_for_backward(mask)
    ctx.count = values.numel()


def _expand_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
    """Each value takes the gradient of the place where it lies."""
    return _pick(gradient, ctx.saved_tensors[0], ctx.count), None, None, None, None


torch.library.register_autograd("rocket::expand", _expand_backward, setup_context=_remember_mask, lib=_library)
